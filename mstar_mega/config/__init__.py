"""Every setting of a run, as one typed tree. Defaults stand in this package and nowhere else.

The defaults are the paper's final recipe (arXiv 2412.17451). Where the paper is silent the field's comment says so and
the value is our documented choice. Small or large runs override them in ``examples/configs/*.yaml`` or on the command
line (``--evolve.interval 0.125``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mstar_mega.config.data import DataConfig, DataName, TemplateName
from mstar_mega.config.engine import GenerationConfig, KernelsConfig
from mstar_mega.config.measuring import BenchmarkConfig, EvaluationConfig, ReportConfig

__all__ = [
    "AnnotateConfig", "BenchmarkConfig", "Config", "DataConfig", "DataName", "EvaluationConfig", "EvolveConfig",
    "GenerationConfig", "KernelsConfig", "LossMean", "Method", "ModelConfig", "OptimizerConfig", "PRMConfig",
    "ParallelConfig", "PromptsConfig", "Recompute", "Reduction", "ReportConfig", "RewardConfig", "RewardName",
    "RunConfig", "SelectionConfig", "SelectionRule", "TemperatureConfig", "TemperatureMode", "TemplateName",
    "WarmupConfig", "WeightName",
]  # fmt: skip

Method = Literal["continuous", "iterative_rft", "rest_em", "sft"]
SelectionRule = Literal[
    "top_k", "top_k_above", "threshold", "likelihood", "random_k", "all_correct", "right_reasoning"
]  # fmt: skip
Reduction = Literal["min", "prod", "mean", "last"]
LossMean = Literal["token", "response"]
Recompute = Literal["none", "selective", "full"]
TemperatureMode = Literal["reward_pass_at_k", "pass_at_k", "fixed"]
RewardName = Literal["answer"]
WeightName = Literal["none", "reward", "score"]
# Settings of these kinds take a function of the user's too: ``module:function`` (mstar_mega/functions.py).


@dataclass
class RunConfig:
    """Where a run lives on disk."""

    dir: str = "runs/mstar"
    """Run directory. The same command resumes what it finds there."""
    allow_changed_settings: bool = False
    """Continue a run directory that was made with other settings."""
    checkpoint_every_steps: int = 200
    """Optimizer steps between checkpoints inside a stage; every stage and iteration also ends with one."""
    keep_checkpoints: int = 2
    """Checkpoints kept per stage; older ones are deleted after a newer one is complete."""
    stale_seconds: float = 60.0
    """A job that holds the run directory on another machine and has shown no sign of life for so long is taken for dead
    and displaced; one that cannot reach the directory for so long ends."""
    wait_seconds: float = 0.0
    """So long a start waits for a living job to leave the run directory; a requeued one waits five minutes at least."""
    hang_minutes: float = 20.0
    """A rank that has shown no sign of life, or a job without any progress, for so long is ended with a line that says
    which rank, where, and what it was doing."""
    grace_seconds: float = 20.0
    """So long a block of queries may still take after a signal (SIGTERM, SIGUSR1, Ctrl-C) has asked the job to stop; an
    unfinished one is sampled again by the next start. Below what the batch system grants (SLURM's KillWait: 30 s)."""


@dataclass
class ParallelConfig:
    """Sizes of the model-parallel groups; data parallel is what is left of the job's ranks."""

    tensor: int = 1
    pipeline: int = 1
    first_stage_layers: int | None = None
    """Layers of the language model on the first pipeline stage, which has the vision tower as well; None: as many as on
    each of the others."""
    sequence: bool = False
    """Sequence parallelism of the language model's norms and residuals (needs tensor > 1)."""
    distributed_optimizer: bool = False
    """Share the optimizer's state (12 bytes a parameter in bfloat16) out over the data-parallel ranks. Sums are then
    taken in another order: results are equal but for rounding."""
    overlap_reduction: bool | None = None
    """Add up gradients over the data-parallel ranks while the backward pass goes on; None: on CUDA. Same sums."""


@dataclass
class ModelConfig:
    """Which policy, at which size."""

    family: str = "internvl2"
    size: str = "digits"
    """A named size of the family (``mstar_mega/models/families``); read by nothing when there is a checkpoint."""
    checkpoint: str | None = None
    """A converted checkpoint (``mstar convert``): sizes, tokenizer and first weights come from it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    recompute: Recompute = "none"
    """What of the language model's layers is computed again in the backward pass instead of being kept. selective: core
    attention and MLP, the most of what a layer keeps; full: all but each layer's input."""
    recompute_vision: bool = False
    """Keep only each vision block's input, likewise."""
    fused_layers: bool | None = None
    """In training, megatron's fused SwiGLU and residual addition (through torch.compile); None: on CUDA. Where apex's
    ``fused_weight_gradient_mlp_cuda`` is importable, weight gradients are also added up inside their product."""


@dataclass
class OptimizerConfig:
    """AdamW through megatron-core. The paper gives learning rate, constant schedule and batch size only."""

    lr: float = 1e-6
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """How the learning rate falls to min_lr; wsd: constant, then linear over the last ``decay_share`` of the steps."""
    decay_share: float = 0.3
    min_lr: float = 0.0
    warmup_steps: int = 0
    """Steps of linear learning-rate warm-up."""
    batch_size: int = 128
    """Responses per optimizer step, over all ranks."""
    shuffle: Literal["responses", "queries"] = "responses"
    """What is shuffled into steps. responses: each by itself, as SFT does; those of a query that meet in a step share
    its image and prompt. queries: all responses of a query in one step, which costs less to compute and makes the step
    one of few queries: fewer than ten where sixteen responses each are trained on in batches of 128. What scattering
    costs is in benchmarks/README.md."""
    loss_mean: LossMean = "token"
    """What the loss is a mean over, in the whole batch. token: every counted token (the PRM: step) weighs the same, a
    long response more than a short one. response: every response weighs the same (the paper is silent; the sum over a
    batch's tokens is what megatron and most SFT trainers take)."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    """On matrices and embeddings, not on norms and biases."""
    clip_grad: float = 1.0
    microbatch_tokens: int = 4096
    """Most tokens (prompts and responses, unpadded) in one microbatch of one rank. Responses of a query that do not fit
    together are divided; one prompt with one response is never."""


@dataclass
class WarmupConfig:
    """Warm-up SFT on written-out chains of thought (paper section 3, 'CoT unlocking')."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    epochs: float = 1.0
    queries: int = 0
    """For ``mstar warmup-data``: labelled queries that are asked for their reasoning; 0: all (the paper: 100K kept)."""
    responses: int = 4
    """For ``mstar warmup-data``: responses sampled per query, the gold answer given (the paper is silent)."""
    keep: int = 1
    """For ``mstar warmup-data``: most responses kept per query, of those with the gold answer (the paper is silent)."""
    temperature: float = 1.0
    """For ``mstar warmup-data``."""


@dataclass
class AnnotateConfig:
    """Monte-Carlo step labels from the warm-up policy (the paper is silent on the counts)."""

    queries: int = 3125
    """Labelled queries to annotate; with 16 responses each, 50K annotated responses."""
    responses: int = 16
    """Responses sampled per query."""
    rollouts: int = 8
    """Continuations sampled from each step boundary."""
    temperature: float = 1.0
    held_out: float = 0.1
    """Share of the annotated queries kept out of PRM training, to measure its quality."""


@dataclass
class PRMConfig:
    """Process reward model: the policy's trunk with a head that scores every reasoning step."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-6, schedule="cosine"))
    head: Literal["linear", "likelihood"] = "linear"
    """linear: two rows at each step's end. likelihood: besides, how likely the PRM itself finds the step and what came
    before it, so that a small or little-trained model judges by what it can already read."""
    epochs: float = 2.0
    labels: Literal["hard", "soft"] = "hard"
    """hard: 1 if any continuation reaches the gold answer; soft: the share that does."""
    freeze_vision: bool = True
    reduction: Reduction | str = "min"
    """How step scores become the response's process score; or a function of your own (docs/functions.md)."""
    checkpoint: str | None = None
    """A PRM from outside, instead of annotating and training one: another run's directory, or a converted checkpoint
    (``mstar convert``). It may be of another family than the policy, with its own tokenizer and image preprocessing.
    The settings of its training say nothing then."""
    good_token: str | None = None
    """For a ``prm.checkpoint`` without a score head: its token for a good step. The score is this token's probability
    against ``bad_token``'s, next after the step or its mark."""
    bad_token: str | None = None
    step_mark: str | None = None
    """What such a PRM has behind each step, in front of the blank line: a text or a control symbol. None: nothing."""
    refresh_every: int = 0
    """Iterations between two refreshes of the PRM: the present policy annotates other queries (as ``annotate`` says),
    and the PRM is trained on from its present weights with a fresh optimizer and schedule. 0: never (the paper)."""


@dataclass
class EvolveConfig:
    """Self-evolving training (paper section 3)."""

    method: Method = "continuous"
    interval: float | None = None
    """Share of the labelled queries per iteration; None: the method's own (continuous 0.25, others 1.0)."""
    optimizer_state: Literal["inherit", "reset"] | None = None
    """Optimizer and scheduler between iterations; None: the method's own (iterative_rft and rest_em reset, continuous
    and sft inherit). A schedule that is reset falls within each iteration."""
    start_from: Literal["last", "warmup", "base"] | None = None
    """Weights at the start of an iteration; base: those before the warm-up. None: the method's own (rest_em warmup, sft
    base, others last). sft's iterations are one training: it starts there once, and goes on."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    epochs: int = 1
    """Passes over each iteration's selected responses."""
    responses: int = 16
    """Responses sampled per query."""
    max_steps: int = 10_000
    """Optimizer steps in total, the warm-up's included (of sft from the base too); 0: no limit. The iteration that
    reaches it is the last, and is trained whole: nothing is generated for nothing (the paper's ends at 10,066)."""
    passes: float = 0.0
    """Passes over the labelled queries, up to whole iterations; 0: no limit. The run ends at whichever limit comes
    first."""


@dataclass
class RewardConfig:
    """The answer reward: which responses count as correct."""

    function: RewardName | str = "answer"
    """answer: the response's answer equals the gold one (docs/answers.md). Or a function of your own, graded from 0
    to 1 (docs/functions.md)."""
    threshold: float = 1.0
    """For a function of your own: a response counts as correct from this reward on."""


@dataclass
class SelectionConfig:
    """Which correct responses are trained on (paper section 4, operator H)."""

    rule: SelectionRule | str = "top_k"
    """Of a query's correct responses, top_k: the k of highest process score; threshold: all above the threshold;
    top_k_above: the k best of those; likelihood: the k of highest mean log-probability per token by the policy that
    drew them, at their sampling temperature (needs no PRM); random_k; all_correct. right_reasoning is no method
    but the ceiling of them all, for analysis only: random k of those whose reasoning the task's own program says is
    right, where the task has one. Or a function of your own (docs/functions.md), which sees all responses."""
    k: int = 2
    """For all but threshold and all_correct."""
    threshold: float = 0.5
    """For threshold and top_k_above: keep correct responses whose process score is above it (the paper's alpha is
    unknown)."""
    distinct: bool = False
    """Count responses of a query with the same tokens once: in the selection, in Reward-Pass@K and in the Pass@K of
    random responses beside it (the paper is silent)."""
    weight: WeightName | str = "none"
    """What a selected response counts in the loss: none, all the same; reward, its answer reward; score, its process
    score; or a function of your own (docs/functions.md). Below 0 it is made less likely. The loss is divided by the
    number of tokens (responses), not by the sum of weights."""


@dataclass
class PromptsConfig:
    """Prompt variation (paper section 5). The final recipe uses labelled prompts only."""

    unlabelled: Literal["none", "voting", "oracle"] = "none"
    """voting: pseudo answers by PRM-weighted vote; oracle: the hidden true answers."""
    mixin: float = 0.0
    """Share of the budget of steps (the warm-up's included) or passes that is spent before unlabelled prompts join
    (T_mixin)."""
    ratio: float | None = None
    """Most unlabelled queries per labelled one in an iteration; None: as large a share of theirs as of the labelled
    (the paper is silent)."""


@dataclass
class TemperatureConfig:
    """Sampling temperature of the training rollouts (paper section 6.3, automatic balancing)."""

    mode: TemperatureMode | str = "reward_pass_at_k"
    """What a sweep goes by; or a function of your own (docs/functions.md)."""
    value: float = 1.0
    """The temperature when mode is fixed, and the one in use before the first sweep."""
    grid: list[float] = field(default_factory=lambda: [round(0.3 + 0.1 * i, 1) for i in range(14)])
    tolerance: float = 0.0
    """Of the temperatures within so many standard errors of the best, the one nearest to that in use is taken: a change
    that the sweep cannot tell from noise is not made. 0: the best; of equal ones the nearest (the paper is silent)."""
    every: int = 2
    """Iterations between two sweeps; the first is before the first iteration."""
    k: int = 2
    """K of Reward-Pass@K (or Pass@K) in the sweep."""
    responses: int = 16
    """Responses per validation query and temperature (the paper is silent)."""
    queries: int = 250
    """Validation queries used in the sweep."""


@dataclass
class Config:
    """The whole tree. ``config.yaml`` in a run directory is one of these, resolved."""

    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    prm: PRMConfig = field(default_factory=PRMConfig)
    evolve: EvolveConfig = field(default_factory=EvolveConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    temperature: TemperatureConfig = field(default_factory=TemperatureConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
