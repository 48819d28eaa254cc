"""From hidden rows to tokens: the last part of a step, in fixed places where the kernels run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mstar_mega.kernels import draw
from mstar_mega.kernels.dispatch import uses_triton
from mstar_mega.kernels.linear_head import linear_logits
from mstar_mega.kernels.noise import counters, mix
from mstar_mega.kernels.sampling import allowed_ids, conclude, draw_rows, narrowed
from mstar_mega.models.decoder import at_least
from mstar_mega.models.inference import from_last_stage
from mstar_mega.models.lmm import LMM
from mstar_mega.platform.devices import to_device


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn, besides each sample's temperature."""

    top_k: int
    top_p: float
    banned: list[int]
    seed: int


class Drawer:
    """Draws tokens for up to ``rows`` rows and moves their slots' state on."""

    def __init__(self, model: LMM, slots: draw.Slots, how: Drawing, rows: int, device: torch.device) -> None:
        self.model, self.slots, self.how = model, slots, how
        self.temperature: float | None = None
        """The one of all rows, where the host knows it; plain PyTorch is quicker then."""
        ranks = model.tensor_group.size()
        self._group = model.tensor_group if ranks > 1 else None
        self._local = model.size.padded_vocab // ranks
        self._start = model.tensor_group.rank() * self._local
        self._valid = max(0, min(self._local, model.size.vocab - self._start))
        banned = to_device(how.banned, device)
        self._allowed = allowed_ids(banned, self._start, self._local, device)
        self._seed = to_device([how.seed], device)
        self._fed, self._counter = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self._hot = torch.ones(rows, dtype=torch.float64, device=device)
        self.drawn = torch.zeros(4 * rows, dtype=torch.float64, device=device)
        """What the newest draw left: of B rows the first 2 B numbers are tokens and log-probabilities."""
        self.fused = uses_triton("sampling", self.drawn)
        if self.fused and model.post_process:
            self._logits = torch.empty(rows, self._local, device=device)
            self._scratch = draw.Scratch.of(rows, self._local, device)
            self._everyone = torch.empty(ranks * rows * 5, dtype=torch.float64, device=device)

    def begin(self, rows: Tensor) -> Tensor:
        """The newest token of each row's slot, int64 [B]; what the draw needs of the slots is noted."""
        slots, B = self.slots, rows.numel()
        if self.fused:
            draw.begin(rows, slots, self._seed, self._fed[:B], self._counter[:B], self._hot[:B])
            return self._fed[:B]
        torch.index_select(slots.temperature, 0, rows, out=self._hot[:B])
        self._counter[:B] = mix(
            counters(slots.key.index_select(0, rows), slots.length.index_select(0, rows)) + self._seed
        )
        return torch.index_select(slots.token, 0, rows, out=self._fed[:B])

    def draw(self, rows: Tensor, hidden: Tensor | None) -> Tensor:
        """Draw each row's next token from hidden rows [B, hidden], which the last stage has, after :meth:`begin`.

        Returns:
            float64 [2, B], which the next draw writes over: tokens and their log-probabilities; the slots' state is
            moved on.
        """
        B = rows.numel()
        drawn = self.drawn[: 4 * B].view(4, B)
        if hidden is not None and self.fused:
            self._kernels(hidden, drawn)
        elif hidden is not None:
            self._plain(hidden, drawn)
        drawn = from_last_stage(drawn[:2])
        if self.fused:
            draw.advance(rows, drawn, self.slots)
        else:
            self.slots.token[rows] = drawn[0].long()
            self.slots.length[rows] += 1
        return drawn

    def _kernels(self, hidden: Tensor, drawn: Tensor) -> None:
        how, B = self.how, hidden.size(0)
        logits = self._logits[:B]
        linear_logits(hidden, self.model.language.output_layer.weight, out=logits)
        split = draw.split_of(B, self._local)
        hot = self._hot[:B]
        floor, ties = narrowed(logits, hot, how.top_k, how.top_p, self._allowed, self._valid, split, self._group)
        packed = draw.candidates(
            logits, hot, self._allowed, floor, ties, self._counter[:B], self._valid, self._start, split, self._scratch
        )  # fmt: skip
        draw.conclude(draw.gathered(packed, self._group, self._everyone), drawn)

    def _plain(self, hidden: Tensor, drawn: Tensor) -> None:
        how, B = self.how, hidden.size(0)
        logits = self.model.logits(at_least(hidden))[:B]
        hot = self._hot[:B] if self.temperature is None else self.temperature
        floor, ties = narrowed(logits, hot, how.top_k, how.top_p, self._allowed, self._valid, None, self._group)
        found = draw_rows(logits, hot, self._allowed, floor, ties, self._counter[:B], self._valid, self._start)
        drawn.copy_(conclude(found, self._group))
