"""The four training methods that the paper compares, as settings of one loop (arXiv 2412.17451, section 3), and what
the settings need."""

from __future__ import annotations

from dataclasses import dataclass

from mstar_mega.config import Config, EvolveConfig
from mstar_mega.functions import is_path, load
from mstar_mega.rewards.selection import uses_scores


@dataclass(frozen=True)
class ResolvedMethod:
    """What a method means for the loop."""

    interval: float
    """Share of the labelled queries in one iteration."""
    inherit_optimizer: bool
    """Carry the optimizer's and the scheduler's state from iteration to iteration."""
    start_from: str
    """Weights at the start of an iteration: ``last``, ``warmup`` or ``base``."""
    starts_once: bool = False
    """All iterations are one training: only the first begins there, the others go on."""


METHODS = {
    # One run of training whose data are refreshed: nothing starts over between iterations.
    "continuous": ResolvedMethod(interval=0.25, inherit_optimizer=True, start_from="last"),
    "iterative_rft": ResolvedMethod(interval=1.0, inherit_optimizer=False, start_from="last"),
    "rest_em": ResolvedMethod(interval=1.0, inherit_optimizer=False, start_from="warmup"),
    # No responses are sampled: one training on the gold answers, from the model that nothing has warmed up.
    "sft": ResolvedMethod(interval=1.0, inherit_optimizer=True, start_from="base", starts_once=True),
}


def resolve_method(evolve: EvolveConfig) -> ResolvedMethod:
    """The method's own choices, each replaced where ``evolve`` gives another."""
    own = METHODS[evolve.method]
    inherit = own.inherit_optimizer if evolve.optimizer_state is None else evolve.optimizer_state == "inherit"
    return ResolvedMethod(
        interval=own.interval if evolve.interval is None else evolve.interval,
        inherit_optimizer=inherit,
        start_from=own.start_from if evolve.start_from is None else evolve.start_from,
        starts_once=own.starts_once,
    )


def needs_prm(config: Config) -> bool:
    """Whether any setting uses process scores."""
    return config.evolve.method != "sft" and (
        uses_scores(config.selection)
        or config.temperature.mode == "reward_pass_at_k"
        or (is_path(mode := config.temperature.mode) and getattr(load("temperature.mode", mode), "needs_scores", True))
        or config.prompts.unlabelled == "voting"
    )
