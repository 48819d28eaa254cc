"""A policy in the InternVL2 architecture small enough that a test can afford many forward passes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mstar_mega.config import Config, ModelConfig, ParallelConfig, Recompute
from mstar_mega.models.build import build_model
from mstar_mega.models.families.internvl2 import InternVL2
from mstar_mega.models.initialization import canonical_name
from mstar_mega.models.lmm import LMM, Head, LanguageSize, VisionSize
from mstar_mega.models.packing import PackedBatch, Prompt
from mstar_mega.platform import distributed

IMAGE, PATCH = 32, 8
TOKENS_PER_TILE = (IMAGE // PATCH // 2) ** 2


def family() -> InternVL2:
    """The digits policy's tokenizer, template and images around much smaller modules.

    The weights are drawn wide: with the usual 0.02 attention is almost flat and mistakes in it almost invisible.
    """
    tiny = InternVL2("digits")
    tiny.vision = VisionSize(image_size=IMAGE, patch_size=PATCH, hidden=16, ffn=24, layers=2, heads=2)
    tiny.language = LanguageSize(
        hidden=32, ffn=48, layers=2, heads=4, kv_heads=2, head_dim=8, vocab=tiny.tokenizer.vocab_size,
        rope_theta=10_000.0, init_std=0.25,
    )  # fmt: skip
    tiny.tokens_per_tile = TOKENS_PER_TILE
    return tiny


def build(
    parallel: ParallelConfig | None = None,
    head: Head = "vocabulary",
    seed: int = 0,
    recompute: Recompute = "none",
    precision: Literal["float32", "bfloat16"] = "float32",
) -> tuple[LMM, InternVL2]:
    """Lay the ranks out and make this rank's stage of a fresh model."""
    parallel = parallel or ParallelConfig()
    distributed.initialize(parallel, seed)
    tiny = family()
    config = Config(seed=seed, parallel=parallel, model=ModelConfig(recompute=recompute, precision=precision))
    return build_model(config, tiny, head), tiny


def randomize(model: LMM, seed: int = 0) -> LMM:
    """Give biases, norms, layer scales and the score head values of their own, so that none can be forgotten."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter.device)
    return model


def prompt(seed: int, length: int, tiles: int = 0, vocab: int = 400) -> Prompt:
    """A prompt of random tokens and pixels; its image features stand from position 2 on."""
    generator = torch.Generator("cpu").manual_seed(seed)
    tokens = torch.randint(0, vocab, (length,), generator=generator, device="cpu").tolist()
    pixels = torch.randn(tiles, 3, IMAGE, IMAGE, generator=generator, device="cpu") if tiles else None
    return Prompt(tokens, list(range(2, 2 + tiles * TOKENS_PER_TILE)), pixels)


def tokens(seed: int, *lengths: int, vocab: int = 400) -> list[list[int]]:
    """Random responses of these lengths."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]


def hidden(model: LMM, batch: PackedBatch) -> Tensor:
    """[T, hidden] of a packed batch on a model that is not cut into stages."""
    model.set_input_tensor(None)
    return model(batch)


def gradients(model: LMM, loss: Tensor) -> dict[str, Tensor]:
    """The loss's gradient of every parameter, by name; zeros where it does not depend on one."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def shards(model: LMM) -> dict[str, tuple[int, Tensor]]:
    """This rank's weights by canonical name, each with the tensor rank it belongs to."""
    rank = distributed.layout().tensor_rank
    return {canonical_name(name, model): (rank, p.detach().clone()) for name, p in model.named_parameters()}


def whole_weights(ranks: Sequence[dict[str, tuple[int, Tensor]]], tensor: int) -> dict[str, Tensor]:
    """Put the ranks' :func:`shards` of one or more model copies together, by rules written here a second time.

    Copies of one shard (data parallel ranks) must be equal.
    """
    pieces: dict[str, dict[int, Tensor]] = {}
    for part in ranks:
        for name, (rank, piece) in part.items():
            known = pieces.setdefault(name, {}).setdefault(rank, piece)
            assert torch.equal(known, piece), f"{name} differs between copies"
    return {name: _join(name, [found[rank] for rank in range(tensor)]) for name, found in pieces.items()}


def _join(name: str, parts: list[Tensor]) -> Tensor:
    column = ("word_embeddings.weight", "output_layer.weight", "qkv.weight", "qkv.bias", "fc1.weight", "fc1.bias")
    row = ("proj.weight", "fc2.weight")
    if name.startswith("language") and name.endswith("linear_fc1.weight"):
        # Each rank holds its gate rows above its up rows.
        return torch.cat([torch.cat([part.chunk(2)[half] for part in parts]) for half in range(2)])
    if name.endswith(column):
        return torch.cat(parts)
    if name.endswith(row):
        return torch.cat(parts, dim=1)
    for part in parts[1:]:
        torch.testing.assert_close(part, parts[0], rtol=0, atol=1e-6, msg=f"{name} is replicated but differs")
    return parts[0]
