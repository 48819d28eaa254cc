"""How many bytes each rank of a layout needs, part by part.

Weights, gradients and optimizer state are counted tensor by tensor from the weight map; tests compare them with what
training allocates. Activations and cache are estimates: upper bounds from the sizes of the tensors that each layer
keeps, for the largest micro-batch and for slots that are all full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil, prod

from mstar_mega.checkpoint_tools.maps import ModelMap
from mstar_mega.checkpoint_tools.megatron_files import stage_of
from mstar_mega.config import Config
from mstar_mega.generation.capacity import MOST, slots_within
from mstar_mega.models.build import DTYPES
from mstar_mega.models.mapping import score_heads
from mstar_mega.models.sizes import LanguageSize, VisionSize, cut_over_tensor_ranks, layers_of_stages
from mstar_mega.recipe.method import needs_prm

GRADIENT_BYTES = 4
"""Gradients are accumulated in float32 whatever the weights are."""
TEXT_TOKENS = 256
"""Question and template of a prompt, besides its image."""
MOST_CROPS = 16
"""HD crops of a picture at the original's recommended setting for single images."""
SOURCE_AND_SLICES = 10
MOST_TILES = 13


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank of one pipeline stage."""

    weights: int
    gradients: int
    optimizer: int
    prm: int
    """Weights of the process reward model, which scores while the policy trains."""
    prm_training: int
    """Gradients and optimizer state of the PRM while it is trained, beside the policy and its optimizer."""
    activations: int
    """Of one training step."""
    cache: int
    """Keys and values of the responses in flight and their prompts."""
    prefill: int
    """Activations of the prompts that enter at once, or are scored."""

    @property
    def kept(self) -> int:
        """What is there in every stage."""
        return self.weights + self.gradients + self.optimizer + self.prm

    @property
    def total(self) -> int:
        """Stages take turns: PRM training, the policy's training and generation; the largest counts."""
        return self.kept + max(self.prm_training + self.activations, self.cache + self.prefill)

    def parts(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of each part, and the total."""
        for each in fields(self):
            yield each.name, getattr(self, each.name)
        yield "total", self.total


@dataclass(frozen=True)
class Layout:
    """A way to cut one model copy, and the size of a micro-batch."""

    tensor: int
    pipeline: int
    microbatch_tokens: int
    data: int = 1
    """Copies of the model, which share a distributed optimizer's state."""


def is_possible(model: ModelMap, tensor: int, pipeline: int, first_stage_layers: int | None = None) -> bool:
    """Whether heads, channels and layers can be cut so."""
    cut = cut_over_tensor_ranks(model.vision, model.language).values()
    try:
        layers_of_stages(model.layers, pipeline, first_stage_layers)
    except ValueError:
        return False
    return not any(number % tensor for number in cut)


def rank_memory(model: ModelMap, config: Config, layout: Layout, outside: ModelMap | None = None) -> list[RankMemory]:
    """What a rank of each pipeline stage needs under these settings. All tensor ranks of a stage need the same.

    ``outside``: the PRM of ``prm.checkpoint``, which is not trained; None: it is made from the policy.
    """
    width = DTYPES[config.model.precision].itemsize
    counts = parameter_counts(model, layout.tensor, _stages(model, config, layout))
    scorer = outside or own_prm(model, config)
    of_scorer = _stages(scorer, config, layout)
    scoring = parameter_counts(scorer, layout.tensor, of_scorer, freeze_vision=config.prm.freeze_vision)
    if not needs_prm(config):
        scoring = [(0, 0)] * layout.pipeline
    moments = 8 if width == 4 else 12  # two moments; below float32 also the weights' own float32 copy
    copies = layout.data if config.parallel.distributed_optimizer else 1
    result = []
    for stage, ((trained, frozen), (prm_trained, prm_frozen)) in enumerate(zip(counts, scoring, strict=True)):
        result.append(
            RankMemory(
                weights=(trained + frozen) * width,
                gradients=trained * GRADIENT_BYTES,
                optimizer=ceil(trained * moments / copies),
                prm=(prm_trained + prm_frozen) * width,
                prm_training=0 if outside else prm_trained * GRADIENT_BYTES + ceil(prm_trained * moments / copies),
                activations=_activations(model, config, layout, stage, width),
                cache=0,
                prefill=max(_prefill(one, config, layout, stage, width) for one in (model, scorer)),
            )
        )
        result[-1] = replace(result[-1], cache=_planned_cache(result[-1], model, config, layout, width))
    return result


def auto_slots(model: ModelMap, config: Config, layout: Layout, stages: Sequence[RankMemory], usable: int) -> int:
    """What ``generation.slots auto`` comes to where a rank has so many bytes: as the engine counts."""
    per_token = _bytes_per_token(model, config, layout, DTYPES[config.model.precision].itemsize)
    free = min(usable - stage.kept for stage in stages)
    return slots_within(max(0, free), per_token, config.generation.max_new_tokens)


def _stages(model: ModelMap, config: Config, layout: Layout) -> list[int]:
    return layers_of_stages(model.layers, layout.pipeline, config.parallel.first_stage_layers)


def own_prm(model: ModelMap, config: Config) -> ModelMap:
    """The process reward model that is made from this policy."""
    head = config.prm.head
    trunk = [m for m in model.mappings if head == "likelihood" or not m.name.startswith("language.output_layer.")]
    return replace(model, head=head, mappings=trunk + score_heads(model.language.hidden, head))


def parameter_counts(
    model: ModelMap, tensor: int, stages: Sequence[int], freeze_vision: bool = False
) -> list[tuple[int, int]]:
    """(trained, frozen) values on one rank of each stage; ``stages``: layers on each."""
    counts = [[0, 0] for _ in stages]
    for mapping in model.mappings:
        share = prod(mapping.shape) // (1 if mapping.layout == "replicated" else tensor)
        stage = stage_of(mapping.name, stages)
        is_frozen = freeze_vision and mapping.name.startswith(("vision.", "connector."))
        counts[stage][is_frozen or _is_frozen(mapping.name, model.vision)] += share
    return [(trained, frozen) for trained, frozen in counts]


def _is_frozen(name: str, vision: VisionSize) -> bool:
    """Kept for the way back, used by nothing."""
    unused = range(vision.layers - vision.unused_layers, vision.layers)
    kept_norm = vision.post_norm == "kept" and name.startswith("vision.post_norm.")
    return kept_norm or any(name.startswith(f"vision.blocks.{layer}.") for layer in unused)


def most_image_tokens(vision: VisionSize) -> int:
    """Tokens of the largest picture at the originals' settings."""
    per_tile = (vision.grid // 2) ** 2
    if vision.connector == "resampler":
        return SOURCE_AND_SLICES * vision.queries
    if vision.connector == "hd_transform":
        side = vision.grid // 2
        return (MOST_CROPS + 1) * per_tile + 1 + (int(MOST_CROPS**0.5) + 1) * side
    return MOST_TILES * per_tile


def _language_layer(t: LanguageSize, tensor: int, sequence: bool, mlp: bool = True) -> float:
    """Values that one layer keeps for its backward pass, per token; without ``mlp``, its inner ones are recomputed."""
    whole = 4 * t.hidden / (tensor if sequence else 1)  # two norms' inputs and outputs
    attention = (2 * t.heads + 2 * t.kv_heads) * t.head_dim / tensor  # q, k, v and what attention gives
    return whole + attention + (4 * t.ffn / tensor if mlp else 0)  # gate, up, silu, product


def _vision_values(v: VisionSize, tensor: int, recompute: bool) -> float:
    """Values that the tower keeps for its backward pass, per patch."""
    layer, layers = _vision_layer(v, tensor), v.layers - v.unused_layers
    return (layers * v.hidden + layer if recompute else layers * layer) + 3 * v.hidden


def _vision_layer(v: VisionSize, tensor: int) -> float:
    return 4 * v.hidden + (4 * v.hidden + 2 * v.ffn) / tensor


def _patches(v: VisionSize, tokens: int) -> int:
    """Patches behind so many image tokens."""
    if v.connector == "resampler":
        # A slice has about as many patches as a square of 448 pixels.
        return ceil(tokens / v.queries) * (448 // v.patch_size) ** 2
    return tokens * 4


def longest_prompt(model: ModelMap, config: Config) -> int:
    """Tokens of a prompt with one picture of the largest size. A set on disk may be held to shorter ones."""
    longest = most_image_tokens(model.vision) + TEXT_TOKENS
    return min(longest, config.data.max_prompt_tokens) if config.data.name == "mathv360k" else longest


def largest_microbatch(model: ModelMap, config: Config, microbatch_tokens: int) -> int:
    """Tokens of the largest micro-batch that can occur (training/batches.py): what does not fit into the bound is
    divided, but a prompt with one response never is."""
    return max(microbatch_tokens, longest_prompt(model, config) + config.generation.max_new_tokens)


def _activations(model: ModelMap, config: Config, layout: Layout, stage: int, width: int) -> int:
    v, t = model.vision, model.language
    tokens = largest_microbatch(model, config, layout.microbatch_tokens)
    image_tokens = max(layout.microbatch_tokens, longest_prompt(model, config))
    layers = _stages(model, config, layout)[stage]
    one = _language_layer(t, layout.tensor, config.parallel.sequence)
    in_flight = layout.pipeline - stage
    if config.model.recompute == "none":
        values = in_flight * tokens * layers * one
    else:  # what is kept, and one layer's values while they are there again
        kept: float = t.hidden
        if config.model.recompute == "selective":
            kept = _language_layer(t, layout.tensor, config.parallel.sequence, mlp=False)
        values = tokens * (in_flight * layers * kept + one)
    if stage == 0:
        of_patch = _vision_values(v, layout.tensor, config.model.recompute_vision)
        values += in_flight * _patches(v, image_tokens) * of_patch
    total = values * width
    if stage == layout.pipeline - 1:
        total += tokens * t.padded_vocab / layout.tensor * (width + 4 + 4)  # logits, float32 copy and gradient
    return int(total)


def _planned_cache(stage: RankMemory, model: ModelMap, config: Config, layout: Layout, width: int) -> int:
    """The cache of the settings' slots. ``auto`` takes what is there: at least what training needs anyway."""
    slots = config.generation.slots
    if slots != "auto":
        return _cache(slots, model, config, layout, width)
    room = stage.prm_training + stage.activations - stage.prefill
    return max(_cache(1, model, config, layout, width), min(_cache(MOST, model, config, layout, width), room))


def _bytes_per_token(model: ModelMap, config: Config, layout: Layout, width: int) -> int:
    t = model.language
    return 2 * t.kv_heads * t.head_dim // layout.tensor * max(_stages(model, config, layout)) * width


def _cache(slots: int, model: ModelMap, config: Config, layout: Layout, width: int) -> int:
    prompts = ceil(slots / config.evolve.responses)
    tokens = slots * config.generation.max_new_tokens + prompts * longest_prompt(model, config)
    return tokens * _bytes_per_token(model, config, layout, width)


def _prefill(model: ModelMap, config: Config, layout: Layout, stage: int, width: int) -> int:
    """Without gradients one layer's values live at a time."""
    v, t, tokens = model.vision, model.language, config.generation.prefill_tokens
    values = tokens * _language_layer(t, layout.tensor, config.parallel.sequence)
    if stage == 0:
        values = max(values, _patches(v, tokens) * _vision_layer(v, layout.tensor))
    return int(values * width)
