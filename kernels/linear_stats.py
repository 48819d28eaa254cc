"""Row statistics of ``hidden @ weight.T`` that never leave the chip: the forward of the fused linear log-probability.

One persistent Triton kernel with tensor descriptors (TMA): each program walks over 128 x 256 tiles in an order that
keeps a slab of the weight in the L2 cache, accumulates a tile of logits in float32 registers, and reduces it there to
(maximum, sum of exponentials, target logit) per row. Operations: 2 N H V. Traffic: the operands, and 8 bytes per row
and tile of 256 columns (33 MB at N = 8192, V = 128,256, where float32 logits have 4.2 GB). The target is picked before
the exponentials: the other order spills hundreds of bytes.

Between two tiles the tensor cores wait for the reduction, so what most tiles do not need is skipped there: the target
where no row has it in the tile, and the mask of columns that do not exist. Temperatures scale sums, not elements.
(``flatten=True`` would load the next tile meanwhile, but compiled with it each product waits for the one before.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from mstar_mega.kernels.language import INTERPRETED, cdiv, dot, jit, set_scratch, tl
from mstar_mega.kernels.row_stats import NEG_INF, RowStats, joined, merge_parts

TILE = {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8}
OPTIONS = {"num_warps": 8, "num_stages": 4}
"""Four tiles of both operands take 197 KB of shared memory; the registers leave room for one program anyway."""
_MAX_ROWS = 16_384
"""Rows of one launch: bounds the partial results, and keeps every offset below 2^31."""


@jit(varying=("N", "programs"))
def linear_stats_kernel(  # type: ignore[no-untyped-def]
    X, W, BIAS, COLUMN, MAX, SUM, WEIGHTED, TARGET, N, V, valid, stride_x, stride_w, inverse_temperature, programs,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, ENTROPY: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """X [N, K], W [V, K] -> MAX, SUM (, WEIGHTED) [ceil(valid / BN), N] and TARGET [N]; see ``row_stats``."""
    x_tiles = tl.make_tensor_descriptor(X, [N, K], [stride_x, 1], [BM, BK])
    w_tiles = tl.make_tensor_descriptor(W, [V, K], [stride_w, 1], [BN, BK])
    rows = tl.cdiv(N, BM)
    columns = tl.cdiv(valid, BN)
    log2_scale = inverse_temperature * 1.4426950408889634
    for tile in tl.range(tl.program_id(0), rows * columns, programs):
        group = tile // (GROUP * columns)
        first = group * GROUP
        height = tl.minimum(rows - first, GROUP)
        pm = first + (tile % (GROUP * columns)) % height
        pn = (tile % (GROUP * columns)) // height
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            acc = dot(x_tiles.load([pm * BM, k]), w_tiles.load([pn * BN, k]).T, acc, INTERP)
        row = pm * BM + tl.arange(0, BM)
        at = tl.arange(0, BN)
        here = valid - pn * BN
        if HAS_BIAS:
            acc += tl.load(BIAS + pn * BN + at, mask=at < here, other=0.0).to(tl.float32)[None, :]
        column = tl.load(COLUMN + row, mask=row < N, other=-1) - pn * BN
        inside = (column >= 0) & (column < BN) & (column < here)
        column = tl.where(inside, column, -1).to(tl.int32)  # 64 bits would double the comparisons
        if tl.max(inside.to(tl.int32), 0) > 0:
            target = tl.sum(tl.where(at[None, :] == column[:, None], acc, 0.0), 1)
            tl.store(TARGET + row, target, mask=inside)
        if here < BN:
            acc = tl.where(at[None, :] < here, acc, -float("inf"))
        m = tl.max(acc, 1)
        acc -= tl.where(m == -float("inf"), 0.0, m)[:, None]
        e = tl.exp2(acc * log2_scale)
        tl.store(MAX + pn * N + row, m, mask=row < N)
        tl.store(SUM + pn * N + row, tl.sum(e, 1), mask=row < N)
        if ENTROPY:
            weighted = tl.sum(tl.where(e == 0.0, 0.0, e * acc), 1) * inverse_temperature
            tl.store(WEIGHTED + pn * N + row, weighted, mask=row < N)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes these: low precision, and rows that tensor descriptors can address."""
    return x.dtype in (torch.bfloat16, torch.float16) and weight.dtype == x.dtype and x.size(1) % 8 == 0


def linear_stats(
    x: Tensor, weight: Tensor, bias: Tensor | None, column: Tensor, temperature: float, valid: int, entropy: bool
) -> RowStats:
    """Of the logits x weight^T + bias over the first ``valid`` columns, at temperature T.

    Args:
        x: [N, H], bfloat16 or float16 as ``weight`` [V, H]; H a multiple of 8.
        bias: [V] of any float dtype.
        column: int64 [N]: the target's column, outside [0, valid) for "not here".
    """
    x, weight = _addressable(x), _addressable(weight)
    parts = [_launch(x[i : i + _MAX_ROWS], weight, bias, column[i : i + _MAX_ROWS], temperature, valid, entropy)
             for i in range(0, x.size(0), _MAX_ROWS)]  # fmt: skip
    return joined(parts)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, column: Tensor, temperature: float, valid: int, entropy: bool
) -> RowStats:
    N, (V, K) = x.size(0), weight.shape
    target = torch.full((N,), NEG_INF, device=x.device)
    tiles = cdiv(valid, TILE["BN"])
    if not tiles:  # a slice of nothing but padding
        return RowStats(target, target, target, torch.zeros_like(target) if entropy else None)
    parts = torch.empty(2 + entropy, tiles, N, device=x.device)
    programs = min(tiles * cdiv(N, TILE["BM"]), multiprocessors(x.device))
    set_scratch(x.device)
    linear_stats_kernel[(programs,)](
        x, weight, x if bias is None else bias.contiguous(), column.contiguous(), parts[0], parts[1],
        parts[-1], target, N, V, valid, x.stride(0), weight.stride(0), 1.0 / temperature, programs,
        K=K, **TILE, HAS_BIAS=bias is not None, ENTROPY=entropy, INTERP=INTERPRETED, **OPTIONS,
    )  # fmt: skip
    return merge_parts(parts[0], parts[1], parts[2] if entropy else None, target, temperature, dim=0)


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _addressable(x: Tensor) -> Tensor:
    """Rows for a tensor descriptor: columns side by side, everything on 16 bytes."""
    fine = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if fine else x.clone(memory_format=torch.contiguous_format)
