"""Attention in parts, in Triton: every part says (output, log-sum-exp), and :func:`merge_kernel` joins them.

A part is a batch of key blocks; for query row q, keys k_j, values v_j and bias b_j in {0, -inf}:

    s_j = scale q.k_j + b_j     lse = logsumexp_j s_j     o = sum_j exp(s_j - lse) v_j
    joined over parts p:  LSE = logsumexp_p lse_p,  O = sum_p exp(lse_p - LSE) o_p

Backward of every part with the joined LSE and delta = dO . O (no gradient of the log-sum-exp is needed):

    p_j = exp(s_j - LSE)   ds_j = p_j (dO.v_j - delta)   dq = scale sum_j ds_j k_j   dk_j = scale ds_j q   dv_j = p_j dO

Query tokens lie in [T, Hq, D]; batch b of a part owns a run of ``tokens`` tokens, or those a table names. Rows of a
program are (token, query head of the same key head), so that a shared prefix is read once for all of them: with n
samples of R tokens, prefix traffic falls n-fold. Operations: 4 M N D forward, 10 M N D backward, per part and head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mstar_mega.kernels.language import INTERPRETED, cdiv, dot, jit, narrow, next_power_of_2, tl

FORWARD = {"BM": 64, "BN": 64}
FEW_ROWS = {"BM": 16, "BN": 128}
FORWARD_OPTIONS = {"num_warps": 4, "num_stages": 3}
BACKWARD = {"BM": 64, "BN": 64}
DQ_OPTIONS = {"num_warps": 4, "num_stages": 2}
DKV_OPTIONS = {"num_warps": 8, "num_stages": 2}
"""Two accumulators: with 4 warps they spill hundreds of bytes."""
MERGE_ROWS = 8
_PROGRAMS = 264
_MIN_KEYS = 256
"""Keys of a split: shorter ones cost more to merge than they gain."""
MAX_CHANNELS = 128
"""With 256 the tiles need more shared memory than an H100 has, or spill hundreds of bytes."""
_MAX_ELEMENTS = 2**31
"""Offsets into the queries have 32 bits: 64 would take twice the registers of the tile they address."""


@jit
def _rows(batch, head, first, tokens, rep, BM: tl.constexpr):  # type: ignore[no-untyped-def]
    """(token, query head, is there) of a program's rows."""
    row = first + tl.arange(0, BM)
    return batch * tokens + row // rep, head * rep + row % rep, row < tokens * rep


@jit
def _scores(  # type: ignore[no-untyped-def]
    q, k, BIAS, batch, row, key, keys, inner, stride_g, stride_n, stride_r, rep, scale, there,
    BM: tl.constexpr, BN: tl.constexpr, ROW_BIAS: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """scale q k^T + bias, minus infinity past the last key; float32 [BM, BN]."""
    s = dot(q, tl.trans(k), tl.zeros((BM, BN), tl.float32), INTERP) * scale
    bias = BIAS + (batch // inner) * stride_g + (batch % inner) * stride_n
    if ROW_BIAS:
        at = bias + (row // rep)[:, None] * stride_r + key[None, :]
        b = tl.load(at, mask=there[:, None] & (key < keys)[None, :], other=-float("inf"))
        return s + b
    else:
        b = tl.load(bias + key, mask=key < keys, other=-float("inf"))
        return s + b[None, :]


@jit(varying=("tokens", "keys", "query_tokens", "first_part", "inner", "stride_g", "stride_n"))
def attend_kernel(  # type: ignore[no-untyped-def]
    Q, K, V, BIAS, OUT, LSE, tokens, keys, key_heads, rep, scale, span, query_tokens, first_part,
    k_b, k_h, k_n, v_b, v_h, v_n, inner, stride_g, stride_n, stride_r,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ROW_BIAS: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """One program: BM rows of one batch and key head against keys [split * span, ...). OUT [parts, T, Hq, D]."""
    blocks = tl.cdiv(tokens * rep, BM)
    first = tl.program_id(0) % blocks * BM
    batch = (tl.program_id(0) // blocks // key_heads).to(tl.int64)
    head = tl.program_id(0) // blocks % key_heads
    split = tl.program_id(1)
    token, query_head, there = _rows(batch.to(tl.int32), head, first, tokens, rep, BM)
    row = first + tl.arange(0, BM)
    d = tl.arange(0, BD)
    heads = key_heads * rep
    at = (token * heads + query_head)[:, None] * D + d[None, :]
    q = tl.load(Q + at, mask=there[:, None] & (d < D)[None, :], other=0.0)
    m = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    begin = split * span
    end = tl.minimum(begin + span, keys)
    for start in range(begin, end, BN):
        key = start + tl.arange(0, BN)
        mask = (key < end)[:, None] & (d < D)[None, :]
        k = tl.load(K + (batch * k_b + head.to(tl.int64) * k_h) + key[:, None] * k_n + d[None, :], mask=mask, other=0.0)
        v = tl.load(V + (batch * v_b + head.to(tl.int64) * v_h) + key[:, None] * v_n + d[None, :], mask=mask, other=0.0)
        s = _scores(
            q, k, BIAS, batch, row, key, end, inner, stride_g, stride_n, stride_r, rep, scale, there,
            BM, BN, ROW_BIAS, INTERP,
        )  # fmt: skip
        new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp2((s - base[:, None]) * 1.4426950408889634)
        old = tl.exp2((m - base) * 1.4426950408889634)
        total = total * old + tl.sum(p, 1)
        acc = dot(narrow(p, V.dtype.element_ty, INTERP), v, acc * old[:, None], INTERP)
        m = new
    lse = tl.where(total == 0.0, -float("inf"), m + tl.log(total))
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    part = (first_part + split).to(tl.int64) * query_tokens * heads
    tl.store(LSE + part + token * heads + query_head, lse, mask=there)
    tl.store(OUT + part * D + at, acc, mask=there[:, None] & (d < D)[None, :])


@jit(varying=("rows", "parts"))
def merge_kernel(  # type: ignore[no-untyped-def]
    PARTS, LSES, OUT, LSE, rows, parts,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """One program: BR (token, head) rows; PARTS float32 [parts, rows, D] -> OUT [rows, D], LSE [rows]."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    there = row < rows
    d = tl.arange(0, BD)
    mask = there[:, None] & (d < D)[None, :]
    high = tl.full((BR,), -float("inf"), tl.float32)
    for part in range(0, parts):
        high = tl.maximum(high, tl.load(LSES + part * rows + row, mask=there, other=-float("inf")))
    base = tl.where(high == -float("inf"), 0.0, high)
    total = tl.zeros((BR,), tl.float32)
    acc = tl.zeros((BR, BD), tl.float32)
    for part in range(0, parts):
        place = tl.cast(part, tl.int64) * rows + row
        share = tl.exp2((tl.load(LSES + place, mask=there, other=-float("inf")) - base) * 1.4426950408889634)
        total += share
        acc += share[:, None] * tl.load(PARTS + place[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(LSE + row, base + tl.log(total), mask=there)
    tl.store(OUT + row[:, None] * D + d[None, :], narrow(acc / total[:, None], OUT.dtype.element_ty, INTERP), mask=mask)


@jit(varying=("tokens", "keys", "inner"))
def attend_dq_kernel(  # type: ignore[no-untyped-def]
    Q, K, V, BIAS, DO, LSE, DELTA, DQ, tokens, keys, key_heads, rep, scale,
    k_b, k_h, k_n, v_b, v_h, v_n, inner, stride_g, stride_n, stride_r,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ROW_BIAS: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BM query rows, float32, from one part."""
    blocks = tl.cdiv(tokens * rep, BM)
    first = tl.program_id(0) % blocks * BM
    batch = (tl.program_id(0) // blocks // key_heads).to(tl.int64)
    head = tl.program_id(0) // blocks % key_heads
    token, query_head, there = _rows(batch.to(tl.int32), head, first, tokens, rep, BM)
    row = first + tl.arange(0, BM)
    d = tl.arange(0, BD)
    place = token * key_heads * rep + query_head
    at = place[:, None] * D + d[None, :]
    inside = there[:, None] & (d < D)[None, :]
    q = tl.load(Q + at, mask=inside, other=0.0)
    do = tl.load(DO + at, mask=inside, other=0.0)
    lse = tl.load(LSE + place, mask=there, other=0.0)
    delta = tl.load(DELTA + place, mask=there, other=0.0)
    dq = tl.zeros((BM, BD), tl.float32)
    for start in range(0, keys, BN):
        key = start + tl.arange(0, BN)
        mask = (key < keys)[:, None] & (d < D)[None, :]
        k = tl.load(K + (batch * k_b + head.to(tl.int64) * k_h) + key[:, None] * k_n + d[None, :], mask=mask, other=0.0)
        v = tl.load(V + (batch * v_b + head.to(tl.int64) * v_h) + key[:, None] * v_n + d[None, :], mask=mask, other=0.0)
        s = _scores(
            q, k, BIAS, batch, row, key, keys, inner, stride_g, stride_n, stride_r, rep, scale, there,
            BM, BN, ROW_BIAS, INTERP,
        )  # fmt: skip
        p = tl.exp2((s - lse[:, None]) * 1.4426950408889634)
        dp = dot(do, tl.trans(v), tl.zeros((BM, BN), tl.float32), INTERP)
        ds = p * (dp - delta[:, None])
        dq = dot(narrow(ds, K.dtype.element_ty, INTERP), k, dq, INTERP)
    tl.store(DQ + at, dq * scale, mask=inside)


@jit(varying=("tokens", "keys", "inner"))
def attend_dkv_kernel(  # type: ignore[no-untyped-def]
    Q, K, V, BIAS, DO, LSE, DELTA, DK, DV, tokens, keys, key_heads, rep, scale,
    k_b, k_h, k_n, v_b, v_h, v_n, inner, stride_g, stride_n, stride_r,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ROW_BIAS: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of BN keys and values over all rows that read them; DK, DV contiguous."""
    blocks = tl.cdiv(keys, BN)
    start = tl.program_id(0) % blocks * BN
    batch = (tl.program_id(0) // blocks // key_heads).to(tl.int64)
    head = tl.program_id(0) // blocks % key_heads
    key = start + tl.arange(0, BN)
    d = tl.arange(0, BD)
    mask = (key < keys)[:, None] & (d < D)[None, :]
    k = tl.load(K + (batch * k_b + head.to(tl.int64) * k_h) + key[:, None] * k_n + d[None, :], mask=mask, other=0.0)
    v = tl.load(V + (batch * v_b + head.to(tl.int64) * v_h) + key[:, None] * v_n + d[None, :], mask=mask, other=0.0)
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    for first in range(0, tokens * rep, BM):
        token, query_head, there = _rows(batch.to(tl.int32), head, first, tokens, rep, BM)
        row = first + tl.arange(0, BM)
        place = token * key_heads * rep + query_head
        at = place[:, None] * D + d[None, :]
        inside = there[:, None] & (d < D)[None, :]
        q = tl.load(Q + at, mask=inside, other=0.0)
        do = tl.load(DO + at, mask=inside, other=0.0)
        lse = tl.load(LSE + place, mask=there, other=0.0)
        delta = tl.load(DELTA + place, mask=there, other=0.0)
        s = _scores(
            q, k, BIAS, batch, row, key, keys, inner, stride_g, stride_n, stride_r, rep, scale, there,
            BM, BN, ROW_BIAS, INTERP,
        )  # fmt: skip
        p = tl.where(there[:, None], tl.exp2((s - lse[:, None]) * 1.4426950408889634), 0.0)
        dv = dot(tl.trans(narrow(p, DO.dtype.element_ty, INTERP)), do, dv, INTERP)
        dp = dot(do, tl.trans(v), tl.zeros((BM, BN), tl.float32), INTERP)
        ds = p * (dp - delta[:, None])
        dk = dot(tl.trans(narrow(ds, Q.dtype.element_ty, INTERP)), q, dk, INTERP)
    own = (batch * key_heads + head) * keys * D
    out = key[:, None] * D + d[None, :]
    tl.store(DK + own + out, narrow(dk * scale, DK.dtype.element_ty, INTERP), mask=mask)
    tl.store(DV + own + out, narrow(dv, DV.dtype.element_ty, INTERP), mask=mask)


@dataclass(frozen=True)
class Part:
    """Keys that a run of query tokens attends to: batch b's tokens are [b * tokens, (b + 1) * tokens)."""

    k: Tensor
    """[batches, Hk, keys, D], channels side by side."""
    v: Tensor
    bias: Tensor
    """float32 [outer, inner, tokens or 1, keys]: 0 or minus infinity; batch b is (b // inner, b % inner)."""
    tokens: int

    @property
    def splits(self) -> int:
        """Cuts of the keys, so that few rows still fill the device."""
        batches, key_heads, keys, _ = self.k.shape
        return max(1, min(cdiv(keys, _MIN_KEYS), _PROGRAMS // max(1, batches * key_heads)))

    def strides(self) -> tuple[int, ...]:
        """Of keys, values and bias, as the kernels take them."""
        rows = self.bias.size(2) > 1
        outer, inner, row = self.bias.stride()[:3]
        k, v = self.k.stride()[:3], self.v.stride()[:3]
        return (*k, *v, self.bias.size(1), outer, inner, row if rows else 0)


def fits(q: Tensor) -> bool:
    """Whether the kernels take these queries.

    Exact float32 products have no tensor cores: compiled they spill kilobytes, or need more shared memory than there
    is, and the products of the definition are faster. The interpreter takes them, to show that the formulas are right.
    """
    if q.dtype == torch.float32 and not INTERPRETED:
        return False
    return q.size(-1) <= MAX_CHANNELS and q.numel() < _MAX_ELEMENTS


def forward(q: Tensor, parts: list[Part], scale: float) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], contiguous -> output [T, Hq, D], joined log-sum-exp float32 [T, Hq]."""
    T, Hq, D = q.shape
    splits = [part.splits for part in parts]
    outputs = torch.empty(sum(splits), T, Hq, D, device=q.device, dtype=torch.float32)
    lses = torch.empty(sum(splits), T, Hq, device=q.device, dtype=torch.float32)
    done = 0
    for part, cuts in zip(parts, splits, strict=True):
        batches, key_heads, keys, _ = part.k.shape
        rep = Hq // key_heads
        tile = FEW_ROWS if part.tokens * rep <= FEW_ROWS["BM"] else FORWARD
        span = cdiv(cdiv(keys, cuts), tile["BN"]) * tile["BN"]
        # All but the first dimension of a grid end at 65,535.
        attend_kernel[(cdiv(part.tokens * rep, tile["BM"]) * batches * key_heads, cuts)](
            q, part.k, part.v, part.bias, outputs, lses, part.tokens, keys, key_heads, rep, scale, span, T, done,
            *part.strides(), D=D, BD=max(16, next_power_of_2(D)), **tile, ROW_BIAS=part.bias.size(2) > 1,
            INTERP=INTERPRETED, **FORWARD_OPTIONS,
        )  # fmt: skip
        done += cuts
    out = torch.empty_like(q)
    lse = torch.empty(T, Hq, device=q.device, dtype=torch.float32)
    merge_kernel[(cdiv(T * Hq, MERGE_ROWS),)](
        outputs, lses, out, lse, T * Hq, done, D=D, BD=next_power_of_2(D), BR=MERGE_ROWS, INTERP=INTERPRETED,
        num_warps=4,
    )  # fmt: skip
    return out, lse


def backward(
    q: Tensor, parts: list[Part], out: Tensor, lse: Tensor, dout: Tensor, scale: float
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """(dq, [(dk, dv) of each part])."""
    T, Hq, D = q.shape
    dout = dout.to(q.dtype).contiguous()
    delta = (dout.float() * out.float()).sum(-1)
    dq = torch.empty(len(parts), T, Hq, D, device=q.device, dtype=torch.float32)
    gradients = []
    for number, part in enumerate(parts):
        batches, key_heads, keys, _ = part.k.shape
        rep = Hq // key_heads
        dk, dv = (torch.empty(part.k.shape, device=q.device, dtype=part.k.dtype) for _ in range(2))
        shared = {
            "D": D, "BD": max(16, next_power_of_2(D)), **BACKWARD, "ROW_BIAS": part.bias.size(2) > 1,
            "INTERP": INTERPRETED,
        }  # fmt: skip
        sizes = (part.tokens, keys, key_heads, rep, scale, *part.strides())
        attend_dq_kernel[(cdiv(part.tokens * rep, BACKWARD["BM"]) * batches * key_heads,)](
            q, part.k, part.v, part.bias, dout, lse, delta, dq[number], *sizes, **shared, **DQ_OPTIONS
        )
        attend_dkv_kernel[(cdiv(keys, BACKWARD["BN"]) * batches * key_heads,)](
            q, part.k, part.v, part.bias, dout, lse, delta, dk, dv, *sizes, **shared, **DKV_OPTIONS
        )
        gradients.append((dk, dv))
    return dq.sum(0).to(q.dtype), gradients
