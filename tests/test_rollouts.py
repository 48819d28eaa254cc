"""What becomes of drawn responses: labels, answer reward, temperature, selection, and the check of log-probs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import Asked, Events, Scripted, make_job, make_task

from mstar_mega.config import (
    AnnotateConfig,
    Config,
    EvaluationConfig,
    GenerationConfig,
    PromptsConfig,
    SelectionConfig,
    TemperatureConfig,
)
from mstar_mega.data.types import Group, Query
from mstar_mega.generation.engine import Request, Sample
from mstar_mega.recipe import evaluate, rollouts
from mstar_mega.recipe.annotate import annotate
from mstar_mega.recipe.choose import choose
from mstar_mega.recipe.evaluate import measure_exploration
from mstar_mega.recipe.fit import Position
from mstar_mega.recipe.generate import generate, iteration_sampling
from mstar_mega.recipe.intervals import Interval
from mstar_mega.recipe.rollouts import Sampling, rollout
from mstar_mega.recipe.temperature import tune_temperature

pytestmark = pytest.mark.usefixtures("job_of_one")


def query(id: str, answer: str | None = "7", **fields: Any) -> Query:
    return Query(id, f"question {id}", (), answer, **fields)


def score_by_text(job: Any, prm: Any, groups: list[Group]) -> None:
    """In place of a PRM: a response begins with its score."""
    for group in groups:
        for response in group.responses:
            response.score = float(response.text.split()[0])


# ------------------------------------------------------------------------------------------------- annotation

RIGHT, WRONG = "# Answer\n\n7", "# Answer\n\n8"
RESPONSES = {
    "q": [f"good\n\nso\n\n{RIGHT}", f"good\n\nbad\n\n{WRONG}", f"half\n\nso\n\n{RIGHT}", "nothing"],
    # The beginning holds an answer already: the continuation that adds nothing leaves it the last one.
    "twice": [f"see\n\n{RIGHT}\n\nno\n\n{WRONG}"],
}


def continue_or_begin(asked: Asked) -> str:
    if not asked.start:
        return RESPONSES[asked.id][asked.number % len(RESPONSES[asked.id])]
    last = asked.start.split()[-1]
    if last == "7":
        return ""
    is_right = {"good": True, "half": asked.number % 2 == 0, "so": asked.number == 0}.get(last, False)
    return RIGHT if is_right else WRONG


def test_a_steps_label_is_its_share_of_right_continuations(tmp_path: Path) -> None:
    config = Config(annotate=AnnotateConfig(queries=9, responses=4, rollouts=4, temperature=0.8))
    with make_job(tmp_path, config, make_task(labelled=[query("q"), query("twice")])) as job:
        actors = Scripted(job, continue_or_begin)
        groups = {group.query.id: group for group in annotate(job, actors)}
        assert isinstance(job.metrics, Events)
        (event,) = job.metrics.of("annotation")
    length = {text: len(job.family.response_tokens(text)) for text in ("", RIGHT, WRONG)}
    drawn = [length[continue_or_begin(asked)] for asked in actors.asked if asked.start]
    assert sum(group.continuation_tokens for group in groups.values()) == sum(drawn)
    whole = sum(len(response.tokens) for group in groups.values() for response in group.responses)
    assert event["tokens"] == sum(drawn) + whole and event["rollouts"] == len(drawn)
    labels = [[step.label for step in response.steps] for response in groups["q"].responses]
    # so: 1 of 4, half: 2 of 4; a last step's label is the answer's verdict.
    assert labels == [[1.0, 0.25, 1.0], [1.0, 0.0, 0.0], [0.5, 0.25, 1.0], [0.0]]
    labels = [[step.label for step in response.steps] for response in groups["twice"].responses]
    assert labels == 4 * [[0.0, 0.0, 1.0, 0.0, 0.0]]
    assert {asked.temperature for asked in actors.asked} == {0.8}
    continued = [asked.start for asked in actors.asked if asked.id == "q" and asked.start]
    assert len(continued) == 4 * 5, "the beginning 'good', which two responses share, is continued once"
    assert (event["steps"], event["rollouts"]) == (10 + 4 * 5, 4 * 5 + 4 * 4)
    assert event["positive_share"] == pytest.approx((7 + 4) / 30)


# ------------------------------------------------------------------------------------------------- the answer reward


def test_a_truncated_response_has_not_answered(tmp_path: Path) -> None:
    with make_job(tmp_path, Config(), make_task()) as job:
        actors = Scripted(job, lambda asked: f"so\n\n{RIGHT}{'<cut>' if asked.number else ''}")
        (group,) = rollout(job, actors, [query("q")], Sampling("a", 1.0, 2))
    assert [(r.correct, r.truncated, r.answer) for r in group.responses] == [(True, False, "7"), (False, True, "7")]


@pytest.mark.parametrize(
    ("unlabelled", "answer", "right"), [("oracle", "8", [False, False, True]), ("voting", "7", [True, True, False])]
)
def test_unlabelled_queries_are_judged_by_what_the_settings_let_them_know(
    unlabelled: Any, answer: str, right: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "score_responses", score_by_text)
    config = Config(prompts=PromptsConfig(unlabelled=unlabelled))
    texts = [f"0.3\n\n{RIGHT}", f"0.4\n\n{RIGHT}", f"0.6\n\n{WRONG}"]  # 7 has the larger sum
    with make_job(tmp_path, config, make_task()) as job:
        actors = Scripted(job, lambda asked: texts[asked.number], prm="a PRM")
        hidden, known = query("hidden", None, hidden_answer="8"), query("known")
        first, second = rollout(job, actors, [hidden, known], Sampling("a", 1.0, 3))
    assert first.query.answer == answer and [r.correct for r in first.responses] == right
    assert second.query == known and [r.correct for r in second.responses] == [True, True, False]


@pytest.mark.parametrize("unlabelled", ["oracle", "voting"])
def test_what_agrees_with_a_vote_is_not_counted_as_correct(
    unlabelled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vote's winner always agrees with itself: only hidden answers tell whether it is right."""
    monkeypatch.setattr(rollouts, "score_responses", score_by_text)
    config = Config(prompts=PromptsConfig(unlabelled=unlabelled))
    # "b" answers 8 three times, which is what its hidden answer is; "c" nothing at all; the others 7 twice.
    texts = {"b": [f"1\n\n{WRONG}"] * 3, "c": ["1"] * 3}
    hidden = {"a": "8", "b": "8.0", "c": "7", "d": None}
    queries = [query(id, None, hidden_answer=answer) for id, answer in hidden.items()]
    now = Interval(1, [query("known"), query("other", "9")], queries, False)
    with make_job(tmp_path, config, make_task()) as job:
        usual = [f"1\n\n{RIGHT}", f"1\n\n{RIGHT}", f"1\n\n{WRONG}"]
        actors = Scripted(job, lambda asked: texts.get(asked.id, usual)[asked.number], prm="a PRM")
        monkeypatch.setattr(job.config.evolve, "responses", 3)
        generate(job, actors, now, Position(iteration=1))
        assert isinstance(job.metrics, Events)
        (event,) = job.metrics.of("generation")
    assert (event["queries"], event["responses"], event["unlabelled_queries"]) == (6, 18, 4)
    if unlabelled == "oracle":  # the true answers judge: 2 of known, 1 of a, 3 of b
        assert "vote" not in event and (event["correct"], event["queries_without_correct"]) == (6, 3)
        return
    assert (event["correct"], event["queries_without_correct"]) == (2, 1) and sum(event["checker"].values()) == 6
    assert event["vote"] == {
        "queries": 4, "responses": 12, "agreeing": 2 + 3 + 2, "answers_known": 3, "answers_right": 1,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- blocks on disk


def test_responses_are_taken_from_disk_only_if_the_same_policy_drew_them_so(tmp_path: Path) -> None:
    config = Config(generation=GenerationConfig(queries_per_block=2))
    with make_job(tmp_path, config, make_task()) as job:
        actors = Scripted(job, lambda asked: f"{actors.weights} at {asked.temperature}\n\n{RIGHT}")

        def drawn(ids: str = "abcde", temperature: float = 1.0) -> tuple[str, set[str]]:
            """Who was asked anew, and how the texts begin."""
            actors.asked.clear()
            groups = list(rollout(job, actors, [query(id) for id in ids], Sampling("a", temperature, 2)))
            assert [group.query.id for group in groups] == list(ids)
            return "".join(each.id for each in actors.asked[::2]), {g.responses[1].text.split("\n")[0] for g in groups}

        assert drawn() == ("abcde", {"scripted at 1.0"})
        assert drawn() == ("", {"scripted at 1.0"})
        (tmp_path / "rollouts/a/block_00001.jsonl").unlink()
        assert drawn() == ("cd", {"scripted at 1.0"})
        assert drawn("abcdx") == ("x", {"scripted at 1.0"})
        assert drawn(temperature=0.5) == ("abcde", {"scripted at 0.5"})
        actors.weights = "trained"
        assert drawn(temperature=0.5) == ("abcde", {"trained at 0.5"})


# ------------------------------------------------------------------------------------------------- the sweep


@pytest.mark.parametrize(("mode", "chosen"), [("reward_pass_at_k", 0.5), ("pass_at_k", 1.0), ("fixed", 0.9)])
def test_the_temperature_is_the_best_by_the_criterion_of_the_settings(
    mode: Any, chosen: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cold: one right response of three, which the PRM prefers. Hot: two, which it does not."""
    monkeypatch.setattr(rollouts, "score_responses", score_by_text)
    texts = {
        0.5: [f"0.9\n\n{RIGHT}", f"0.1\n\n{WRONG}", f"0.1\n\n{WRONG}"],
        1.0: [f"0.1\n\n{RIGHT}", f"0.2\n\n{RIGHT}", f"0.9\n\n{WRONG}"],
    }
    settings = TemperatureConfig(mode=mode, value=0.9, grid=[0.5, 1.0], k=1, responses=3, queries=2)
    with make_job(tmp_path, Config(temperature=settings), make_task(validation=[query(i) for i in "abc"])) as job:
        actors = Scripted(job, lambda asked: texts[asked.temperature][asked.number], prm="a PRM")
        assert tune_temperature(job, actors, 3) == chosen
        assert isinstance(job.metrics, Events)
        events = job.metrics.of("temperature")
    if mode == "fixed":
        assert not events and not actors.asked
        return
    (event,) = events
    assert (event["iteration"], event["temperature"]) == (3, chosen)
    measured = {row["temperature"]: (row["pass_at_k"], row["reward_pass_at_k"]) for row in event["grid"]}
    assert measured == {0.5: (pytest.approx(1 / 3), 1.0), 1.0: (pytest.approx(2 / 3), 0.0)}
    asked = {t: sorted((each.id, each.number) for each in actors.asked if each.temperature == t) for t in texts}
    assert asked[0.5] == asked[1.0] and len(asked[0.5]) == 2 * 3, "the same two queries at each temperature"
    other = next(row for row in event["grid"] if row["temperature"] != chosen)
    behind = {"reward_pass_at_k": -1.0, "pass_at_k": pytest.approx(-1 / 3)}
    assert (other["difference"], other["difference_stderr"]) == (behind[mode], pytest.approx(0.0))
    assert event["responses"] == 2 * 2 * 3 and event["tokens"] == sum(
        len(job.family.response_tokens(texts[each.temperature][each.number])) for each in actors.asked
    )
    assert [row["difference"] for row in event["grid"] if row["temperature"] == chosen] == [0.0]
    assert [row["random_pass_at_k"] for row in event["grid"]] == [row["pass_at_k"] for row in event["grid"]]
    assert (event["most_k"], [row["pass_at_most_k"] for row in event["grid"]]) == (3, [1.0, 1.0]), "all three samples"


def test_validation_responses_have_the_same_noise_at_every_temperature_and_after_every_iteration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample 0 of a query has one key everywhere; training responses and other samples have others."""
    keys: dict[str, set[int]] = {}
    number = 0

    def stream(requests: Iterator[Request], temperature: float) -> Iterator[tuple[int, list[Sample]]]:
        read = list(requests)
        for hot in {spec.temperature for request in read for spec in request.samples}:
            alike = [[spec.key for spec in each.samples if spec.temperature == hot] for each in read]
            assert len({key for of_query in alike for key in of_query}) == sum(map(len, alike))
            place = next(i for i, each in enumerate(read) if bytes(each.prompt.tokens) == b"b")
            keys.setdefault(f"{now} at {hot}", set()).add(alike[place][0])
        return ((i, actors._answer(request, temperature)) for i, request in enumerate(read))

    monkeypatch.setattr(evaluate, "_greedy", lambda *arguments: [])  # draws nothing at random
    settings = TemperatureConfig(mode="pass_at_k", grid=[0.5, 1.0], k=1, responses=3)
    config = Config(temperature=settings, evaluation=EvaluationConfig(k=4))
    with make_job(tmp_path, config, make_task(validation=[query(i) for i in "abc"])) as job:
        actors = Scripted(job, lambda asked: RIGHT)
        monkeypatch.setattr(actors, "stream", stream)
        for number in (1, 3):
            now = "sweep"
            tune_temperature(job, actors, number)
            now = "evaluation"
            measure_exploration(job, actors, "evolve", number)
            now = "training"
            rollout(job, actors, [query(i) for i in "abc"], iteration_sampling(job, number, 1.0))
    shared = keys["sweep at 0.5"]
    assert len(shared) == 1 and shared == keys["sweep at 1.0"] == keys["evaluation at 1.0"]
    assert len(keys["training at 1.0"]) == 2 and not shared & keys["training at 1.0"]


# ------------------------------------------------------------------------------------------------- the selection


def test_what_is_trained_on_is_what_was_selected(tmp_path: Path) -> None:
    """Random choices differ between iterations; responses that are wrong never are among them."""
    texts = [f"{i}\n\n{WRONG if i == 2 else RIGHT}" for i in range(6)]
    queries = [query(id) for id in "abcdefgh"] + [query("nobody knows", "9"), query("nor this", "9")]
    config = Config(selection=SelectionConfig("random_k", 2), generation=GenerationConfig(queries_per_block=3))
    with make_job(tmp_path, config, make_task()) as job:
        # Where all are wrong nothing can be chosen; "h" has one right response only.
        actors = Scripted(job, lambda asked: texts[2 if asked.id == "h" and asked.number else asked.number])
        groups = rollout(job, actors, queries, Sampling("iteration_0001", 1.0, 6))
        trained = []
        for number in (1, 1, 2):
            examples = choose(job, Interval(number, queries, [], False), groups)
            assert list(examples.ids) == list("abcdefgh") and list(examples.sizes) == [2] * 7 + [1]
            read = [examples.read(i) for i in range(8)]
            assert [group.query for group in read] == queries[:8]
            decode = job.family.tokenizer.decode
            trained.append([[decode(tokens).split()[0] for tokens in group.responses] for group in read])
        assert isinstance(job.metrics, Events)
        event = job.metrics.of("selection")[-1]
    assert trained[0] == trained[1] != trained[2]
    assert all("2" not in chosen and len(set(chosen)) == 2 for chosen in trained[0][:7] + trained[2][:7])
    assert trained[0][7] == trained[2][7] == ["0"]
    assert (event["selected"], event["queries_with_selection"]) == (15, 8)
    assert list(event["kept_per_query"].items()) == [("0", 2), ("1", 1), ("2", 7)]


# ------------------------------------------------------------------------------------------------- engine and training
