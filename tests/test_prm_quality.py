"""How well process scores order a query's responses, against scikit-learn, and what a person is told of it."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from scripted import Events, make_job, make_task
from sklearn.metrics import roc_auc_score

from mstar_mega.config import Config, SelectionConfig
from mstar_mega.data.types import Group, Query, Response, Task
from mstar_mega.evaluation.prm_quality import measure_quality, measure_reasoning_quality, warn_not_better
from mstar_mega.recipe.blocks import Wanted, stream_blocks
from mstar_mega.recipe.choose import choose
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.evaluate import log_prm_quality
from mstar_mega.recipe.intervals import Interval
from mstar_mega.rewards.selection import mean_log_prob


def drawn(rng: random.Random, count: int, skill: float) -> list[Group]:
    """Queries of very different difficulty; the score knows the query, and by ``skill`` right from wrong."""
    groups = []
    for n in range(count):
        ease, responses = rng.random(), []
        for i in range(rng.randrange(2, 9)):
            right = rng.random() < ease
            length = rng.randrange(1, 6)
            score = round(3 * ease + skill * right + rng.random(), 1)
            log_probs = [rng.uniform(-1, 0) + 0.2 * right for _ in range(length)]
            responses.append(Response(i, [1] * length, "", log_probs, correct=right, score=score))
        groups.append(Group(Query(f"q{n:03d}", "?", (), "1"), responses))
    return groups


def test_against_scikit_learn_query_by_query() -> None:
    groups = drawn(random.Random(1), 80, 0.4)
    groups[3].responses[0].score = None  # nothing to score: the worst
    quality = measure_quality(groups)
    mixed = [group for group in groups if len({r.correct for r in group.responses}) == 2]
    assert 20 < len(mixed) == quality.mixed_queries < len(groups)

    def each(score: Any) -> list[float]:
        return [roc_auc_score([r.correct for r in g.responses], [score(r) for r in g.responses]) for g in mixed]

    def standard_error(values: list[float]) -> float:
        return statistics.stdev(values) / math.sqrt(len(values))

    own = each(lambda r: -9.0 if r.score is None else r.score)
    assert quality.within_query_auc == pytest.approx(statistics.mean(own))
    assert quality.within_query_auc_stderr == pytest.approx(standard_error(own))
    free_scores: dict[str, Any] = {
        "policy_log_prob": mean_log_prob,
        "length": lambda r: -len(r.tokens),
        "constant_per_query": lambda r: 0.0,
    }
    for name, score in free_scores.items():
        free = each(score)
        gaps = [a - b for a, b in zip(own, free, strict=True)]
        assert quality.baselines[name] == pytest.approx(statistics.mean(free))
        assert quality.baselines_stderr[name] == pytest.approx(standard_error(free))
        assert quality.difference[name] == pytest.approx(statistics.mean(gaps))
        assert quality.difference_stderr[name] == pytest.approx(standard_error(gaps))
    everyone = [(g, r) for g in groups for r in g.responses]
    right = [r.correct for _, r in everyone]
    shares = {g.query.id: sum(bool(r.correct) for r in g.responses) / len(g.responses) for g in groups}
    pooled = roc_auc_score(right, [-9.0 if r.score is None else r.score for _, r in everyone])
    assert quality.pooled_auc["process_score"] == pytest.approx(pooled)
    constant = roc_auc_score(right, [shares[g.query.id] for g, _ in everyone])
    assert quality.pooled_auc["constant_per_query"] == pytest.approx(constant)


def test_a_score_that_knows_queries_only_is_found_out() -> None:
    """What an AUC over all responses hides: high there, chance inside a query."""
    quality = measure_quality(drawn(random.Random(2), 300, 0.0))
    assert (quality.pooled_auc["process_score"] or 0) > 0.7
    assert quality.within_query_auc == pytest.approx(0.5, abs=3 * (quality.within_query_auc_stderr or 0))
    assert quality.baselines["constant_per_query"] == 0.5 and (quality.pooled_auc["constant_per_query"] or 0) > 0.8
    warning = warn_not_better(quality)
    assert warning is not None and "chance 0.500 (" in warning and "log-probability" in warning


def test_a_good_score_is_not_warned_of_and_a_free_one_that_is_as_good_is_named() -> None:
    groups = drawn(random.Random(3), 200, 2.0)
    assert warn_not_better(measure_quality(groups)) is None
    for response in (response for group in groups for response in group.responses):
        response.tokens = [1] * (3 if response.correct else 9)
    warning = warn_not_better(measure_quality(groups))
    assert warning is not None and "shortness 1.000 (" in warning and "log-probability" not in warning


def test_nothing_to_order() -> None:
    groups = [Group(Query("q", "?", (), "1"), [Response(i, [1], "", correct=True, score=0.5) for i in range(4)])]
    for quality in (measure_quality(groups), measure_quality([])):
        assert quality.mixed_queries == 0 and quality.within_query_auc is None and warn_not_better(quality) is None
        assert set(quality.baselines.values()) == {None}
    with pytest.raises(ValueError, match="not been judged"):
        measure_quality([Group(Query("q", "?", (), "1"), [Response(0, [1], "")])])


def is_right(query: str, text: str) -> bool | None:
    """The reasoning that says so is right; query ``x``'s is not known."""
    return None if query == "x" else text == "right"


def reasoned() -> list[Group]:
    """Responses (text, correct, score, log-prob): the score orders the reasoning, the likelihood the other way."""
    rows = [("right", True, 0.9, -3.0), ("lucky", True, 0.2, -1.0), ("wrong", False, 0.95, -0.1)]

    def group(id: str) -> Group:
        made = [Response(i, [i], t, [p], correct=c, score=s, answer="1") for i, (t, c, s, p) in enumerate(rows)]
        return Group(Query(id, "?", (), "1"), made)

    return [group(id) for id in "abx"]


def test_reasoning_is_measured_among_right_answers_where_it_is_known() -> None:
    quality = measure_reasoning_quality(reasoned(), is_right)
    assert (quality.mixed_queries, quality.responses, quality.right_share) == (2, 4, 0.5)
    assert quality.within_query_auc == 1.0 and quality.baselines["policy_log_prob"] == 0.0


@pytest.mark.usefixtures("job_of_one")
@pytest.mark.parametrize("known", [True, False])
def test_the_event_and_what_is_said(known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mstar_mega.evaluation.prm_quality.ENOUGH_QUERIES", 1)
    said: list[str] = []
    monkeypatch.setattr(Job, "say", lambda job, text: said.append(text))
    task = Task([], [], [], [], [], check_reasoning=is_right if known else None)
    with make_job(tmp_path, Config(), task) as job:
        log_prm_quality(job, drawn(random.Random(2), 50, 0.0), "evolve", 3, "validation")
        log_prm_quality(job, reasoned(), "prm", 0, "held_out", steps=9)
        assert isinstance(job.metrics, Events)
        first, second = job.metrics.of("prm_quality")
    assert (first["stage"], first["iteration"], first["split"]) == ("evolve", 3, "validation")
    assert second["steps"] == 9 and (second["reasoning"] is not None) == known
    assert len([text for text in said if text.startswith("WARNING")]) == 2, "one each"
    assert any("their reasoning" in text and "AUC 1.000" in text for text in said) == known


@pytest.mark.usefixtures("job_of_one")
def test_right_reasoning_of_what_each_rule_would_select(tmp_path: Path) -> None:
    groups = reasoned()
    queries = [group.query for group in groups]

    def shares(name: str, task: Task, config: SelectionConfig) -> Any:
        with make_job(tmp_path / name, Config(selection=config), task) as job:
            wanted = [Wanted(job.rollouts / "iteration_0001", {})]
            made = ((number, [groups]) for number in range(1))
            (blocks,) = stream_blocks(job, queries, wanted, "sample", lambda _: made)
            choose(job, Interval(1, queries, [], False), blocks)
            assert isinstance(job.metrics, Events)
            return job.metrics.of("selection")[-1].get("right_reasoning")

    config, known = SelectionConfig("top_k", 1, threshold=0.5), Task([], [], [], [], [], check_reasoning=is_right)
    assert shares("unknown", make_task(), config) is None
    right, both, wrong = ({"share": x, "responses": n} for x, n in ((1.0, 2), (0.5, 4), (0.0, 2)))
    found = shares("known", known, config)
    assert found.pop("random_k")["responses"] == 2
    assert found == {"top_k": right, "top_k_above": right, "threshold": right, "likelihood": wrong, "all_correct": both}
    for response in (response for group in groups for response in group.responses):
        response.score = None
    assert shares("unscored", known, SelectionConfig("likelihood", 1)).keys() == {
        "likelihood", "random_k", "all_correct",
    }  # fmt: skip
