"""The ladder's rows, and the questions that it is asked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One method: how it differs from the base settings, and what the paper has for it."""

    name: str
    words: str
    reference: str = "warmup"
    """The row that it is compared with first of all."""
    paper: tuple[float, float] | None = None
    """MathV360K and MathVista accuracy in percent (arXiv 2412.17451, MiniCPM-V-2.5)."""
    seeds: int = 3
    settings: tuple[str, ...] = ()
    mixin: float | None = None
    """Unlabelled prompts join after this share of the training; None: never."""
    tokens_of: tuple[str, str] | None = None
    """(a row, this row's method at equal responses): trained for as many more passes as that it generates as many
    tokens as the former."""


@dataclass(frozen=True)
class Question:
    """What the ladder is asked: how two of its rows compare, and what the paper would have one expect."""

    words: str
    row: str
    reference: str
    wanted: str = ""
    """``above``: by more than two standard errors; ``not below``: no lower by as much; empty: only asked."""


NO_PRM = ("--selection.rule=all_correct", "--temperature.mode=fixed")
"""The paper's Table 1: every correct response, temperature 1."""
TOP = ("--selection.rule=top_k", "--temperature.mode=fixed")
RANDOM = (*NO_PRM, "--selection.rule=random_k")
SFT = ("--evolve.method=sft",)
OWN: dict[str, tuple[str, ...]] = {
    "continuous_25": ("--evolve.optimizer.lr=4e-5",),
    "iterative_rft": ("--evolve.optimizer.lr=3e-4",),
    "rest_em": ("--evolve.optimizer.lr=3e-4",),
    "random_2": ("--evolve.optimizer.lr=4e-5",),
    "sft": ("--evolve.optimizer.lr=3e-4", "--evolve.passes=24"),
    "sft_warmup": ("--evolve.optimizer.lr=3e-4", "--evolve.passes=24"),
}
"""By method, the settings of step size and length at which it does best on validation questions of another seed, as
benchmarks/ladder_rates.py measures; SFT, which generates nothing, may train for longer. PRM top-2 does best at the rate
that all share."""
VOTING = ("--prompts.unlabelled=voting", *TOP)


def _continuous(interval: float, paper: tuple[float, float], seeds: int = 3) -> Row:
    name = f"continuous_{100 * interval:g}"
    words = f"continuous, {100 * interval:g}% intervals, all correct"
    return Row(name, words, "iterative_rft", paper, seeds, (*NO_PRM, f"--evolve.interval={interval}"))


ROWS = (
    Row("warmup", "warm-up policy", "warmup", (38.8, 52.6), 5),
    _continuous(0.25, (43.1, 57.2), 5),
    Row("top_2", "PRM top-2", "random_2", (45.3, 59.2), 5, TOP),
    Row("random_2", "random-2", "continuous_25", (41.0, 55.5), 5, RANDOM),
    Row("iterative_rft", "Iterative RFT", "warmup", (42.3, 55.7), 5, (*NO_PRM, "--evolve.method=iterative_rft")),
    Row("rest_em", "ReST-EM", "warmup", (42.3, 55.1), 5, (*NO_PRM, "--evolve.method=rest_em")),
    Row("likelihood_2", "2 of the policy's own highest likelihood", "random_2", None, 5,
        (*NO_PRM, "--selection.rule=likelihood")),
    Row("reward_pass_at_2", "PRM top-2, temperature by Reward-Pass@2", "top_2", (45.9, 59.5), 5),
    Row("pass_at_2", "PRM top-2, temperature by Pass@K", "top_2", (42.8, 58.0), 5, ("--temperature.mode=pass_at_k",)),
    Row("right_reasoning_2", "ceiling: 2 whose reasoning is right, by the task's own program", "top_2", None, 3,
        (*NO_PRM, "--selection.rule=right_reasoning")),
    Row("sft", "SFT on the answers, from the base model", "warmup", (44.3, 54.8), 5,
        (*SFT, *OWN["sft"])),
    Row("sft_warmup", "SFT on the answers, from the warm-up policy", "warmup", None, 5,
        (*SFT, "--evolve.start_from=warmup", *OWN["sft_warmup"])),
    Row("continuous_25_own", "continuous, all correct, at its own learning rate", "iterative_rft_own", None, 5,
        (*NO_PRM, *OWN["continuous_25"])),
    Row("random_2_own", "random-2 at its own learning rate", "top_2", None, 5, (*RANDOM, *OWN["random_2"])),
    Row("iterative_rft_own", "Iterative RFT at its own learning rate", "warmup", None, 5,
        (*NO_PRM, "--evolve.method=iterative_rft", *OWN["iterative_rft"])),
    Row("rest_em_own", "ReST-EM at its own learning rate", "warmup", None, 5,
        (*NO_PRM, "--evolve.method=rest_em", *OWN["rest_em"])),
    Row("temperature_0.7", "PRM top-2 at temperature 0.7", "top_2", None, 3, (*TOP, "--temperature.value=0.7")),
    Row("temperature_1.3", "PRM top-2 at temperature 1.3", "top_2", None, 3, (*TOP, "--temperature.value=1.3")),
    Row("top_2_above", "PRM top-2 of those above 0.5", "top_2", None, 3, (*TOP, "--selection.rule=top_k_above")),
    Row("threshold", "PRM above 0.5", "continuous_25", (43.8, 57.5), 3, (*TOP, "--selection.rule=threshold")),
    Row("top_1", "PRM top-1", "top_2", (43.0, 59.0), 3, (*TOP, "--selection.k=1")),
    Row("top_4", "PRM top-4", "top_2", (44.0, 58.4), 3, (*TOP, "--selection.k=4")),
    Row("random_2_more", "random-2, as many tokens generated as by PRM top-2", "top_2", None, 3, RANDOM,
        tokens_of=("top_2", "random_2")),
    Row("continuous_25_more", "all correct, as many tokens generated as by PRM top-2", "top_2", None, 3, NO_PRM,
        tokens_of=("top_2", "continuous_25")),
    _continuous(1.0, (42.2, 56.7)),
    _continuous(0.5, (43.1, 56.2)),
    _continuous(0.125, (42.3, 56.1)),
    _continuous(0.0625, (41.0, 56.8)),
    Row("oracle", "with unlabelled prompts, true answers", "continuous_25", (42.5, 58.2), 3,
        (*NO_PRM, "--prompts.unlabelled=oracle"), mixin=0.0),
    Row("oracle_top_2", "with unlabelled prompts, true answers, PRM top-2", "top_2", (42.9, 59.1), 3,
        (*TOP, "--prompts.unlabelled=oracle"), mixin=0.0),
    Row("voting_0", "with unlabelled prompts by voting, from the start", "top_2", (43.3, 58.2), 3, VOTING, mixin=0.0),
    Row("voting_25", "... after 25%", "top_2", (42.4, 57.6), 3, VOTING, mixin=0.25),
    Row("voting_50", "... after 50%", "top_2", (42.9, 58.2), 3, VOTING, mixin=0.5),
    Row("voting_75", "... after 75%", "top_2", (45.0, 58.8), 3, VOTING, mixin=0.75),
)  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}
DEFAULT_SEEDS = [1, 2, 3, 4, 5]
"""Not 0: the task and the settings were made while looking at its test questions."""

QUESTIONS = (
    Question("continuous or Iterative RFT?", "continuous_25", "iterative_rft", "above"),
    Question("continuous or ReST-EM?", "continuous_25", "rest_em", "above"),
    Question("continuous or Iterative RFT, each at its own rate?", "continuous_25_own", "iterative_rft_own", "above"),
    Question("continuous or ReST-EM, each at its own rate?", "continuous_25_own", "rest_em_own", "above"),
    Question("the PRM's 2 or random 2?", "top_2", "random_2", "above"),
    Question("the PRM's 2 or random 2, each at its own rate?", "top_2", "random_2_own", "above"),
    Question("the PRM's 2 or all correct, each at its own rate?", "top_2", "continuous_25_own", "not below"),
    Question("the PRM's 2 or all correct?", "top_2", "continuous_25", "not below"),
    Question("the PRM's 2 or the policy's own likeliest 2?", "top_2", "likelihood_2", "above"),
    Question("the policy's own likeliest 2 or random 2?", "likelihood_2", "random_2"),
    Question("a perfect judge of reasoning or the PRM?", "right_reasoning_2", "top_2"),
    Question("a perfect judge of reasoning or random 2?", "right_reasoning_2", "random_2"),
    Question("Reward-Pass@2's temperature or 0.7?", "reward_pass_at_2", "temperature_0.7", "not below"),
    Question("Reward-Pass@2's temperature or 1.0?", "reward_pass_at_2", "top_2", "not below"),
    Question("Reward-Pass@2's temperature or 1.3?", "reward_pass_at_2", "temperature_1.3", "not below"),
    Question("Reward-Pass@2's temperature or Pass@K's?", "reward_pass_at_2", "pass_at_2", "not below"),
    Question("a threshold or the PRM's 2?", "top_2", "threshold", "above"),
    Question("the PRM's 2 or its 1?", "top_2", "top_1"),
    Question("the PRM's 2 or its 4?", "top_2", "top_4"),
    Question("is a threshold on top of it better?", "top_2_above", "top_2"),
    Question("at equal tokens generated: the PRM's 2 or random 2?", "top_2", "random_2_more", "above"),
    Question("at equal tokens generated: the PRM's 2 or all correct?", "top_2", "continuous_25_more", "not below"),
    Question(
        "evolving or SFT from the warm-up policy, each at its own rate?", "continuous_25_own", "sft_warmup", "above"
    ),
    Question("the whole recipe or its warm-up policy?", "reward_pass_at_2", "warmup", "above"),
    Question("unlabelled prompts late or at the start?", "voting_75", "voting_0", "above"),
    Question("unlabelled prompts late or never?", "voting_75", "top_2"),
)
