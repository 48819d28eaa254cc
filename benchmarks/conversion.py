"""Conversion at the real sizes: time and the most memory that a process held, on random weights made on the spot.

    .venv/bin/python benchmarks/conversion.py [--work DIR] [--only internvl2|minicpm_v2_5]

InternVL2-2B to a checkpoint and back, byte for byte, then opened in bfloat16 for one forward pass of an image;
MiniCPM-Llama3-V-2.5 to a checkpoint for 4 tensor ranks. Each step is a process of its own, whose peak resident set the
system reports when it ends. Needs about 14 GB of disk for the former and 36 GB for the latter; they are deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from environment import environment, write_result

from mstar_mega.checkpoint_tools.convert import SHARD_BYTES
from mstar_mega.checkpoint_tools.hf_files import HFWeights, HFWriter, finish_shards
from mstar_mega.checkpoint_tools.maps import map_of
from mstar_mega.checkpoint_tools.published import PUBLISHED

LIMITS = {"internvl2": 6e9, "minicpm_v2_5": 8e9}
"""Most bytes that a conversion may hold."""
_POOL = 1 << 26


def make_random(family: str, folder: Path) -> None:
    """A Hugging Face directory of the published size: normal values of a fixed seed, in the published dtype."""
    config = PUBLISHED[family]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    dtype = getattr(torch, config["torch_dtype"])
    pool = (0.02 * torch.randn(_POOL, generator=torch.Generator().manual_seed(0))).to(dtype)
    writer = HFWriter(folder, SHARD_BYTES)
    sources = [source for mapping in map_of(config, "vocabulary", folder).mappings for source in mapping.sources]
    for number, source in enumerate(sorted(sources, key=lambda source: source.name)):
        count = torch.Size(source.shape).numel()
        # Another stretch of the pool for each tensor: an exchange of two tensors is seen.
        start = number * 7919 % (_POOL // 2)
        values = pool[start : start + count]
        while values.numel() < count:
            values = torch.cat([values, pool[: count - values.numel()]])
        writer.add(source.name, values.reshape(source.shape).clone())
    writer.flush()
    finish_shards(folder, writer.shards)


def measured(*arguments: str) -> dict[str, Any]:
    """Run Python with these arguments; seconds, and the most bytes it held. Raises RuntimeError if it fails."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed with exit code {process.returncode}: {output}")
    print(output, end="", flush=True)
    result = {"seconds": round(time.monotonic() - started, 1), "peak_bytes": usage.ru_maxrss * 1024}
    return {**result, "said": re.sub(r"\S+/(?=[\w.]+: )", "", output.strip())}  # no directories


def assert_same(first: Path, second: Path) -> int:
    """Compare all tensors byte for byte; returns their number."""
    a, b = HFWeights(first), HFWeights(second)
    assert set(a.tensors) == set(b.tensors)
    for name in a.tensors:
        x, y = a.read(name), b.read(name)
        assert x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8)), name
    return len(a.tensors)


def forward(checkpoint: Path) -> None:
    """Open a checkpoint in bfloat16 and run one image and a few tokens through it. In a process of its own."""
    from mstar_mega.config import Config, ModelConfig, ParallelConfig
    from mstar_mega.models import golden
    from mstar_mega.models.build import build_model
    from mstar_mega.models.description import MODEL_FILES, family_from_hf
    from mstar_mega.models.packing import Prompt
    from mstar_mega.platform import distributed
    from mstar_mega.training.checkpoint import load_checkpoint

    distributed.initialize(ParallelConfig(), 0)
    family = family_from_hf(checkpoint / MODEL_FILES, with_tokenizer=False)
    model = build_model(Config(model=ModelConfig(precision="bfloat16")), family, draw=False)
    started = time.monotonic()
    state, _ = load_checkpoint(checkpoint, {"model": model.sharded_state_dict()})
    model.load_state_dict(state["model"])
    loaded = time.monotonic() - started
    started = time.monotonic()
    pixels = torch.randn(1, 3, family.vision.image_size, family.vision.image_size)
    places = list(range(1, 1 + (family.vision.grid // 2) ** 2))
    prompt = Prompt([1] * (len(places) + 20), places, pixels)
    logits = golden.logits(model, golden.Case([prompt], pixels, None, torch.ones(1, dtype=torch.bool)))
    assert logits.isfinite().all() and logits.std() > 0
    print(
        f"opened in {loaded:.1f} s; a forward pass of {logits.size(1)} tokens (one tile) in "
        f"{time.monotonic() - started:.1f} s; logits {list(logits.shape)}, standard deviation {logits.std():.3f}"
    )


def bench(family: str, work: Path) -> dict[str, Any]:
    """All steps of one family, each with its time and peak memory."""
    hf, there, back = (work / f"{family}_{what}" for what in ("hf", "checkpoint", "back"))
    tool = ("-m", "mstar_mega.cli", "convert")
    result: dict[str, Any] = {"parameters": None, "limit_bytes": LIMITS[family]}
    try:
        # Elsewhere: the peak of a process counts what its parent held when it was started.
        measured(__file__, "--make", str(hf), "--only", family)
        tensors = HFWeights(hf).tensors.values()
        result["parameters"] = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
        result["weight_bytes"] = sum(tensor.bytes for tensor in tensors)
        tensor_ranks = "1" if family == "internvl2" else "4"
        step = measured(*tool, "hf-to-megatron", "--hf", str(hf), "--out", str(there), "--tensor", tensor_ranks)
        result[f"hf_to_megatron_tensor_{tensor_ranks}"] = step
        if family == "internvl2":
            result["megatron_to_hf"] = measured(*tool, "megatron-to-hf", "--checkpoint", str(there), "--out", str(back))
            result["equal_tensors"] = assert_same(hf, back)
            result["open_and_forward_bfloat16"] = measured(__file__, "--forward", str(there))
    finally:
        for folder in (hf, there, back):
            shutil.rmtree(folder, ignore_errors=True)
    for name, step in result.items():
        if name.endswith("hf") or name.startswith("hf"):
            assert step["peak_bytes"] <= result["limit_bytes"], (family, name, step)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"), help="where the weights are written")
    parser.add_argument("--only", choices=list(LIMITS), action="append", help="one family instead of both")
    parser.add_argument("--output", help="directory of the result (default: benchmarks/results)")
    parser.add_argument("--forward", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_random(options.only[0], options.make)
        return
    if options.forward:
        forward(options.forward)
        return
    for family in options.only or LIMITS:
        result = {"environment": environment(), **bench(family, options.work)}
        print(write_result(f"conversion_{family}", result, options.output))


if __name__ == "__main__":
    main()
