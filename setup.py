"""Package metadata. ``constraints.txt`` pins the exact versions that development and CI use."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "mstar_mega/__init__.py").read_text(), re.MULTILINE)
assert VERSION is not None

REQUIRES = [
    "torch>=2.11,<2.14",
    # Its internal interfaces, which the CPU platform layer replaces, move between releases: the first and the last of
    # these are tested (make test, make test MCORE=0.19.2). From 0.17 on it needs Python 3.12.
    "megatron-core>=0.16.1,<0.20",
    # megatron-core needs these two and does not declare them. Without psutil saving a checkpoint hangs.
    "psutil>=5.9",
    "einops>=0.8",
    "numpy>=1.26",
    "pillow>=10.1",
    "scikit-learn>=1.4",  # the handwritten digits of the built-in task; AUC of the PRM
    "sentencepiece>=0.2",
    "tokenizers>=0.21",  # tokenizer.json of Llama and Phi; encode_special_tokens
    "safetensors>=0.5",
    "jsonargparse>=4.40,<5",
    "pyyaml>=6.0",
    "pydantic>=2.7,<3",  # what files from elsewhere must hold: indices, manifests, configs, events, records
    "math-verify>=0.8",
    "pint>=0.24,<1",  # units in answers, whatever their spelling; loaded at the first unit
    "text2num>=3.0",  # number words in answers: "minus one hundred"
    "cn2an>=0.5.22",  # the same in Chinese
    "pyarrow>=16",  # MathVista and M3CoT are distributed as parquet; pip has no lighter reader that is as complete
    "openpyxl>=3.1",  # predictions as VLMEvalKit writes them: xlsx
    "rapidfuzz>=3.6",  # edit distances of MathVista's rules, quick also where a response is a megabyte
    "rich>=13.7",
    "matplotlib>=3.8",
    "tensorboard>=2.16",
]

# Compiled kernels run with each of these. Triton 3.6 interprets (the tests without a GPU) with numpy below 2.4 only.
TRITON = 'triton>=3.6,<3.10; platform_system == "Linux"'
TRANSFORMERS = "transformers>=5.0,<6"
EASY_VQA = "easy-vqa>=1.0,<2"
LIGER = 'liger-kernel>=0.6; platform_system == "Linux"'

# In no extra, for they are built against the CUDA and torch that are there: NVIDIA's apex (through megatron-core its
# fused Adam, norms of gradients and weight gradients) and flash-attn>=2.5 (attention within prompts and pictures).
EXTRAS = {
    # Detected at run time; every kernel has a reference in plain PyTorch beside it.
    "gpu": [TRITON],
    # What the benchmarks compare with: transformers' generate, and the kernels of Liger.
    "peers": [TRANSFORMERS, TRITON, LIGER],
    # 5,000 real pictures with 48,248 questions: the second demonstration, examples/configs/easy_vqa.yaml.
    "easy-vqa": [EASY_VQA],
    # Tests (Triton runs interpreted; transformers and Liger are references for models and losses), lint and types.
    "dev": ["pytest>=8.0", "pytest-xdist>=3.6", "ruff>=0.9", "mypy>=1.14", TRITON, TRANSFORMERS, LIGER, EASY_VQA],
}

ELSEWHERE = {
    "mstar_mega.kernels": "kernels",
    "mstar_mega.checkpoint_tools": "checkpoint_tools",
    "mstar_mega.configs": "examples/configs",
}
"""Packages that do not lie where their name says."""

setup(
    name="mstar-mega",
    version=VERSION[1],
    description="Self-evolving training of multimodal reasoners (the MSTaR recipe) on megatron-core",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # megatron-core has wheels for these, on Linux only (x86_64, aarch64): 0.16 for all of them.
    python_requires=">=3.10,<3.14",
    # kernels/, checkpoint_tools/ and examples/configs/ lie elsewhere in a checkout and are found through the relative
    # links inside mstar_mega/, which also keep a bare clone, type checkers and editors right. An archive of the sources
    # holds no links, so they are named here too. It makes an editable install map the packages one by one as well;
    # otherwise it would put the whole clone on sys.path, where `kernels` shadows the library that transformers imports.
    packages=sorted({*find_packages(include=["mstar_mega", "mstar_mega.*"]), *ELSEWHERE}),
    package_dir=ELSEWHERE,
    package_data={
        "mstar_mega": ["data/**/*.model", "report/**/*.html", "report/**/*.css", "report/**/*.js"],
        "mstar_mega.configs": ["*.yaml"],
        "mstar_mega.kernels": ["*.c"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    entry_points={"console_scripts": ["mstar = mstar_mega.cli:main"]},
)
