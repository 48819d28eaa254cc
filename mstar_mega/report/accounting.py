"""What a run has generated and trained on: the two measures at which methods can be compared fairly."""

from __future__ import annotations

from typing import Any

from mstar_mega.report.metrics import Event, number
from mstar_mega.report.run import Run

PHASES = ("annotate", "sweeps", "evolve", "evaluate")
MEASURING = ("evaluate",)
"""Phases that training does without: what they generate is no part of a method's price."""
_EVENTS = {"annotation": "annotate", "temperature": "sweeps", "generation": "evolve", "evaluation": "evaluate"}


def generated(run: Run) -> dict[str, dict[str, int]]:
    """Responses (annotation: continuations too) and tokens by phase; ``for_training``: of all but the measurements."""
    return _with_totals(_by_phase(run.events))


def trajectory(run: Run) -> list[dict[str, Any]]:
    """The policy's test accuracy, and what it had cost until then, by iteration; 0: the warm-up policy.

    ``steps``: optimizer steps, the warm-up's included. ``trained_responses``: those of the evolving steps, each as
    often as it was trained on. ``generated_responses`` and ``generated_tokens``: of everything but measurements.
    """
    rows: dict[int, dict[str, Any]] = {}
    before: list[Event] = []
    trained, steps = 0, 0
    for event in run.events:
        before += [event] if event["event"] in _EVENTS else []
        if event["event"] == "step" and event.get("stage") != "prm":
            steps = int(number(event, "step") or 0)
            trained += int(number(event, "responses") or 0) if event.get("stage") == "evolve" else 0
        if event["event"] == "evaluation" and event.get("split") == "test":
            cost = _with_totals(_by_phase(before))["for_training"]
            iteration = int(number(event, "iteration") or 0)
            rows[iteration] = {
                "iteration": iteration,
                "accuracy": number(event, "greedy_accuracy"),
                "standard_error": number(event, "standard_error"),
                "steps": steps,
                "trained_responses": trained,
                "generated_responses": cost["responses"],
                "generated_tokens": cost["tokens"],
            }
    return [rows[iteration] for iteration in sorted(rows)]


def vote_accuracy(run: Run) -> dict[str, Any] | None:
    """How often the pseudo answers of unlabelled queries were right where the true one is known; None: no vote."""
    votes = [event["vote"] for event in run.of("generation") if isinstance(event.get("vote"), dict)]
    if not votes:
        return None
    known, right = (sum(int(number(vote, f"answers_{what}") or 0) for vote in votes) for what in ("known", "right"))
    return {"accuracy": right / known if known else None, "answers_known": known}


def judged_responses(generation: Event) -> float | None:
    """Responses of an event ``generation`` to queries whose answer is known: without those to voted answers."""
    responses, vote = number(generation, "responses"), generation.get("vote")
    voted = number(vote, "responses") if isinstance(vote, dict) else None
    return None if responses is None else responses - (voted or 0.0)


def in_words(phases: dict[str, dict[str, int]]) -> str:
    """One line for the console and the report."""
    names = {"evolve": "evolving", "sweeps": "temperature sweeps", "annotate": "annotation", "evaluate": "evaluation"}
    parts = [
        f"{name} {phases[phase]['responses']:,} ({_short(phases[phase]['tokens'])} tokens)"
        for phase, name in names.items()
    ]
    return f"responses generated: {', '.join(parts)}"


def _by_phase(events: list[Event]) -> dict[str, dict[str, int]]:
    phases = {phase: {"responses": 0, "tokens": 0} for phase in PHASES}
    for event in events:
        phase = _EVENTS.get(event["event"])
        if phase is not None:
            rollouts = number(event, "rollouts") or 0 if phase == "annotate" else 0
            phases[phase]["responses"] += int((number(event, "responses") or 0) + rollouts)
            phases[phase]["tokens"] += int(number(event, "tokens") or 0)
    return phases


def _with_totals(phases: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    def total(of: list[str]) -> dict[str, int]:
        return {what: sum(phases[phase][what] for phase in of) for what in ("responses", "tokens")}

    return {**phases, "for_training": total([p for p in PHASES if p not in MEASURING]), "total": total(list(PHASES))}


def _short(value: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)
