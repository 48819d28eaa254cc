"""Recorded cases of the original implementations, run through our model: features, logits and greedy tokens.

A case is a safetensors file with inputs and expected outputs; which inputs it has follows from the tensors it holds:
``image_flags`` (tiles, dummy ones marked), ``image_sizes`` (HD crops), or ``tgt_sizes`` (strips).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mstar_mega.config import GenerationConfig
from mstar_mega.models.inference import from_last_stage, inference, run_packed
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import Prompt, pack
from mstar_mega.models.sizes import VisionSize


@dataclass
class Case:
    """The inputs of a recorded case."""

    prompts: list[Prompt]
    """One per row of the batch."""
    pixels: Tensor | None
    """float32 [pieces, 3, S, S] of the whole batch, as ``Prompt`` holds them."""
    grids: Tensor | None
    kept: Tensor
    """bool [units]: which of the recorded features' units (tiles, or slices) the prompts hold."""


def read_case(golden: Mapping[str, Tensor], vision: VisionSize, image_token: int | None = None) -> Case:
    """The inputs of a case. ``image_token`` marks image places where the case's ids do (tiles)."""
    if "tgt_sizes" in golden:
        return _strips(golden, vision)
    if "image_sizes" in golden:
        return _crops(golden, vision)
    if image_token is None:
        raise ValueError("the case needs the id of the image token (img_context_token_id in its meta.json)")
    return _tiles(golden, vision, image_token)


def features(model: LMM, case: Case) -> Tensor | None:
    """What is written over the placeholders, float32 [features, hidden]; None beyond the first pipeline stage."""
    if not model.pre_process or case.pixels is None:
        return None
    with inference(model):
        dtype = next(model.parameters()).dtype
        return model.image_features(case.pixels.to(next(model.parameters()).device, dtype), case.grids).float()


def logits(model: LMM, case: Case) -> Tensor:
    """Logits of every prompt token, float32 [rows, longest, vocab], on every rank. Collective."""
    with inference(model):
        where = next(model.parameters()).device
        batch = pack(
            case.prompts, [[] for _ in case.prompts], model.stream_multiple, model.rope.regimes, device=where,
            unpadded=model.unpadded_prompts,
        )  # fmt: skip
        hidden = run_packed(model, batch)
        longest = max(len(prompt.tokens) for prompt in case.prompts)
        out = torch.zeros(len(case.prompts), longest, model.size.padded_vocab, device=where)
        if hidden is not None:
            local = model.logits(hidden)
            parts = [torch.empty_like(local) for _ in range(model.tensor_group.size())]
            torch.distributed.all_gather(parts, local.contiguous(), group=model.tensor_group)
            whole = torch.cat(parts, dim=1)
            for row, (last, prompt) in enumerate(zip(batch.last_prompt, case.prompts, strict=True)):
                length = len(prompt.tokens)
                out[row, :length] = whole[last + 1 - length : last + 1]
        return from_last_stage(out)[..., : model.size.vocab]


def greedy_settings(count: int) -> GenerationConfig:
    """Settings of the generation engine for ``count`` greedy tokens."""
    return GenerationConfig(max_new_tokens=count, slots=4)


def _tiles(golden: Mapping[str, Tensor], vision: VisionSize, image_token: int) -> Case:
    kept = golden["image_flags"].bool()
    pixels = golden["pixel_values"][kept]
    per_tile = (vision.grid // 2) ** 2
    prompts: list[Prompt] = []
    first = 0
    for row in golden["input_ids"].tolist():
        places = [i for i, token in enumerate(row) if token == image_token]
        tiles = len(places) // per_tile
        prompts.append(Prompt(row, places, pixels[first : first + tiles] if tiles else None))
        first += tiles
    return Case(prompts, pixels if first else None, None, kept)


def _crops(golden: Mapping[str, Tensor], vision: VisionSize) -> Case:
    sizes = golden["image_sizes"] // vision.image_size
    pictures = [golden["pixel_values"][i, : 1 + rows * columns] for i, (rows, columns) in enumerate(sizes.tolist())]
    prompts: list[Prompt] = []
    first = 0
    for row in golden["input_ids"].tolist():
        places = [i for i, token in enumerate(row) if token < 0]
        # The numbers -1, -2, ... stand for the images of this row; another number is another image.
        images = len({row[i] for i in places})
        chosen = slice(first, first + images)
        tokens = [max(token, 0) for token in row]
        prompts.append(Prompt(tokens, places, torch.cat(pictures[chosen]), sizes[chosen]))
        first += images
    return Case(prompts, torch.cat(pictures), sizes, torch.ones(len(pictures), dtype=torch.bool))


def _strips(golden: Mapping[str, Tensor], vision: VisionSize) -> Case:
    P = vision.patch_size
    sizes = golden["tgt_sizes"].long()
    # [3, P, n * P] -> [n, 3, P, P]
    strips = [
        golden[f"pixel_values.{k}"].unflatten(2, (-1, P)).permute(2, 0, 1, 3).contiguous() for k in range(sizes.size(0))
    ]
    # The longest slice of the whole batch rules, as in the original.
    longest = sizes.prod(1).max()
    grids = torch.cat([sizes, longest.expand(sizes.size(0), 1)], dim=1)
    prompts: list[Prompt] = []
    for b, row in enumerate(golden["input_ids"].tolist()):
        chosen = [k for k, of in enumerate(golden["slice_sample_index"].tolist()) if of == b]
        places = [p for k in chosen for p in range(*golden["image_bound"][k].tolist())]
        prompts.append(Prompt(row, places, torch.cat([strips[k] for k in chosen]), grids[chosen]))
    return Case(prompts, torch.cat(strips), grids, torch.ones(len(strips), dtype=torch.bool))
