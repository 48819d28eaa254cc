"""The architecture written out plainly, initial weights in every layout, and InternVL2's own outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from parallel import run_parallel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from mstar_mega.config import Config, ParallelConfig
from mstar_mega.models.build import build_family, build_model
from mstar_mega.models.connectors import pixel_shuffle
from mstar_mega.models.fingerprint import fingerprint
from mstar_mega.models.lmm import LMM, LanguageSize, VisionSize
from mstar_mega.models.packing import Prompt, pack
from mstar_mega.models.vision import VisionTower
from mstar_mega.platform import distributed

pytestmark = pytest.mark.usefixtures("job_of_one")


@pytest.fixture(scope="module")
def policy() -> LMM:
    return tiny.randomize(tiny.build()[0])


# -- vision ----------------------------------------------------------------------------------------------------------


def test_pixel_shuffle_merges_two_by_two_neighbours_row_by_row() -> None:
    side, channels = 6, 3
    features = torch.arange(2 * side * side * channels).float().view(2, side * side, channels)
    grid = features.view(2, side, side, channels)
    merged = pixel_shuffle(features)
    assert merged.shape == (2, 9, 12)
    for tile in range(2):
        for row in range(3):
            for column in range(3):
                patches = [grid[tile, 2 * row + i, 2 * column + j] for i in range(2) for j in range(2)]
                assert torch.equal(merged[tile, 3 * row + column], torch.cat(patches))


def plain_vision(tower: VisionTower, pixels: Tensor, heads: int) -> Tensor:
    """InternViT written out in float64, head by head."""
    w = {name: p.detach().double() for name, p in tower.named_parameters()}
    hidden = w["class_embedding"].size(-1)
    size = hidden // heads
    patch = w["patch_embedding.weight"].size(-1)
    side = pixels.size(-1) // patch
    rows = []
    for tile in pixels.double():
        patches = [
            tile[:, patch * r : patch * (r + 1), patch * c : patch * (c + 1)].flatten()
            for r in range(side)
            for c in range(side)
        ]
        x = torch.stack(patches) @ w["patch_embedding.weight"].flatten(1).T + w["patch_embedding.bias"]
        x = torch.cat([w["class_embedding"][0], x]) + w["position_embedding"][0]
        for b in range(len(tower.blocks)):
            v = {name.removeprefix(f"blocks.{b}."): p for name, p in w.items() if name.startswith(f"blocks.{b}.")}
            y = F.layer_norm(x, (hidden,), v["norm1.weight"], v["norm1.bias"], 1e-6)
            joined = y @ v["qkv.weight"].T + v["qkv.bias"]
            attended = []
            for h in range(heads):
                q, k, values = joined[:, 3 * size * h : 3 * size * (h + 1)].chunk(3, dim=1)
                attended.append((q @ k.T / size**0.5).softmax(dim=1) @ values)
            x = x + v["ls1"] * (torch.cat(attended, dim=1) @ v["proj.weight"].T + v["proj.bias"])
            y = F.layer_norm(x, (hidden,), v["norm2.weight"], v["norm2.bias"], 1e-6) @ v["mlp.fc1.weight"].T
            y = y + v["mlp.fc1.bias"]
            y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
            x = x + v["ls2"] * (y @ v["mlp.fc2.weight"].T + v["mlp.fc2.bias"])
        rows.append(x[1:])
    return torch.stack(rows)


def test_vision_tower_is_internvit(policy: LMM) -> None:
    pixels = tiny.prompt(0, 13, tiles=2).pixels
    assert pixels is not None
    with torch.no_grad():
        features = policy.vision(pixels)
    torch.testing.assert_close(features.double(), plain_vision(policy.vision, pixels, heads=2), rtol=1e-4, atol=1e-5)


# -- language model --------------------------------------------------------------------------------------------------


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE as a complex rotation of channel pairs (j, j + D / 2): x [T, D]."""
    half = x.size(1) // 2
    angle = positions.double()[:, None] * theta ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=1)


def plain_language(model: LMM, embedded: Tensor) -> Tensor:
    """The language model written out in float64 for one sequence [T, hidden]; returns logits."""
    size = model.size
    w = {name: p.detach().double() for name, p in model.language.named_parameters()}
    T, D, share = embedded.size(0), size.head_dim, size.heads // size.kv_heads
    positions = torch.arange(T)
    hidden_from = torch.ones(T, T).triu(1).bool()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(dim=1, keepdim=True) + size.eps).sqrt() * weight

    x = embedded.detach().double()
    for n in range(size.layers):
        v = {name.removeprefix(f"decoder.layers.{n}."): p for name, p in w.items() if f"layers.{n}." in name}
        joined = norm(x, v["input_layernorm.weight"]) @ v["self_attention.linear_qkv.weight"].T
        attended = []
        for g, group in enumerate(joined.split((share + 2) * D, dim=1)):
            assert g < size.kv_heads
            *queries, key, value = group.split(D, dim=1)
            key = rotate(key, positions, size.rope_theta)
            for query in queries:
                scores = rotate(query, positions, size.rope_theta) @ key.T / D**0.5
                attended.append(scores.masked_fill(hidden_from, -torch.inf).softmax(dim=1) @ value)
        x = x + torch.cat(attended, dim=1) @ v["self_attention.linear_proj.weight"].T
        gate, up = (norm(x, v["pre_mlp_layernorm.weight"]) @ v["mlp.linear_fc1.weight"].T).chunk(2, dim=1)
        x = x + (gate * torch.sigmoid(gate) * up) @ v["mlp.linear_fc2.weight"].T
    return norm(x, w["decoder.final_layernorm.weight"]) @ w["output_layer.weight"].T


def test_language_model_with_rope_written_out(policy: LMM) -> None:
    batch = pack([tiny.prompt(0, 23, tiles=2)], [[]])
    with torch.no_grad():
        logits = policy.logits(tiny.hidden(policy, batch))
        expected = plain_language(policy, policy.embed(batch))
    assert expected.std() > 0.3
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)


def test_rope_turns_by_relative_position_only(policy: LMM) -> None:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd as turn

    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 5, 1, 1, 8, generator=generator)
    for offset in (0, 3, 1000):
        places = torch.tensor([0, 7, 2, 2, 30]) + offset
        angles = policy.rope.angles(places)
        assert angles.shape == (5, 1, 1, 8)
        turned = turn(q, angles)
        expected = rotate(q[:, 0, 0].double(), places, 1e4)
        torch.testing.assert_close(turned[:, 0, 0].double(), expected, rtol=0, atol=1e-3)
        scores = turned[:, 0, 0] @ turn(k, angles)[:, 0, 0].T
        if offset == 0:
            first = scores
        torch.testing.assert_close(scores, first, rtol=0, atol=2e-3)


# -- layouts ---------------------------------------------------------------------------------------------------------


def initial_shards(parallel: ParallelConfig) -> dict[str, tuple[int, Tensor]]:
    return tiny.shards(tiny.build(parallel, seed=3)[0])


def test_initial_weights_do_not_depend_on_the_layout() -> None:
    whole = tiny.whole_weights([initial_shards(ParallelConfig())], 1)
    for ranks, tensor, pipeline in [(2, 2, 1), (2, 1, 2), (2, 1, 1), (4, 2, 2)]:
        parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
        parts = run_parallel(ranks, "test_architecture:initial_shards", parallel)
        if tensor > 1:
            name = "language.decoder.layers.0.mlp.linear_fc1.weight"
            assert parts[0][name][1].shape[0] == whole[name].shape[0] // 2, "nothing was cut"
        joined = tiny.whole_weights(parts, tensor)
        assert joined.keys() == whole.keys()
        for name, value in whole.items():
            assert torch.equal(joined[name], value), (name, tensor, pipeline)
    matrices = [value for name, value in whole.items() if value.dim() == 2 and name != "score_head"]
    assert len({float(value.flatten()[0]) for value in matrices}) == len(matrices), "two tensors were drawn alike"


def names_of_weights(tensor: int, pipeline: int) -> list[str]:
    """Fingerprints of fresh weights, with one bit changed, and with that changed back."""
    config = Config(parallel=ParallelConfig(tensor=tensor, pipeline=pipeline))
    distributed.initialize(config.parallel, 0)
    model = build_model(config, build_family(config))
    names = [fingerprint(model)]
    weight = next(parameter for parameter in model.parameters() if parameter.dim() == 2)
    bits = weight.data.view(-1).view(torch.int32)
    for _ in range(2):
        bits[5] ^= 1
        names.append(fingerprint(model))
    return names


def test_equal_weights_have_one_name_in_every_layout() -> None:
    (alone,) = run_parallel(1, "test_architecture:names_of_weights", 1, 1)
    assert alone[0] == alone[2] != alone[1]
    for tensor, pipeline in ((2, 1), (1, 2), (1, 1)):
        for names in run_parallel(2, "test_architecture:names_of_weights", tensor, pipeline):
            assert names[0] == names[2] == alone[0] != names[1]


# -- the InternVL2 architecture --------------------------------------------------------------------------------------


GOLDENS = Path(__file__).parents[2] / "shared" / "goldens" / "internvl2"


def internvl2(directory: Path) -> LMM:
    """The reference's tiny weights in our modules."""
    config = json.loads((directory / "config.json").read_text())
    language, vision = config["llm_config"], config["vision_config"]
    heads = language["num_attention_heads"]
    family = tiny.family()
    family.vision = VisionSize(
        vision["image_size"], vision["patch_size"], vision["hidden_size"], vision["intermediate_size"],
        vision["num_hidden_layers"], vision["num_attention_heads"], vision["layer_norm_eps"],
    )  # fmt: skip
    family.language = LanguageSize(
        language["hidden_size"], language["intermediate_size"], language["num_hidden_layers"], heads,
        language["num_key_value_heads"], language["hidden_size"] // heads, language["vocab_size"],
        float(language["rope_theta"]), language["rms_norm_eps"],
    )  # fmt: skip
    model = build_model(Config(), family)
    source = load_file(directory / "model.safetensors")
    used: set[str] = set()

    def take(name: str) -> Tensor:
        used.add(name)
        return source[name]

    def per_head(qkv: Tensor) -> Tensor:
        """Rows [q | k | v] -> q, k, v of head 0, of head 1, ..."""
        return qkv.unflatten(0, (3, vision["num_attention_heads"], -1)).transpose(0, 1).flatten(0, 2)

    def vision_name(name: str) -> str:
        if not name.startswith("blocks."):
            return f"vision_model.embeddings.{name}"
        _, n, rest = name.split(".", 2)
        rest = f"attn.{rest}" if rest.startswith(("qkv", "proj")) else rest
        return f"vision_model.encoder.layers.{n}.{rest}"

    def weight_of(name: str) -> Tensor:
        room, _, rest = name.partition(".")
        if room == "vision":
            value = take(vision_name(rest))
            return per_head(value) if ".qkv." in rest else value
        if room == "connector":
            number = {"norm": "0", "mlp.fc1": "1", "mlp.fc2": "3"}[rest.rpartition(".")[0]]
            return take(f"mlp1.{number}.{rest.rpartition('.')[2]}")
        if rest.startswith("decoder.layers."):
            _, _, n, part = rest.split(".", 3)
            layer = f"language_model.model.layers.{n}."
            if part == "mlp.linear_fc1.weight":
                return torch.cat([take(f"{layer}feed_forward.w1.weight"), take(f"{layer}feed_forward.w3.weight")])
            theirs = {
                "input_layernorm.weight": "attention_norm.weight",
                "self_attention.linear_qkv.weight": "attention.wqkv.weight",
                "self_attention.linear_proj.weight": "attention.wo.weight",
                "pre_mlp_layernorm.weight": "ffn_norm.weight",
                "mlp.linear_fc2.weight": "feed_forward.w2.weight",
            }[part]
            return take(layer + theirs)
        theirs = {
            "embedding.word_embeddings.weight": "language_model.model.tok_embeddings.weight",
            "decoder.final_layernorm.weight": "language_model.model.norm.weight",
            "output_layer.weight": "language_model.output.weight",
        }[rest]
        value = take(theirs)
        padding = model.size.padded_vocab - value.size(0) if value.dim() == 2 else 0
        return F.pad(value, (0, 0, 0, padding)) if padding else value

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = weight_of(name)
            assert value.shape == parameter.shape, name
            parameter.copy_(value)
    assert used == source.keys(), "a tensor of the reference has no place in the model"
    return model


@pytest.mark.skipif(not GOLDENS.is_dir(), reason="the reference outputs of InternVL2 do not lie beside the project")
@pytest.mark.parametrize("case", ["one_tile", "multi_tile_two_images"])
def test_the_policy_is_the_internvl2_architecture(case: str) -> None:
    model = internvl2(GOLDENS)
    golden = load_file(GOLDENS / f"case_{case}.safetensors")
    context = json.loads((GOLDENS / "meta.json").read_text())["img_context_token_id"]
    tokens = golden["input_ids"][0].tolist()
    prompt = Prompt(tokens, [i for i, token in enumerate(tokens) if token == context], golden["pixel_values"])
    with torch.no_grad():
        tower = model.vision(golden["pixel_values"])
        features = model.connector(tower)
        logits = model.logits(tiny.hidden(model, pack([prompt], [[]])))
    torch.testing.assert_close(tower, golden["vision_tower_output"][:, 1:], rtol=0, atol=1e-4)
    torch.testing.assert_close(features, golden["vision_features"], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[:, : model.size.vocab], golden["logits"][0], rtol=0, atol=5e-4)
    # The same with the end of the sequence as a response on the shared prefix.
    cut = len(tokens) - 3
    shared = pack([Prompt(tokens[:cut], prompt.image_positions, prompt.pixels)], [[tokens[cut:]] * 2])
    with torch.no_grad():
        again = model.logits(tiny.hidden(model, shared))
    for start in shared.response_start[0]:
        rows = again[start : start + 3, : model.size.vocab]
        torch.testing.assert_close(rows, golden["logits"][0, cut:], rtol=0, atol=5e-4)
