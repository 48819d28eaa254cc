"""Attention of a decode step: one new token of each running slot reads its prompt's keys, shared by the prompt's slots,
and its own, and no key more.

Prompts lie in a **slab** per layer: prompt g has keys and values [Hk, capacity, D] from token ``start`` on; own tokens
lie in rows [slots, Hk, limit, D]. Neither moves while a sample lives. What a step reads is said by lists
(:class:`Reading`) of fixed places in device memory, made when samples come or go and not from step to step.

    s_j = scale q.k_j over the prompt's and the own keys together;  o = sum_j softmax(s)_j v_j

In Triton there are two launches. The first computes the prompts' parts: a work item is (a run of one prompt's keys, up
to BM rows (slot, query head) that read it), and a fixed number of programs go through the list, however long. The
second computes each slot's own part over its own length and joins the parts by their log-sum-exps. Traffic: a prompt's
keys once per BM rows, each own key once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mstar_mega.kernels import attend
from mstar_mega.kernels.dispatch import native_for, uses_triton
from mstar_mega.kernels.language import INTERPRETED, cdiv, dot, jit, narrow, next_power_of_2, tl

PREFIX = {"BM": 64, "BN": 64}
PREFIX_OPTIONS = {"num_warps": 4, "num_stages": 3}
OWN = {"BM": 16, "BN": 64}
OWN_OPTIONS = {"num_warps": 4, "num_stages": 2}
PROGRAMS = 264
"""Two for each multiprocessor of an H100."""
LEAST_KEYS = 256
"""Keys of a work item: shorter runs cost more to join than they gain."""
FIELDS = 6
"""Numbers of a work item: first token in the slab, capacity, first and one past the last key, first member, members +
2^32 part."""


@jit
def _attend(  # type: ignore[no-untyped-def]
    q, K, V, begin, end, m, total, acc, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Add keys [begin, end) at K and V to the running maximum, sum and output of BM rows."""
    d = tl.arange(0, BD)
    for start in range(begin, end, BN):
        key = start + tl.arange(0, BN)
        mask = (key < end)[:, None] & (d < D)[None, :]
        k = tl.load(K + key[:, None] * D + d[None, :], mask=mask, other=0.0)
        v = tl.load(V + key[:, None] * D + d[None, :], mask=mask, other=0.0)
        s = dot(q, tl.trans(k), tl.zeros((BM, BN), tl.float32), INTERP) * scale
        s = tl.where((key < end)[None, :], s, -float("inf"))
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2((s - new[:, None]) * 1.4426950408889634)
        old = tl.exp2((m - new) * 1.4426950408889634)
        total = total * old + tl.sum(p, 1)
        acc = dot(narrow(p, V.dtype.element_ty, INTERP), v, acc * old[:, None], INTERP)
        m = new
    return m, total, acc


@jit(varying=("bucket",))
def decode_prefix_kernel(  # type: ignore[no-untyped-def]
    Q, K, V, WORK, NUMBER, MEMBERS, OUT, LSE, bucket, key_heads, rep, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """One program: work items (item, key head) program, program + programs, ... OUT [parts, B, Hq, D], LSE likewise."""
    number = (tl.load(NUMBER) * key_heads).to(tl.int32)
    heads = key_heads * rep
    d = tl.arange(0, BD)
    for work in range(tl.program_id(0), number, tl.num_programs(0)):
        item = WORK + (work // key_heads) * 6
        head = work % key_heads
        capacity = tl.load(item + 1)
        packed = tl.load(item + 5)
        row = tl.arange(0, BM)
        there = row < (packed & 0xFFFFFFFF) * rep
        b = tl.load(MEMBERS + tl.load(item + 4) + row // rep, mask=there, other=0).to(tl.int32)
        place = b * heads + head * rep + row % rep
        mask = there[:, None] & (d < D)[None, :]
        q = tl.load(Q + place[:, None] * D + d[None, :], mask=mask, other=0.0)
        base = (tl.load(item) * key_heads + head * capacity) * D
        m, total, acc = _attend(
            q, K + base, V + base, tl.load(item + 2).to(tl.int32), tl.load(item + 3).to(tl.int32),
            tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM, BD), tl.float32),
            scale, D, BD, BM, BN, INTERP,
        )  # fmt: skip
        part = (packed >> 32) * bucket * heads
        tl.store(LSE + part + place, m + tl.log(total), mask=there)
        tl.store(OUT + (part * D + place[:, None] * D + d[None, :]), acc / total[:, None], mask=mask)


@jit(varying=("bucket", "limit"))
def decode_own_kernel(  # type: ignore[no-untyped-def]
    Q, K, V, ROWS, LENGTH, PARTS, PART, LSE, OUT, bucket, limit, key_heads, rep, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """One program: one row and key head; its own keys, then the parts of its prompt."""
    b = tl.program_id(0) // key_heads
    head = tl.program_id(0) % key_heads
    heads = key_heads * rep
    slot = tl.load(ROWS + b)
    length = tl.load(LENGTH + slot).to(tl.int32)
    parts = tl.load(PARTS + b).to(tl.int32)
    d = tl.arange(0, BD)
    row = tl.arange(0, BM)
    place = b * heads + head * rep + row
    mask = (row < rep)[:, None] & (d < D)[None, :]
    q = tl.load(Q + place[:, None] * D + d[None, :], mask=mask, other=0.0)
    base = (slot * key_heads + head) * limit * D
    m, total, acc = _attend(
        q, K + base, V + base, 0, length,
        tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM, BD), tl.float32),
        scale, D, BD, BM, BN, INTERP,
    )  # fmt: skip
    for part in range(0, parts):
        at = tl.cast(part, tl.int64) * bucket * heads
        lse = tl.load(LSE + at + place, mask=row < rep, other=0.0)
        new = tl.maximum(m, lse)
        old = tl.exp2((m - new) * 1.4426950408889634)
        share = tl.exp2((lse - new) * 1.4426950408889634)
        o = tl.load(PART + (at * D + place[:, None] * D + d[None, :]), mask=mask, other=0.0)
        acc = acc * old[:, None] + share[:, None] * o
        total = total * old + share
        m = new
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(OUT + place[:, None] * D + d[None, :], narrow(acc, OUT.dtype.element_ty, INTERP), mask=mask)


@dataclass
class Reading:
    """What the running slots read in a step; tensors of fixed places that the host fills when samples come or go."""

    rows: Tensor
    """int64 [B]: the slot of each row; for a row that is none, the number of slots."""
    length: Tensor
    """int64 [slots + 1]: own tokens of each slot, the new one included; 0 in the last place."""
    members: Tensor
    """int64 [B]: rows, those of one prompt side by side."""
    parts: Tensor
    """int64 [B]: how many parts each row's prompt is computed in."""
    work: Tensor
    """int64 [items, FIELDS]."""
    number: Tensor
    """int64 [1]: items in ``work``."""


@dataclass
class PlainReading:
    """The same for plain PyTorch, which pads. Groups are the slab's prompts; all have one capacity."""

    table: Tensor
    """int64 [G, c]: the rows of each group, padded with any."""
    place: Tensor
    """int64 [B]: where each row stands in the flattened table."""
    prompts: slice | Tensor
    """The groups' prompts, in the slab seen as [prompts, Hk, capacity, D]."""
    capacity: int
    """Tokens of the slab that each prompt has."""
    prefix_bias: Tensor
    """float32 [G, P]: 0 or minus infinity."""
    slots: slice | Tensor
    """The slots whose own tokens are read, rows' slots among them."""
    among: Tensor | None
    """int64 [B]: each row's place among ``slots``; None: in order."""
    own_bias: Tensor
    """float32 [B, L]: 0 or minus infinity; L: longest own part."""


def work_items(prompts: Sequence[tuple[int, int, int]], members: Sequence[int], rep: int, heads: int, parts: int) -> (
    tuple[list[list[int]], list[int]]
):  # fmt: skip
    """Cut prompts into work items.

    Args:
        prompts: of each prompt (first token in the slab, capacity, length).
        members: how many rows read each.
        rep: query heads of a key head.
        heads: key heads.
        parts: most parts of a prompt.

    Returns:
        The items, FIELDS numbers each, and the number of parts of each prompt.
    """
    tile = max(1, PREFIX["BM"] // rep)
    tiles = sum(cdiv(count, tile) for count in members)
    # Few rows still fill the device, twice over: items are of unlike length.
    wanted = min(parts, cdiv(2 * PROGRAMS, max(1, tiles * heads)))
    items: list[list[int]] = []
    cuts: list[int] = []
    first = 0
    for (start, capacity, length), count in zip(prompts, members, strict=True):
        span = cdiv(cdiv(length, max(1, min(wanted, cdiv(length, LEAST_KEYS)))), PREFIX["BN"]) * PREFIX["BN"]
        cuts.append(cdiv(length, span))
        for row in range(0, count, tile):
            rows = min(tile, count - row)
            for part in range(cuts[-1]):
                end = min(length, (part + 1) * span)
                items.append([start, capacity, part * span, end, first + row, rows + (part << 32)])
        first += count
    return items, cuts


def fits(q: Tensor) -> bool:
    """Whether the kernels take these queries [B, Hq, D]."""
    return (uses_triton("decode", q) and attend.fits(q)) or native(q)


def native(q: Tensor) -> bool:
    """Whether they are those of ``native.c``, which read a prompt in one part and know no rows that are none."""
    return native_for("decode", q) is not None


def decode_attention(
    q: Tensor, k_slab: Tensor, v_slab: Tensor, k_own: Tensor, v_own: Tensor, reading: Reading, scale: float,
    parts: Tensor, lse: Tensor, out: Tensor,
) -> Tensor:  # fmt: skip
    """One new token per row against its prompt and its own tokens, by the kernels; plain: :func:`decode_reference`.

    Args:
        q: [B, Hq, D].
        k_slab, v_slab: [tokens * Hk * D], see the module's text.
        k_own, v_own: [slots, Hk, limit, D].
        parts, lse: float32 scratch of [parts, B, Hq, D] and [parts, B, Hq] numbers.

    Returns:
        [B, Hq, D], in ``out``.
    """
    B, Hq, D = q.shape
    _, Hk, limit, _ = k_own.shape
    rep = Hq // Hk
    if (lib := native_for("decode", q)) is not None:
        places = (
            q, k_slab, v_slab, k_own, v_own, reading.rows, reading.length, reading.members, reading.work
        )  # fmt: skip
        lib.decode_attention(
            *(place.data_ptr() for place in places), int(reading.number), out.data_ptr(), PREFIX["BM"] + rep, limit,
            Hk, rep, D, scale,
        )  # fmt: skip
        return out
    shared = {"D": D, "BD": max(16, next_power_of_2(D)), "INTERP": INTERPRETED}
    decode_prefix_kernel[(PROGRAMS if not INTERPRETED else 2,)](
        q, k_slab, v_slab, reading.work, reading.number, reading.members, parts, lse, B, Hk, rep, scale,
        **shared, **PREFIX, **PREFIX_OPTIONS,
    )  # fmt: skip
    decode_own_kernel[(B * Hk,)](
        q, k_own, v_own, reading.rows, reading.length, reading.parts, parts, lse, out, B, limit, Hk, rep, scale,
        **shared, **{**OWN, "BM": max(OWN["BM"], next_power_of_2(rep))}, **OWN_OPTIONS,
    )  # fmt: skip
    return out


def decode_reference(
    q: Tensor, k_prefix: Tensor, v_prefix: Tensor, k_own: Tensor, v_own: Tensor, reading: PlainReading, scale: float
) -> Tensor:
    """The definition.

    Args:
        q: [B, Hq, D].
        k_prefix, v_prefix: [prompts, Hk, capacity, D].
        k_own, v_own: [slots, Hk, limit, D].

    Returns:
        [B, Hq, D].
    """
    B, Hq, D = q.shape
    G, c = reading.table.shape
    Hk = k_own.size(1)
    rep, P, L = Hq // Hk, reading.prefix_bias.size(1), reading.own_bias.size(1)
    slots = reading.table.flatten()
    k_prefix, v_prefix = (x[reading.prompts][:, :, :P] for x in (k_prefix, v_prefix))
    k_own, v_own = (x[reading.slots, :, :L] for x in (k_own, v_own))

    def to_table(x: Tensor) -> Tensor:
        """[B, Hk, rep, X] -> [G, Hk, c, rep, X]."""
        return x.index_select(0, slots).view(G, c, Hk, rep, -1).transpose(1, 2)

    def from_table(x: Tensor) -> Tensor:
        """[G, Hk, c, rep, X] -> [B, Hk, rep, X]."""
        return x.transpose(1, 2).reshape(G * c, Hk, rep, -1).index_select(0, reading.place)

    def to_slots(x: Tensor) -> Tensor:
        """[B, ...] -> [slots that are read, ...], zeros where a slot is no row's."""
        return x if reading.among is None else x.new_zeros(k_own.size(0), *x.shape[1:]).index_copy_(0, reading.among, x)

    def of_rows(x: Tensor) -> Tensor:
        return x if reading.among is None else x.index_select(0, reading.among)

    # Scores are normalised where the table groups them: own parts and outputs move, the longer prefix parts do not.
    q = (q * scale).view(B, Hk, rep, D)
    rows = to_table(q).reshape(G, Hk, c * rep, D)
    s_prefix = torch.matmul(rows, k_prefix.transpose(-1, -2)).view(G, Hk, c, rep, P)
    s_own = of_rows(torch.matmul(to_slots(q), k_own.transpose(-1, -2))) + reading.own_bias[:, None, None, :]
    scores = torch.empty(G, Hk, c, rep, P + L, device=q.device)
    torch.add(s_prefix, reading.prefix_bias[:, None, None, None, :], out=scores[..., :P])
    scores[..., P:] = to_table(s_own)
    weights = scores.softmax(dim=-1).to(q.dtype)
    out = from_table(torch.matmul(weights[..., :P].reshape(G, Hk, c * rep, P), v_prefix).view(G, Hk, c, rep, D))
    out += of_rows(torch.matmul(to_slots(from_table(weights[..., P:])), v_own))
    return out.view(B, Hq, D)
