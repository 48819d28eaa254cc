"""Functions of the user's own, in a file outside the package: what each setting calls, checks and refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import scripted
from groups import make_group, make_response
from jobs import Job, finish
from own_functions import MINE

from mstar_mega import cli, functions, settings
from mstar_mega.config import Config, DataConfig, RewardConfig, SelectionConfig
from mstar_mega.data import task as tasks
from mstar_mega.data.prompts import render, template_of
from mstar_mega.data.records import read_groups
from mstar_mega.data.types import Query
from mstar_mega.recipe.method import needs_prm
from mstar_mega.recipe.temperature import tune_temperature
from mstar_mega.rewards.checker import AnswerChecker
from mstar_mega.rewards.process import reduce_groups
from mstar_mega.rewards.reward import judge_response
from mstar_mega.rewards.selection import select, weight_of
from mstar_mega.settings.rules import validate


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of the user's file; every function in it is named by the user."""
    file = tmp_path_factory.mktemp("outside") / "mine.py"
    file.write_text(MINE)
    names = [line.split()[1].partition("(")[0] for line in MINE.splitlines() if line.startswith("def ")]
    functions.allow(f"{file}:{name}" for name in (*names, "number", "nothing"))
    return str(file)


# -- finding and refusing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "mine.py has no 'nothing'; expected a function (query: Query, response: Response) -> float"),
        ("number", "mine.py:number is int; expected a function"),
        ("one", "takes (query); expected a function (query: Query, response: Response) -> float"),
    ],
)
def test_what_is_no_function_of_the_contract_is_refused_in_one_line(mine: str, name: str, said: str) -> None:
    with pytest.raises(ValueError, match="^reward.function ") as raised:
        functions.load("reward.function", f"{mine}:{name}")
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_modules_are_found_on_the_path_and_beside_the_user_but_never_pythons_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside_me.py").write_text("def reward(query, response):\n    return 0.25\n")
    (tmp_path / "torch.py").write_text("raise SystemExit('a file of the working directory stood in for a library')\n")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    paths = ["beside_me:reward", "os:system", "nowhere_at_all:f", "broken:f", "no such:f", "none.py:f"]
    functions.allow(paths)
    assert functions.load("reward.function", paths[0])(None, None) == 0.25
    assert str(tmp_path) not in sys.path and "" not in sys.path[1:]
    for path, said in zip(
        paths[1:],
        (
            "a module of Python's own",
            "there is no module 'nowhere_at_all' on Python's path",
            "cannot be imported (ModuleNotFoundError: No module named 'nothing_of_that_name')",
            "a path is package.module:function or folder/file.py:function",
            "there is no file none.py",
        ),
        strict=True,
    ):
        with pytest.raises(ValueError, match=f"^reward.function.*{path}") as raised:
            functions.load("reward.function", path)
        assert said in str(raised.value) and "\n" not in str(raised.value)


def test_code_is_taken_from_the_user_and_from_nobody_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run directory's settings, or its config.yaml given as --config, name no function for the user."""
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\ndef reward(query, response):\n    return 1\n")
    config = Config()
    config.reward.function, config.prm.reduction = f"{trap}:reward", f"{trap}:reward"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(settings.dump(config))
    for given in (settings.load(run), settings.parse(["--config", str(run / "config.yaml")])):
        validate(given)
        with pytest.raises(ValueError, match="code is never taken from a run directory or a checkpoint") as raised:
            functions.check(given)
        assert f"--reward.function {trap}:reward --prm.reduction {trap}:reward" in str(raised.value)
        with pytest.raises(ValueError, match="code is never taken from a run directory or a checkpoint"):
            judge_response(Query("q", "?", (), "1"), make_response(0), given.reward, AnswerChecker())
    for command in (["evaluate", str(run)], ["generate", str(run), "--question", "?"]):
        assert cli.main(command) == 2
        assert "name it yourself by --reward.function" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()
    # Named by the user, on the command line or in a file of his own, it runs.
    (tmp_path / "mine.yaml").write_text(f"reward: {{function: '{trap}:reward'}}\n")
    functions.check(settings.parse(["--config", str(tmp_path / "mine.yaml")]))
    assert (tmp_path / "sprung").exists()


def test_a_setting_takes_its_names_or_a_path() -> None:
    for argument, said in (
        ("--selection.rule=best", "selection.rule is 'best': it must be one of top_k, top_k_above"),
        ("--reward.function=mine", "or a function's path as in my/file.py:function"),
        ("--data.template=mathv", "data.template is 'mathv': it must be one of digits, mathv360k"),
        ("--data.template=a.py:f", "the questions of data.name digits come ready"),
    ):
        with pytest.raises(ValueError, match="^") as raised:
            validate(settings.parse([argument]))
        assert said in str(raised.value)


# -- each setting ----------------------------------------------------------------------------------------------------


def test_reward_is_graded_and_counts_as_correct_from_the_threshold_on(mine: str) -> None:
    query = Query("q", "?", (), "7")
    config = RewardConfig(f"{mine}:closeness")
    answers = ["7", "8", "3", None]
    with AnswerChecker() as checker:
        for threshold, right in ((1.0, [True, False, False, False]), (0.5, [True, True, False, False])):
            config.threshold = threshold
            judged = [judge_response(query, make_response(0, answer=a), config, checker) for a in answers]
            assert [each.reward for each in judged] == [1.0, 0.5, 0.0, 0.0]
            assert [each.correct for each in judged] == right and {each.verdict for each in judged} == {"function"}
        cut = make_response(0, answer="7")
        cut.truncated = True
        assert not judge_response(query, cut, config, checker).correct
        for name, said in (("none", "returned None"), ("too_much", "returned 1.5: .* from 0 to 1")):
            with pytest.raises(ValueError, match=f"^reward.function .*:{name} {said}"):
                judge_response(query, make_response(0, answer="7"), RewardConfig(f"{mine}:{name}"), checker)
        with pytest.raises(ValueError, match=r"breaks failed on query q: KeyError: 'unit' \(MSTAR_TRACEBACK=1 shows"):
            judge_response(query, make_response(0, answer="7"), RewardConfig(f"{mine}:breaks"), checker)


def test_a_selection_rule_sees_all_responses_and_returns_some(mine: str) -> None:
    group = make_group([make_response(i, None, i != 1) for i in range(4)])
    for response, length in zip(group.responses, (5, 1, 3, 4), strict=True):
        response.tokens = [0] * length
    (chosen,) = select([group], SelectionConfig(f"{mine}:shortest", 2), 0)
    assert [response.index for response in chosen] == [2, 3]
    assert [response.selected for response in group.responses] == [False, False, True, True]
    functions.allow(["groups:make_group_badly"])
    stranger = SelectionConfig(f"{mine}:everything", 2)
    assert len(select([group], stranger, 0)[0]) == 4
    config = Config()
    config.temperature.mode = "fixed"
    config.selection.rule = f"{mine}:everything"
    assert needs_prm(config), "a rule may read process scores unless it says that it does not"
    config.selection.rule = f"{mine}:shortest"
    assert not needs_prm(config)
    config.selection.weight = "score"
    assert needs_prm(config)


def test_a_rule_that_returns_what_is_not_of_the_query_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bad_rules.py"
    file.write_text(
        "def foreign(group, settings, seed):\n    return [3]\n"
        "def twice(group, settings, seed):\n    return [group.responses[0]] * 2\n"
        "def nothing(group, settings, seed):\n    pass\n"
    )
    for name in ("foreign", "twice", "nothing"):
        functions.allow([f"{file}:{name}"])
        with pytest.raises(ValueError, match=f"{name} returned .* for query q: it must return some of group.responses"):
            select([make_group([make_response(0, 0.5, True)])], SelectionConfig(f"{file}:{name}"), 0)


def test_weights_by_name_and_by_function(mine: str) -> None:
    responses = [make_response(0, 0.8, True), make_response(1, 0.3, False)]
    responses[0].reward = 0.5
    group = make_group(responses)
    for weight, expected in (
        ("none", [1.0, 1.0]), ("reward", [0.5, 0.0]), ("score", [0.8, 0.3]), (f"{mine}:half_away", [1.0, -0.25]),
    ):  # fmt: skip
        assert [weight_of(group, r, SelectionConfig(weight=weight)) for r in responses] == expected
    with pytest.raises(ValueError, match="^selection.weight .*none returned None: it must return a finite number$"):
        weight_of(group, responses[0], SelectionConfig(weight=f"{mine}:none"))


def test_a_reduction_of_ones_own(mine: str) -> None:
    from mstar_mega.data.types import Step

    group = make_group([make_response(0), make_response(1)])
    group.responses[0].steps = [Step(i, i + 1, "", score) for i, score in enumerate((0.9, 0.2, 0.4))]
    reduce_groups([group], f"{mine}:second_worst")
    assert [response.score for response in group.responses] == [0.4, None]


def test_a_template_of_ones_own(mine: str) -> None:
    template = template_of(f"{mine}:shout")
    assert render(template, "how many?", {"A": "one", "B": "two"}) == "HOW MANY? [A] one [B] two"
    assert template.marker == "# Answer"


def test_a_reader_of_ones_own_makes_the_task(mine: str, tmp_path: Path) -> None:
    counts = {"warmup_examples": 4, "labelled_queries": 4, "unlabelled_queries": 1, "validation_queries": 2}
    config = DataConfig(f"{mine}:read", test_queries=2, **counts)  # type: ignore[arg-type]
    made = tasks.build(config, tmp_path, 0)
    assert len(made.labelled) == 4 and len(made.warmup) == 4 and made.labelled[0].answer
    config.name = f"{mine}:everything"
    with pytest.raises(ValueError, match=r"^data.name .*everything failed: AttributeError"):
        tasks.build(config, tmp_path, 0)


@pytest.mark.usefixtures("job_of_one")
def test_the_temperature_by_a_criterion_of_ones_own(mine: str, tmp_path: Path) -> None:
    config = Config()
    config.temperature.grid, config.temperature.mode = [0.5, 1.0], f"{mine}:variety"
    config.temperature.responses, config.temperature.queries = 4, 2
    queries = [Query(id, "?", (), "7") for id in ("a", "b")]
    with scripted.make_job(tmp_path, config, scripted.make_task(validation=queries)) as job:
        actors = scripted.Scripted(job, lambda a: f"# Answer\n\n{a.number if a.temperature == 1.0 else 7}")
        assert tune_temperature(job, actors, 1) == 1.0
        (event,) = job.metrics.of("temperature")  # type: ignore[union-attr]
        assert event["mode"] == f"{mine}:variety" and event["grid"][0]["difference"] == pytest.approx(-0.75)


def arguments(mine: str, named: Mapping[str, str]) -> Sequence[str]:
    return [f"--{setting}={mine}:{name}" for setting, name in named.items()]


def test_a_whole_job_with_a_function_for_everything(mine: str, tmp_path: Path) -> None:
    """On two ranks. The log names them; a resume is the same run; a changed file is not."""
    named = {
        "data.name": "read", "reward.function": "closeness", "selection.rule": "first_two",
        "selection.weight": "half_away", "prm.reduction": "second_worst", "temperature.mode": "variety",
    }  # fmt: skip
    small = ["--evolve.epochs=1", "--evolve.optimizer.batch_size=16", "--evolve.interval=1"]
    given = [*arguments(mine, named), "--reward.threshold=0.5", *small]
    said = finish(tmp_path / "run", 2, *given)
    assert "report:" in said
    blocks = [read_groups(path) for path in sorted((tmp_path / "run/rollouts/iteration_0001").glob("block_*"))]
    responses = [response for groups in blocks for group in groups for response in group.responses]
    assert {response.verdict for response in responses} <= {"function", "none"}
    assert {0.0, 1.0} & {response.reward for response in responses}
    assert all(r.correct == (r.reward is not None and r.reward >= 0.5) for r in responses)
    events = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    selected = [event["selected"] for event in events if event["event"] == "selection"]
    assert selected[0] == 2 * sum(len(groups) for groups in blocks), "of each query two, right or wrong"
    again = Job(tmp_path / "run", 1, *given)
    assert again.wait() == 0 and "everything is done already" in again.output
    looked = Job(tmp_path / "run", 1, "--selection.k=2")
    assert looked.wait() == 2 and "was made with other settings" in looked.output
    with open(mine, "a") as file:
        file.write("\n# another version\n")
    changed = Job(tmp_path / "run", 1, *given)
    assert changed.wait() == 2 and "is not the file that" in changed.output


def test_the_documented_functions_do_what_the_page_says(tmp_path: Path) -> None:
    file = Path(__file__).parents[1] / "examples" / "own" / "functions.py"
    page = (file.parents[2] / "docs" / "functions.md").read_text()
    for setting, contract in functions.CONTRACTS.items():
        assert f"`{setting}`" in page and contract.signature in page, setting

    def own(setting: str, name: str) -> str:
        path = f"{file}:{name}"
        functions.allow([path])
        assert f"def {name}(" in page and f":{name}" in page
        functions.load(setting, path)
        return path

    with AnswerChecker() as checker:
        config = RewardConfig(own("reward.function", "close_enough"), 0.5)
        query = Query("q", "?", (), "100")
        rewards = [judge_response(query, make_response(0, answer=a), config, checker) for a in ("100", "95", "80", "x")]
    assert [each.reward for each in rewards] == [1.0, 0.5, 0.0, 0.0] and [e.correct for e in rewards][:2] == [True] * 2
    group = make_group([make_response(0, 0.1, True), make_response(1, 0.9, False), make_response(2, 0.5, True)])
    group.responses[0].tokens = [1, 2]
    for name, chosen in (("shortest", [2]), ("everything", [0, 1, 2])):
        path = f"{file}:{name}"
        functions.allow([path])
        (found,) = select([group], SelectionConfig(path, 1), 0)
        assert [response.index for response in found] == chosen
    weight = SelectionConfig(weight=own("selection.weight", "good_and_bad"))
    assert [weight_of(group, response, weight) for response in group.responses] == [1.0, -0.25, 1.0]
    assert functions.load("prm.reduction", own("prm.reduction", "second_worst"))([0.9, 0.1, 0.4]) == 0.4
    assert functions.load("temperature.mode", own("temperature.mode", "variety"))(group, None) == pytest.approx(1 / 3)
    text = render(template_of(own("data.template", "terse")), "What?", {"A": "x", "B": "y"}, instruct=False)
    assert text == "What?\n(A) x (B) y"
    counts = {"warmup_examples": 2, "labelled_queries": 12, "validation_queries": 2, "test_queries": 2}
    data = DataConfig(own("data.name", "halves"), **counts)  # type: ignore[arg-type]
    assert len(tasks.build(data, tmp_path, 0).labelled) == 2
