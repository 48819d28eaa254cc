"""The decode step's kernels for the CPU: ``native.c``, compiled once by the machine's own C compiler.

As Triton compiles its kernels when they are first called, so does this; without a compiler, or where it fails, the
plain definitions run. What was compiled lies in the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``), under a name
made of the source, the compiler and the processor, and is loaded from there only where nobody else could have written
it; a home that cannot be used costs a compilation, one second, in each process.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("native.c")
OPTIONS = ["-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
_SECONDS = 120
"""Longest that a compiler may take."""
_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
ARGUMENTS = {
    "add_rms_norm": [*[_P] * 4, *[_I] * 2, _F],
    "swiglu": [_P, _P, _I, _I],
    "rotate_and_store": [*[_P] * 9, *[_I] * 6],
    "decode_attention": [*[_P] * 9, _I, _P, *[_I] * 5, _F],
    "draw_rows": [*[_P] * 6, *[_I] * 4, _P, _P],
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be made here. Asked once in a process."""
    try:
        return _made()
    except (OSError, subprocess.SubprocessError) as error:
        logging.getLogger(__name__).info("the decode step runs in plain PyTorch: no kernels for the CPU (%s)", error)
        return None


def load(path: Path) -> ctypes.CDLL:
    """The library in a file, its functions declared. Raises OSError."""
    found = ctypes.CDLL(str(path))
    for name, types in ARGUMENTS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, None
    return found


def compile_to(path: Path, compiler: str) -> None:
    """Compile the kernels into a file, which is there whole or not at all.

    Raises:
        OSError, subprocess.SubprocessError: it did not work.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        command = [compiler, *OPTIONS, str(SOURCE), "-o", name, "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
        os.chmod(name, 0o700)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _made() -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("there is no C compiler")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mstar_mega"
    try:
        return _kept(folder, compiler)
    except OSError:  # a home that cannot be written to, or that others can
        with tempfile.TemporaryDirectory() as own:
            compile_to(Path(own) / "native.so", compiler)
            return load(Path(own) / "native.so")


def _kept(folder: Path, compiler: str) -> ctypes.CDLL:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"native-{_name(compiler)}.so"
    _must_be_ours(folder)
    if not path.exists():
        compile_to(path, compiler)
    _must_be_ours(path)
    return load(path)


def _name(compiler: str) -> str:
    """Of what the file's code depends on; a home may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    real = os.path.realpath(compiler)
    about = [*OPTIONS, SOURCE.read_text(encoding="utf-8"), real, str(os.stat(real).st_mtime_ns), platform.machine()]
    return hashlib.sha256("\0".join([*about, *processor]).encode()).hexdigest()[:24]


def _must_be_ours(path: Path) -> None:
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"others can write {path}")
