"""What each setting may be, alone and together with others."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mstar_mega.config import (
    Config,
    DataName,
    Reduction,
    RewardName,
    SelectionRule,
    TemperatureMode,
    TemplateName,
    WeightName,
)
from mstar_mega.functions import is_path
from mstar_mega.settings.tree import flatten, shown


@dataclass(frozen=True)
class _Rule:
    allowed: str
    holds: Callable[[Any], bool]


_COUNT = _Rule("at least 1", lambda x: x >= 1)
MOST_RESPONSES, MOST_MADE = 1_000_000, 1_000_000
"""Lists of so many are made in memory: a forged file must not ask for all of it."""
_RESPONSES = _Rule(f"at least 1 and at most {MOST_RESPONSES:,}", lambda x: 1 <= x <= MOST_RESPONSES)
_SLOTS = _Rule("auto or at least 1", lambda x: x == "auto" or x >= 1)
_COUNT_OR_ZERO = _Rule("at least 0", lambda x: x >= 0)
_SEED = _Rule("at least 0 and below 2^63", lambda x: 0 <= x < 2**63)
_POSITIVE = _Rule("a finite number above 0", lambda x: 0 < x < math.inf)
_NOT_NEGATIVE = _Rule("a finite number of at least 0", lambda x: 0 <= x < math.inf)
_SHARE = _Rule("above 0 and at most 1", lambda x: 0 < x <= 1)
_UNIT = _Rule("between 0 and 1", lambda x: 0 <= x <= 1)
_INSIDE_UNIT = _Rule("above 0 and below 1", lambda x: 0 < x < 1)
_DECAY = _Rule("at least 0 and below 1", lambda x: 0 <= x < 1)
_TEXT = _Rule("a text that is not empty", lambda x: bool(x.strip()))
_NOT_EMPTY = _Rule("a text that is not empty", lambda x: bool(x))
_GRID = _Rule("a list of at least one temperature above 0", lambda x: bool(x) and all(map(_POSITIVE.holds, x)))


def _named(names: Any) -> _Rule:
    known = typing.get_args(names)
    return _Rule(
        f"one of {', '.join(known)}, or a function's path as in my/file.py:function (docs/functions.md)",
        lambda x: x in known or is_path(x),
    )


RESETTING = ("iterative_rft", "rest_em")
"""Methods that reset the optimizer between iterations by themselves (``recipe/method.py``)."""

_NAMES_OF_RULE = (
    (
        _COUNT,
        """
        run.checkpoint_every_steps run.keep_checkpoints parallel.tensor parallel.pipeline
        parallel.first_stage_layers
        data.warmup_examples data.labelled_queries data.validation_queries data.test_queries data.prefetch_mb
        data.max_prompt_tokens generation.max_new_tokens
        generation.prefill_tokens generation.queries_per_block
        optimizer.batch_size optimizer.microbatch_tokens annotate.queries
        evolve.epochs temperature.every kernels.chunk_mb
        """,
    ),
    (
        _RESPONSES,
        """
        annotate.responses annotate.rollouts warmup.responses warmup.keep evolve.responses selection.k evaluation.k
        evaluation.reward_k temperature.k temperature.responses temperature.queries
        """,
    ),
    (
        _COUNT_OR_ZERO,
        """
        warmup.queries data.unlabelled_queries data.workers generation.top_k generation.log_prob_gap_queries
        optimizer.warmup_steps evolve.max_steps evaluation.every evaluation.test_every report.samples_per_iteration
        prm.refresh_every
        """,
    ),
    (_SEED, "seed"),
    (_SLOTS, "generation.slots"),
    (
        _POSITIVE,
        """
        run.stale_seconds run.hang_minutes generation.log_prob_gap_limit optimizer.eps warmup.epochs warmup.temperature
        annotate.temperature prm.epochs
        temperature.value
        """,
    ),
    (
        _NOT_NEGATIVE,
        """
        run.grace_seconds run.wait_seconds optimizer.lr optimizer.min_lr optimizer.weight_decay optimizer.clip_grad
        evolve.passes temperature.tolerance prompts.ratio
        """,
    ),
    (_SHARE, "reward.threshold generation.top_p evolve.interval optimizer.decay_share data.labelled_share"),
    (_UNIT, "selection.threshold prompts.mixin"),
    (_INSIDE_UNIT, "annotate.held_out"),
    (_DECAY, "optimizer.beta1 optimizer.beta2"),
    (
        _TEXT,
        """
        run.dir model.family model.size model.checkpoint prm.checkpoint data.dir data.path data.images data.warmup_file
        """,
    ),
    (_named(DataName), "data.name"),
    (_named(TemplateName), "data.template"),
    (_named(RewardName), "reward.function"),
    (_named(Reduction), "prm.reduction"),
    (_named(SelectionRule), "selection.rule"),
    (_named(WeightName), "selection.weight"),
    (_named(TemperatureMode), "temperature.mode"),
    (_NOT_EMPTY, "prm.good_token prm.bad_token prm.step_mark"),
    (_GRID, "temperature.grid"),
)
_RULES = {name: rule for rule, names in _NAMES_OF_RULE for name in names.split()}


def _rule(name: str) -> _Rule | None:
    # The three optimizers share their rules: warmup.optimizer.lr -> optimizer.lr.
    return _RULES.get(name) or _RULES.get(name.partition(".")[2])


def validate(config: Config) -> None:
    """Raises ValueError for the first senseless value: its name, the value, and what is allowed."""
    flat = flatten(config)
    for name, value in flat.items():
        rule = _rule(name)
        if rule is not None and value is not None and not rule.holds(value):
            raise ValueError(f"{name} is {shown(value)}: it must be {rule.allowed}")
    for stage in ("warmup", "prm", "evolve"):
        lr, min_lr = flat[f"{stage}.optimizer.lr"], flat[f"{stage}.optimizer.min_lr"]
        if min_lr > lr:
            raise ValueError(f"{stage}.optimizer.min_lr is {min_lr}: it must be at most {stage}.optimizer.lr, {lr}")
    _validate_pairs(config)


def _validate_pairs(config: Config) -> None:
    temperature, evaluation = config.temperature, config.evaluation
    _validate_prm(config)
    for name in ("warmup_examples", "labelled_queries", "unlabelled_queries", "validation_queries", "test_queries"):
        wanted = getattr(config.data, name)
        if config.data.name == "digits" and wanted is not None and wanted > MOST_MADE:
            raise ValueError(f"data.{name} is {wanted}: the built-in task makes at most {MOST_MADE:,} of a kind")
    if config.data.warmup_answers and config.data.warmup_file is not None:
        raise ValueError("data.warmup_answers is true and data.warmup_file is given: the warm-up takes one of them")
    if config.data.name == "digits" and config.data.template is not None:
        raise ValueError("data.template is set, and the questions of data.name digits come ready: leave it out")
    if config.parallel.first_stage_layers is not None and config.parallel.pipeline == 1:
        raise ValueError("parallel.first_stage_layers is given and parallel.pipeline is 1: there is one stage")
    if config.parallel.sequence and config.parallel.tensor == 1:
        raise ValueError("parallel.sequence is True: it needs parallel.tensor of at least 2, which is 1")
    if config.evolve.max_steps == 0 and config.evolve.passes == 0:
        raise ValueError("evolve.max_steps and evolve.passes are both 0: one must be above 0, or the run never ends")
    # With a reset optimizer the schedule starts over in each iteration and falls within it.
    inherits = (
        config.evolve.optimizer_state or ("reset" if config.evolve.method in RESETTING else "inherit")
    ) != "reset"
    if inherits and config.evolve.max_steps == 0 and config.evolve.optimizer.schedule != "constant":
        raise ValueError(
            f"evolve.optimizer.schedule is '{config.evolve.optimizer.schedule}' and evolve.max_steps is 0: a learning "
            "rate that falls needs the number of steps; set evolve.max_steps, or the schedule to constant"
        )
    interval = config.evolve.interval
    if interval is not None and abs(1 / interval - round(1 / interval)) > 1e-6:
        near = 1 / max(1, round(1 / interval))
        raise ValueError(
            f"evolve.interval is {interval}: a pass must be a whole number of iterations; use 1, 0.5, 0.25 ... "
            f"(the nearest is {near:.6g})"
        )
    if temperature.k > temperature.responses:
        raise ValueError(
            f"temperature.k is {temperature.k}: it must be at most temperature.responses, {temperature.responses}"
        )
    if evaluation.reward_k > evaluation.k:
        raise ValueError(
            f"evaluation.reward_k is {evaluation.reward_k}: it must be at most evaluation.k, {evaluation.k}, "
            "the responses that are sampled"
        )
    if config.prompts.unlabelled != "none" and config.data.unlabelled_queries == 0:
        raise ValueError(
            f"prompts.unlabelled is '{config.prompts.unlabelled}': it needs data.unlabelled_queries above 0, which is 0"
        )
    if config.prompts.unlabelled != "none" and config.data.name == "mathv360k" and config.data.labelled_share == 1:
        raise ValueError(
            f"prompts.unlabelled is '{config.prompts.unlabelled}': it needs data.labelled_share below 1, which is 1"
        )


def _validate_prm(config: Config) -> None:
    prm = config.prm
    words = {"good_token": prm.good_token, "bad_token": prm.bad_token, "step_mark": prm.step_mark}
    given = [f"prm.{name}" for name, value in words.items() if value is not None]
    if given and prm.checkpoint is None:
        raise ValueError(f"{given[0]} is given without prm.checkpoint: it says how a PRM from outside is read")
    if given and None in (prm.good_token, prm.bad_token):
        raise ValueError(f"{given[0]} is given alone: prm.good_token and prm.bad_token belong together")
    if prm.checkpoint is not None and prm.refresh_every:
        raise ValueError(
            f"prm.refresh_every is {prm.refresh_every} and prm.checkpoint is given: a PRM from outside is not trained "
            "on; set prm.refresh_every to 0"
        )
