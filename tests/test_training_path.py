"""What makes training fast or small where the hardware has it: each gives the loss and gradients of the plain path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from megatron.core.tensor_parallel import layers as megatron_layers
from parallel import run_parallel
from test_packing import PROMPTS, RESPONSES, assert_same_gradients
from tiny_families import make_model_directory
from torch import Tensor

from mstar_mega.config import Config, ModelConfig, OptimizerConfig, ParallelConfig
from mstar_mega.data.types import Query
from mstar_mega.kernels import dispatch, flash
from mstar_mega.kernels.prefix_attention import prefix_attention
from mstar_mega.models import build, lmm
from mstar_mega.models.build import build_model, check_divisible
from mstar_mega.models.description import family_from_hf
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import next_token_targets, pack
from mstar_mega.models.sizes import layers_of_stages
from mstar_mega.platform import distributed
from mstar_mega.training.batches import TrainGroup
from mstar_mega.training.trainer import Trainer


@pytest.fixture
def policy(job_of_one: None) -> LMM:
    return tiny.randomize(tiny.build()[0])


def trained(model: LMM, unpadded: bool = False) -> tuple[float, dict[str, Tensor], int]:
    """Loss of the packed stream, gradients by name, and bytes kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.train()
    model.zero_grad()
    batch = pack(PROMPTS, RESPONSES, unpadded=unpadded)
    source, target = next_token_targets(batch, RESPONSES)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = -model.log_probs(tiny.hidden(model, batch)[source], target).sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss), gradients, sum(size for place, size in kept.items() if place not in weights)


def assert_same(one: tuple[float, dict[str, Tensor], int], other: tuple[float, dict[str, Tensor], int]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    assert_same_gradients(one[1], other[1])


# -- flash-attn ------------------------------------------------------------------------------------------------------


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
) -> Tensor:  # fmt: skip
    """flash-attn's signature around the definition; what the real one requires of its inputs is required."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    ends = cu_seqlens_q.tolist()
    assert ends[0] == 0 and ends[-1] == q.size(0) and ends == cu_seqlens_k.tolist()
    assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in zip(ends, ends[1:], strict=False))
    assert dropout_p == 0.0
    calls.append(ends)
    out = []
    for begin, end in zip(ends, ends[1:], strict=False):
        rows, keys, values = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        keys, values = (x.repeat_interleave(q.size(1) // k.size(1), dim=0) for x in (keys, values))
        scores = rows @ keys.transpose(1, 2) * (softmax_scale or q.size(-1) ** -0.5)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        out.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(out)


calls: list[list[int]] = []


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """flash-attn as if it were there, and took what we have here."""
    calls.clear()
    monkeypatch.setattr(flash, "_module", lambda: SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    monkeypatch.setattr(flash, "takes", lambda device, dtype, channels: True)
    yield


def test_flash_attention_gives_the_plain_paths_gradients(policy: LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setattr(flash, "takes", lambda *_: False)
        plain = trained(policy)
    calls.clear()
    monkeypatch.setattr(flash, "_module", lambda: SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    monkeypatch.setattr(flash, "takes", lambda *_: True)
    assert policy.unpadded_prompts
    assert_same(trained(policy, unpadded=True), plain)
    positions = (tiny.IMAGE // tiny.PATCH) ** 2 + 1
    pictures, prompts = [0, positions, 2 * positions, 3 * positions], [0, 13, 18, 27]
    assert calls == [pictures] * 2 + [prompts] * 2, "two vision blocks and two layers, nothing padded"


@pytest.mark.parametrize("name", ["phi3_5_vision", "minicpm_v2_5"])
def test_flash_attention_in_the_other_towers(
    name: str, installed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, job_of_one: None
) -> None:
    family = family_from_hf(make_model_directory(name, tmp_path))
    model = tiny.randomize(build_model(Config(model=ModelConfig(family=name)), family))
    generator = torch.Generator().manual_seed(1)
    side = family.vision.patch_size if name == "minicpm_v2_5" else family.vision.image_size
    grids = torch.tensor([[2, 3, 8], [1, 5, 8], [2, 2, 4]]) if name == "minicpm_v2_5" else None
    pieces = int((grids[:, 0] * grids[:, 1]).sum()) if grids is not None else 3
    pixels = torch.randn(pieces, 3, side, side, generator=generator)
    found = []
    for takes in (True, False):
        monkeypatch.setattr(flash, "takes", lambda *_, takes=takes: takes)
        model.zero_grad()
        features = model.vision(pixels, grids)
        (features * torch.linspace(-1, 1, features.numel()).view(features.shape)).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.vision.named_parameters() if p.grad is not None}
        found.append((features.detach(), gradients))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][key], rtol=1e-4, atol=1e-4, msg=key)
    if grids is not None:
        assert set(map(tuple, calls)) == {(0, 8, 16, 20)}, "strips of all lengths at once"


def test_where_flash_attention_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(flash, "_module", lambda: None)
    assert not flash.takes(cuda, torch.bfloat16, 128)
    monkeypatch.setattr(flash, "_module", object)
    assert flash.takes(cuda, torch.bfloat16, 128) and flash.takes(cuda, torch.float16, 72)
    assert not flash.takes(cpu, torch.bfloat16, 128) and not flash.takes(cuda, torch.float32, 128)
    assert not flash.takes(cuda, torch.bfloat16, 320) and not flash.takes(cuda, torch.bfloat16, 68)
    dispatch.turn_off(["flash_attention"])
    try:
        assert not flash.takes(cuda, torch.bfloat16, 128)
    finally:
        dispatch.turn_off([])


# -- recomputation ---------------------------------------------------------------------------------------------------


def test_recomputation_keeps_less_and_changes_nothing(policy: LMM) -> None:
    found = {}
    for name, settings in {
        "none": ModelConfig(),
        "selective": ModelConfig(recompute="selective"),
        "full": ModelConfig(recompute="full"),
        "vision": ModelConfig(recompute_vision=True),
    }.items():
        model = build_model(Config(model=settings), tiny.family())
        model.load_state_dict(policy.state_dict())
        found[name] = trained(model)
        assert_same(found[name], found["none"])
    kept = {name: bytes_kept for name, (_, _, bytes_kept) in found.items()}
    assert kept["full"] < kept["selective"] < 0.8 * kept["none"]
    assert kept["vision"] < 0.9 * kept["none"]


# -- fused layers ----------------------------------------------------------------------------------------------------


def test_fused_layers_give_the_plain_paths_gradients(policy: LMM) -> None:
    """megatron's functions as they stand; that torch.compile keeps their meaning is not ours to test."""
    fused = build_model(Config(model=ModelConfig(fused_layers=True)), tiny.family())
    assert fused.config.bias_activation_fusion and fused.config.bias_dropout_fusion
    assert not policy.config.bias_activation_fusion, "by itself only on CUDA"
    fused.load_state_dict(policy.state_dict())
    torch.compiler.set_stance("force_eager")
    try:
        assert_same(trained(fused), trained(policy))
    finally:
        torch.compiler.set_stance("default")


def test_weight_gradients_are_added_up_by_apex_where_it_is_there(policy: LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through megatron's own use of the extension, with a stand-in of its function."""

    def accumulate(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        sums.append(tuple(main_grad.shape))
        main_grad.add_(grad_output.t() @ inputs)

    sums: list[tuple[int, ...]] = []
    plain = steps_taken(policy)
    monkeypatch.setattr(lmm, "find_spec", lambda name: object() if name == lmm.WEIGHT_GRADIENTS else None)
    monkeypatch.setattr(lmm, "device", lambda: torch.device("cuda"))
    stand_in = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    monkeypatch.setattr(megatron_layers, "_grad_accum_fusion_available", True)
    monkeypatch.setattr(megatron_layers, "fused_weight_gradient_mlp_cuda", stand_in, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    model = build_model(Config(model=ModelConfig(fused_layers=True)), tiny.family())
    assert model.config.gradient_accumulation_fusion
    tiny.randomize(model)
    torch.compiler.set_stance("force_eager")
    try:
        assert steps_taken(model) == pytest.approx(plain, rel=1e-5)
    finally:
        torch.compiler.set_stance("default")
    linear = (megatron_layers.ColumnParallelLinear, megatron_layers.RowParallelLinear)
    parts = [part for part in model.modules() if isinstance(part, linear) and part is not model.language.output_layer]
    assert len(parts) == 18 and set(sums) == {tuple(part.weight.shape) for part in parts}


def test_without_apex_or_cuda_weight_gradients_are_plain(job_of_one: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmm, "find_spec", lambda name: object())
    settings = Config(model=ModelConfig(fused_layers=True))
    assert not build_model(settings, tiny.family()).config.gradient_accumulation_fusion, "not on the CPU"
    assert build.build_model(Config(), tiny.family()).config.bias_activation_fusion is False


def steps_taken(model: LMM, parallel: ParallelConfig | None = None) -> list[float]:
    """Loss and gradient norm of four optimizer steps: pictures and texts, one text alone, one picture, all again."""
    prompts = {str(i): tiny.prompt(i, 12 + i, tiles=i % 3) for i in range(6)}
    groups = [TrainGroup(Query(name, "?", (), "1"), tiny.tokens(int(name), 5, 3)) for name in prompts]
    config = OptimizerConfig(lr=1e-3, microbatch_tokens=40)
    trainer = Trainer(model, config, lambda query: prompts[query.id], 10, parallel)
    stats = [trainer.step(part) for part in (groups, [groups[0]], [groups[3]], groups)]
    return [number for each in stats for number in (each.loss, each.grad_norm)]


# -- reductions under way, and unequal stages ------------------------------------------------------------------------


def stepped(overlap: bool, shared: bool, first: int | None = None) -> list[float]:
    pipeline = 1 if first is None else 2
    parallel = ParallelConfig(
        pipeline=pipeline, first_stage_layers=first, overlap_reduction=overlap, distributed_optimizer=shared
    )
    distributed.initialize(parallel, 0)
    family = tiny.family()
    family.language = replace(family.language, layers=3)
    model = build_model(Config(parallel=parallel), family)
    assert len(model.language.decoder.layers) == (3 if first is None else [first, 3 - first][not model.pre_process])
    return steps_taken(model, parallel)


@pytest.mark.parametrize("shared", [False, True])
def test_overlapped_reduction_gives_the_same_sums(shared: bool) -> None:
    """Also where a rank, a step, or all ranks have no picture or no share: every parameter is waited for."""
    plain, overlapped = (run_parallel(2, "test_training_path:stepped", overlap, shared) for overlap in (False, True))
    assert plain[0] == pytest.approx(plain[1])
    assert overlapped == plain


@pytest.mark.parametrize("first", [1, 2])
def test_stages_may_have_unlike_numbers_of_layers(first: int) -> None:
    whole = run_parallel(1, "test_training_path:stepped", False, False)[0]
    for rank in run_parallel(2, "test_training_path:stepped", False, False, first):
        assert rank == pytest.approx(whole, rel=1e-5)


def test_layers_of_stages() -> None:
    assert layers_of_stages(24, 4) == [6] * 4 and layers_of_stages(24, 1, 7) == [24]
    assert layers_of_stages(24, 4, 3) == [3, 7, 7, 7] and layers_of_stages(3, 2, 1) == [1, 2]
    with pytest.raises(ValueError, match="parallel.pipeline 5 does not divide the model's 24 layers"):
        layers_of_stages(24, 5)
    for first, left in ((4, 20), (24, 0), (0, 24), (30, 0)):
        with pytest.raises(ValueError, match=f"first_stage_layers {first} leaves {left} of the model's 24 layers"):
            layers_of_stages(24, 4, first)
    family = tiny.family()
    parallel = ParallelConfig(pipeline=2, first_stage_layers=2)
    with pytest.raises(ValueError, match="first_stage_layers 2 leaves 0 of the model's 2 layers"):
        check_divisible(Config(parallel=parallel), family.vision, family.language)


# -- plain attention in chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "R", "kilobytes"), [(5, 3, 40), (3, 17, 25), (4, 7, 1)])
def test_plain_attention_never_has_more_scores_than_a_chunk(
    n: int, R: int, kilobytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of continuations, of rows of one, and of single rows."""
    generator = torch.Generator().manual_seed(n)
    G, Hq, Hk, P, D = 2, 4, 2, 301, 8
    shapes = ((G, n, R, Hq, D), (G, Hk, P, D), (G, Hk, P, D), (G, n, Hk, R, D), (G, n, Hk, R, D))
    q, k_prefix, v_prefix, k_own, v_own = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    prefix_bias = torch.zeros(G, P).masked_fill(torch.arange(P) > torch.tensor([[290], [P]]), -torch.inf)
    own_bias = torch.zeros(R, R).masked_fill(torch.ones(R, R, dtype=torch.bool).triu(1), -torch.inf)[None, None]
    direction = torch.randn(shapes[0], generator=generator, dtype=torch.float64)

    def run() -> tuple[Tensor, ...]:
        out = prefix_attention(q, k_prefix, v_prefix, prefix_bias, k_own, v_own, own_bias, 0.3)
        return (out, *torch.autograd.grad((out * direction).sum(), (q, k_prefix, v_prefix, k_own, v_own)))

    whole = run()
    monkeypatch.setattr(dispatch, "_chunk_bytes", kilobytes * 1024)
    rows: list[int] = []
    module = import_module("mstar_mega.kernels.prefix_attention")
    real = module._prefix_reference

    def counted(some: Tensor, *others: Any) -> Tensor:
        rows.append(some[..., 0, 0].numel())
        return real(some, *others)

    monkeypatch.setattr(module, "_prefix_reference", counted)
    for one, other in zip(run(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    bytes_of_row = 4 * Hq * (P + R)
    assert len(rows) > 2 and max(rows) <= max(G, kilobytes * 1024 // bytes_of_row)
    assert sum(rows) == 2 * G * n * R, "once forward, once again in the backward"
