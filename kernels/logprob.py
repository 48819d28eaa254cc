"""Log-probabilities of given tokens from vocabulary-sharded logits.

Formula: log p(y) = z_y / T - logsumexp_v(z_v / T). Each rank reduces its own slice to (logsumexp, target logit); one
all-gather of two floats per row merges the ranks, so no [N, V] tensor crosses the network. The backward recomputes the
softmax from the saved logits and the merged logsumexp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather_into_tensor, get_world_size


class _VocabParallelLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        temperature: float,
        ignore_index: int,
        valid_vocab: int | None,
        vocab_start: int,
        group: ProcessGroup | None,
    ) -> Tensor:
        z = logits.float() / temperature
        local = z.size(-1)
        if valid_vocab is not None and vocab_start + local > valid_vocab:
            z[..., max(0, valid_vocab - vocab_start) :] = float("-inf")
        column = target - vocab_start
        here = (column >= 0) & (column < local) & (target != ignore_index)
        column = column.clamp(0, max(local - 1, 0))
        lse = torch.logsumexp(z, dim=-1)
        target_logit = torch.where(here, z.gather(-1, column[..., None]).squeeze(-1), 0.0)
        if group is not None and get_world_size(group) > 1:
            packed = torch.stack([lse, target_logit], dim=-1)
            size = get_world_size(group)
            everyone = packed.new_empty(size * packed.size(0), *packed.shape[1:])
            all_gather_into_tensor(everyone, packed, group=group)
            everyone = everyone.view(size, *packed.shape)
            lse = torch.logsumexp(everyone[..., 0], dim=0)
            target_logit = everyone[..., 1].sum(dim=0)
        counted = target != ignore_index
        ctx.save_for_backward(logits, lse, column, here, counted)
        ctx.constants = (temperature, valid_vocab, vocab_start)
        return torch.where(counted, target_logit - lse, 0.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse, column, here, counted = ctx.saved_tensors
        temperature, valid_vocab, vocab_start = ctx.constants
        scale = torch.where(counted, grad_outputs[0].float() / temperature, 0.0)[..., None]
        grad = torch.exp(logits.float() / temperature - lse[..., None]) * -scale
        if valid_vocab is not None and vocab_start + logits.size(-1) > valid_vocab:
            grad[..., max(0, valid_vocab - vocab_start) :] = 0.0
        grad.scatter_add_(-1, column[..., None], scale * here[..., None])
        return grad.to(logits.dtype), None, None, None, None, None, None


def vocab_parallel_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    vocab_start: int = 0,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Log-probabilities, float32 [...], of ``target`` under softmax(logits / temperature).

    Args:
        logits: [..., V_local] of any float dtype: this rank's slice of the vocabulary. Differentiable.
        target: int64 [...] global ids; ``ignore_index`` gives 0 and no gradient.
        valid_vocab: ids at or above it (padding rows) do not exist.
        vocab_start: global id of this rank's first column.
        group: tensor-parallel group; None where the vocabulary is whole.
    """
    return _VocabParallelLogProb.apply(logits, target, temperature, ignore_index, valid_vocab, vocab_start, group)


def target_logprob_reference(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Plain definition on whole logits [..., V], for tests."""
    return torch.log_softmax(logits / temperature, dim=-1).gather(-1, target[..., None]).squeeze(-1)
