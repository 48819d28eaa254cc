"""What the fields of events may be, for whatever shows them: a log may have been damaged, or come from a stranger.

A field means the same in every event, so one schema serves all. A field that is not named here passes; a new one whose
type matters to a plot or table belongs here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mstar_mega.platform.inputs import problems

_Whole = Annotated[int, Field(ge=0, lt=1 << 53)]
_Number = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)] | Literal["NaN", "Infinity", "-Infinity"]
_Seconds = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
_Text = Annotated[str, Field(max_length=100_000)]
_ByName = dict[_Text, _Number | None]
_Kept = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class _Point(BaseModel):
    model_config = ConfigDict(strict=True)

    temperature: _Number
    reward_pass_at_k: _Number | None = None
    pass_at_k: _Number | None = None
    pass_at_most_k: _Number | None = None
    random_pass_at_k: _Number | None = None
    difference: _Number | None = None
    difference_stderr: _Number | None = None


class _Quality(BaseModel):
    """Of a process reward model, as a whole and among responses with the right answer."""

    model_config = ConfigDict(strict=True)

    within_query_auc: _Number | None = None
    within_query_auc_stderr: _Number | None = None
    mixed_queries: _Whole | None = None
    right_share: _Number | None = None
    baselines: _ByName | None = None
    baselines_stderr: _ByName | None = None
    difference: _ByName | None = None
    difference_stderr: _ByName | None = None
    pooled_auc: _ByName | None = None
    pooled_step_accuracy: _Number | None = None
    pooled_step_auc: _Number | None = None


class _Layout(BaseModel):
    model_config = ConfigDict(strict=True)

    tensor: _Whole | None = None
    pipeline: _Whole | None = None
    data: _Whole | None = None


class _Fields(_Quality):
    time: _Seconds | None = None
    seconds: _Seconds | None = None
    score_seconds: _Seconds | None = None
    iteration: _Whole | None = None
    step: _Whole | None = None
    steps: _Whole | None = None
    total_steps: _Whole | None = None
    world_size: _Whole | None = None
    k: _Whole | None = None
    reward_k: _Whole | None = None
    most_k: _Whole | None = None
    computed_tokens: _Whole | None = None
    queries: _Whole | None = None
    responses: _Whole | None = None
    rollouts: _Whole | None = None
    tokens: _Whole | None = None
    truncated: _Whole | None = None
    without_steps: _Whole | None = None
    correct: _Whole | None = None
    queries_without_correct: _Whole | None = None
    unlabelled_queries: _Whole | None = None
    queries_with_selection: _Whole | None = None
    selected: _Whole | None = None
    peak_memory_bytes: _Whole | None = None
    loss: _Number | None = None
    grad_norm: _Number | None = None
    learning_rate: _Number | None = None
    greedy_accuracy: _Number | None = None
    standard_error: _Number | None = None
    pass_at_k: _Number | None = None
    reward_pass_at_k: _Number | None = None
    best_of_n: _Number | None = None
    weighted_vote: _Number | None = None
    majority_vote: _Number | None = None
    positive_share: _Number | None = None
    accuracy: _Number | None = None
    auc: _Number | None = None
    threshold: _Number | None = None
    temperature: _Number | None = None
    largest: _Number | None = None
    mean: _Number | None = None
    limit: _Number | None = None
    stage: _Text | None = None
    split: _Text | None = None
    mode: _Text | None = None
    rule: _Text | None = None
    what: _Text | None = None
    where: _Text | None = None
    reason: _Text | None = None
    problem: _Text | None = None
    parallel: _Layout | None = None
    by_kind: dict[_Text, _Number] | None = None
    kind_queries: dict[_Text, _Whole] | None = None
    checker: dict[_Text, _Whole] | None = None
    kept_per_query: dict[_Kept, _Whole] | None = None
    grid: list[_Point] | None = None
    pass_at_reward_k: _Number | None = None
    reward_gain: _Number | None = None
    reward_gain_stderr: _Number | None = None
    reasoning: _Quality | None = None
    right_reasoning: dict[_Text, _Number | _ByName | None] | None = None


_SCHEMA = TypeAdapter(_Fields)
_NEEDED = {"selection": ("iteration",), "step": ("step",)}
"""Without these fields an event says nothing."""


def sound(event: dict[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """The event without the fields that are not what they should be (None: nothing is left), and what was wrong."""
    try:
        _SCHEMA.validate_python(event)
    except ValidationError as error:
        bad = {each["loc"][0] for each in error.errors(include_url=False, include_context=False, include_input=False)}
        kept = {key: value for key, value in event.items() if key not in bad}
        # A union's alternatives come one by one: the first of each field says enough.
        first = {line.partition(" ")[0].partition(".")[0]: line for line in reversed(problems(error))}
        is_empty = any(field in bad for field in _NEEDED.get(str(event.get("event")), ()))
        return (None if is_empty else kept), [f"{event.get('event')}: {line}" for line in reversed(first.values())]
    return event, []
