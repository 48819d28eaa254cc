"""Compile every kernel for an H100, without having one: registers, spills, shared memory, matrix instructions.

    TRITON_INTERPRET=0 python -m mstar_mega.kernels.report [--out FILE] [--json]        (make kernel-report)

Triton brings ptxas and cuobjdump; neither needs a driver. Pointers and sizes that are multiples of 16 in production are
declared so, otherwise loads are not vectorised and the report would be about code that never runs. Triton does not
check shared memory against the device's limit: :func:`problems` does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mstar_mega.kernels import (
    attend,
    decode_attention,
    decode_layer,
    draw,
    linear_stats,
    norms,
    process_scores,
    row_stats,
    selection,
    top_p,
)
from mstar_mega.kernels.language import INTERPRETED, triton

SHARED_LIMIT = 232_448
"""Bytes of shared memory that one program may use on an H100."""
SPILL_LIMIT = 64
"""Bytes of registers spilled to memory per thread."""


@dataclass(frozen=True)
class Case:
    """A kernel at a production configuration."""

    name: str
    function: Any
    types: str
    """One type per argument that is not a constant, in order; a star before it is a pointer, ! after it a multiple of
    16 (pointers always are)."""
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    wgmma: bool = False
    """Products of matrices must become warpgroup instructions."""
    wide: bool = False
    """Its time is that of reading long rows: it must read 16 bytes at a time."""
    spill: int = SPILL_LIMIT


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case."""

    name: str
    kernel: str
    warps: int
    registers: int
    spill: int
    """Bytes per thread."""
    shared: int
    """Bytes per program."""
    wgmma: int
    waits: int
    """Waits for warpgroup instructions: with one after each of them the compiler has given up to overlap them."""
    mma: int
    """Matrix instructions of the older kind (HMMA)."""
    tma_loads: int
    wide_loads: int
    """Loads of 16 bytes a thread."""


def cases() -> Iterator[Case]:
    """Every kernel of this package, at the shapes of the three policies (hidden 2048, 3072 and 4096)."""
    yield from _log_prob_cases()
    yield from _row_cases()
    yield from _attention_cases()


def _log_prob_cases() -> Iterator[Case]:
    tile = {**linear_stats.TILE, "INTERP": False}
    linear = "*bf16 *bf16 *bf16 *i64 *fp32 *fp32 *fp32 *fp32 i32 i32! i32 i32! i32! fp32 i32"
    for width, bias, entropy in ((4096, False, False), (2048, False, True), (3072, True, False)):
        name = f"linear_logprob forward, H {width}{', bias' * bias}{', entropy' * entropy}"
        constants = {"K": width, "HAS_BIAS": bias, "ENTROPY": entropy, **tile}
        yield Case(name, linear_stats.linear_stats_kernel, linear, constants, linear_stats.OPTIONS, wgmma=True)
    warps = {"num_warps": row_stats.WARPS}
    for dtype, entropy, skip in (("bf16", False, True), ("fp32", True, False)):
        each = 8 if dtype == "bf16" else 4
        constants = {"BLOCK": row_stats.BLOCK, "EACH": each, "ENTROPY": entropy, "HAS_SKIP": skip}
        types = f"*{dtype} *i64 *i1 *fp32 *fp32 *fp32 *fp32 i32! i32 i32! fp32"
        yield Case(f"log-prob statistics, {dtype}", row_stats.row_stats_kernel, types, constants, warps, wide=True)
    for dtype, out, entropy in (("fp32", "bf16", False), ("bf16", "bf16", True)):
        constants = {"BLOCK": row_stats.BLOCK, "ENTROPY": entropy, "INTERP": False}
        types = f"*{dtype} *{out} *i64 *fp32 *fp32 *fp32 *fp32 *fp32 i32! i32! i32! i32 fp32"
        name = f"log-prob gradient, {dtype} to {out}"
        yield Case(name, row_stats.row_grad_kernel, types, constants, warps, wide=True)
    types = "*fp32 *u8 *fp32 *i64 *i64 *fp64 *fp32 *i64 *fp32 *fp32 i32! i32 i32! i32!"
    for name, ban, floored, ties in (
        ("no bans", False, False, False), ("ban", True, False, False), ("ban, top-k", True, True, False),
        ("ban, top-p", True, True, True),
    ):  # fmt: skip
        constants = {"BLOCK": draw.BLOCK, "BAN": ban, "FLOORED": floored, "TIES": ties}
        yield Case(f"sampling, {name}", draw.sample_kernel, types, constants, {"num_warps": draw.WARPS})
    constants = {"SPLITS": 64, "NARROWED": True}
    yield Case("draw, merge", draw.merge_kernel, "*fp32 *i64 *fp32 *fp32 *fp64 i32", constants, {"num_warps": 1})
    yield Case("draw, conclude", draw.conclude_kernel, "*fp64 *fp64 i32", {"RANKS": 8}, {"num_warps": 1})
    constants, types = {"BLOCK": draw.ROWS}, "*i64 *i64 *i64 *i64 *fp64 *i64 *i64 *i64 *fp64 i32"
    yield Case("draw, begin", draw.begin_kernel, types, constants, {"num_warps": 4})
    types = "*i64 *fp64 *i64 *i64 i32 i32"
    yield Case("draw, advance", draw.advance_kernel, types, constants, {"num_warps": 4})
    constants, warps = {"BLOCK": 8 * top_p.BLOCK, "BAN": True}, {"num_warps": top_p.WARPS}
    types = "*fp32 *u8 *fp32 i32! i32 i32!"
    yield Case("top-p, highest logit", top_p.top_p_highest_kernel, types, constants, warps)
    constants = {"BLOCK": top_p.BLOCK, "BAN": True, "TOP_K": True}
    types = "*fp32 *u8 *fp32 *fp32 *fp32 *i64 *i64 i32! i32 i32! i32"
    yield Case("top-p, sums by four bits", top_p.top_p_sums_kernel, types, constants, warps)
    types, constants = "*i64 *i64 *i64 *i64 i32", {"PARTS": top_p.PARTS}
    yield Case("top-p, choose four bits", top_p.top_p_descend_kernel, types, constants, {"num_warps": 4})


def _row_cases() -> Iterator[Case]:
    constants: dict[str, Any] = {"BLOCK": process_scores.BLOCK_H}
    types = "*bf16 *i64 *fp32 *fp32 i32! i32!"
    yield Case("step scores", process_scores.step_logits_kernel, types, constants, {"num_warps": 4})
    for how in process_scores.REDUCTIONS:
        constants = {"HOW": how, "BLOCK": process_scores.BLOCK_STEPS}
        function = process_scores.reduce_steps_kernel
        yield Case(f"reduce steps, {how}", function, "*fp64 *i64 *fp64", constants, {"num_warps": 1})
    types, constants = "*fp64 *u8 *i64 *i64 *i64 *i64 i32", {"BLOCK": selection.BLOCK}
    yield Case("select top-k", selection.select_topk_kernel, types, constants, {"num_warps": 1})
    constants = {"BLOCK": 4096, "ADD": True, "INTERP": False}
    options = {"num_warps": norms.warps_for(4096)}
    types = "*bf16 *bf16 *bf16 *bf16 i32! fp32"
    yield Case("decode, add and norm, H 4096", decode_layer.add_norm_kernel, types, constants, options, wide=True)
    constants, options = {"BLOCK": decode_layer.BLOCK, "INTERP": False}, {"num_warps": 4}
    yield Case("decode, SwiGLU", decode_layer.swiglu_kernel, "*bf16 *bf16 i32!", constants, options, wide=True)
    for name, width, centred in (("rms_norm", 4096, False), ("layer_norm", 1024, True)):
        constants = {"BLOCK": width, "CENTRED": centred, "INTERP": False}
        options = {"num_warps": norms.warps_for(width)}
        types = "*bf16 *bf16 *bf16 *bf16 *fp32 *fp32 i32! fp32"
        yield Case(f"{name} forward, H {width}", norms.norm_kernel, types, constants, options, wide=True)
        types = "*bf16 *bf16 *bf16 *fp32 *fp32 *bf16 *fp32 *fp32 i32 i32!"
        yield Case(f"{name} backward, H {width}", norms.norm_backward_kernel, types, constants, options, wide=True)


def _attention_cases() -> Iterator[Case]:
    sizes, strides = "i32 i32 i32 i32 fp32", "i32! i32! i32! i32! i32! i32! i32"
    head = {"D": 128, "BD": 128, "INTERP": False}
    types = f"*bf16 *bf16 *bf16 *fp32 *fp32 *fp32 {sizes} i32! i32 i32 {strides} i32 i32 i32!"
    function, options = attend.attend_kernel, attend.FORWARD_OPTIONS
    yield Case(
        "attention, training, own tokens", function, types, {**head, **attend.FORWARD, "ROW_BIAS": True}, options,
        wgmma=True,
    )  # fmt: skip
    types = "*bf16 *bf16 *bf16 *i64 *i64 *i64 *fp32 *fp32 i32 i32 i32 fp32"
    function, options = decode_attention.decode_prefix_kernel, decode_attention.PREFIX_OPTIONS
    yield Case("decode, prompts", function, types, {**head, **decode_attention.PREFIX}, options, wgmma=True)
    types = "*bf16 *bf16 *bf16 *i64 *i64 *i64 *fp32 *fp32 *bf16 i32 i32 i32 i32 fp32"
    function, options = decode_attention.decode_own_kernel, decode_attention.OWN_OPTIONS
    yield Case("decode, own tokens and join", function, types, {**head, **decode_attention.OWN}, options)
    types = "*bf16 *bf16 *bf16 *i64 *i64 *i64 *bf16 *bf16 *bf16 i32 i32 i32 i32"
    yield Case("decode, rotate and store", decode_layer.rotate_store_kernel, types, head, {"num_warps": 1})
    types = "*fp32 *fp32 *bf16 *fp32 i32 i32"
    constants = {**head, "BR": attend.MERGE_ROWS}
    yield Case("attention, merge", attend.merge_kernel, types, constants, {"num_warps": 4})
    constants = {**head, **attend.BACKWARD, "ROW_BIAS": True}
    types = f"*bf16 *bf16 *bf16 *fp32 *bf16 *fp32 *fp32 *fp32 {sizes} {strides} i32! i32! i32!"
    yield Case("attention, dq", attend.attend_dq_kernel, types, constants, attend.DQ_OPTIONS, wgmma=True)
    types = f"*bf16 *bf16 *bf16 *fp32 *bf16 *fp32 *fp32 *bf16 *bf16 {sizes} {strides} i32! i32! i32!"
    yield Case("attention, dk and dv", attend.attend_dkv_kernel, types, constants, attend.DKV_OPTIONS, wgmma=True)


def compile_case(case: Case) -> Compiled:
    """Compile for sm_90. Raises RuntimeError in a process whose kernels are interpreted."""
    if triton is None or INTERPRETED:
        raise RuntimeError("compiling needs triton, and a process without TRITON_INTERPRET=1")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.function.arg_names
    free = [name for name in names if name not in case.constants]
    types = case.types.split()
    assert len(free) == len(types), (case.name, free, types)
    signature = {name: "constexpr" for name in names} | {n: t.rstrip("!") for n, t in zip(free, types, strict=True)}
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, type_ in zip(free, types, strict=True)
        if type_.startswith("*") or type_.endswith("!")
    }
    source = ASTSource(case.function, signature, constexprs=case.constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(case.options))
    registers, stack, sass = _resources(kernel.asm["cubin"])
    return Compiled(
        name=case.name,
        kernel=case.function.__name__,
        warps=kernel.metadata.num_warps,
        registers=registers,
        spill=stack,
        shared=kernel.metadata.shared,
        wgmma=len(re.findall(r"\bHGMMA", sass)),
        waits=len(re.findall(r"\bWARPGROUP\.DEPBAR", sass)),
        mma=len(re.findall(r"\bHMMA", sass)),
        tma_loads=len(re.findall(r"\bUTMALDG", sass)),
        wide_loads=len(re.findall(r"\bLDG\.E\.128", sass)),
    )


def _resources(cubin: bytes) -> tuple[int, int, str]:
    """(registers, bytes of stack, assembly) of a kernel."""
    cuobjdump = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        use = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
        sass = subprocess.run([cuobjdump, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", use.stdout + use.stderr)
    assert found is not None, use.stdout + use.stderr
    return int(found[1]), int(found[2]), sass


def problems(case: Case, compiled: Compiled) -> list[str]:
    """What would keep a compiled case from running well on an H100; empty when all is as meant."""
    found = []
    if compiled.shared > SHARED_LIMIT:
        found.append(f"{case.name}: {compiled.shared} bytes of shared memory, at most {SHARED_LIMIT} can launch")
    if compiled.spill > case.spill:
        found.append(f"{case.name}: {compiled.spill} bytes spilled per thread, at most {case.spill} are accepted")
    if case.wgmma and not compiled.wgmma:
        found.append(f"{case.name}: no warpgroup matrix instruction, though it multiplies matrices")
    if compiled.wgmma and compiled.waits >= compiled.wgmma:
        found.append(f"{case.name}: {compiled.waits} waits for {compiled.wgmma} warpgroup instructions: one at a time")
    if case.wide and not compiled.wide_loads:
        found.append(f"{case.name}: no load of 16 bytes, though it reads long rows")
    return found


def table(results: list[Compiled]) -> str:
    """A Markdown page."""
    head = ["configuration", "kernel", "warps", "registers", "spilled bytes", "shared bytes"]
    head += ["wgmma", "waits for wgmma", "mma", "TMA loads", "16-byte loads"]
    rows = [[str(value) for value in asdict(result).values()] for result in results]
    lines = [" | ".join(row) for row in (head, ["---"] * 2 + ["---:"] * 9, *rows)]
    versions = f"torch {torch.__version__.partition('+')[0]}, triton {triton.__version__}"
    return "\n".join(
        [
            "# Kernels compiled for sm_90",
            "",
            f"Generated by `make kernel-report` with {versions}; no GPU is needed. Registers and spilled bytes are",
            f"per thread, shared memory is per program (an H100 has {SHARED_LIMIT:,} bytes), the last five columns",
            "count instructions of the machine code.",
            "",
            *(f"| {line} |" for line in lines),
            "",
        ]
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="write the table here (default: print it)")
    parser.add_argument("--json", action="store_true", help="print results and problems as JSON")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    pairs = [(case, compile_case(case)) for case in cases()]
    found = [problem for case, compiled in pairs for problem in problems(case, compiled)]
    if options.json:
        print(json.dumps({"compiled": [asdict(compiled) for _, compiled in pairs], "problems": found}))
        return
    text = table([compiled for _, compiled in pairs])
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text)
        print(f"written: {options.out}")
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
