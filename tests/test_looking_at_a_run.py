"""``mstar evaluate RUN_DIR`` and ``mstar generate RUN_DIR`` measure and show a policy, and leave its run alone."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import Job, events_of

from mstar_mega import cli
from mstar_mega.data.records import read_groups
from mstar_mega.platform import distributed
from mstar_mega.recipe import directory


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that has come to the end of its warm-up; it got a few answers right."""
    directory = tmp_path_factory.mktemp("looked at") / "run"
    job = Job(directory, 1, "--data.validation_queries", "20", command="warmup")
    assert job.wait() == 0, job.output
    yield directory
    distributed.shutdown()


def files_of(run_dir: Path) -> dict[str, bytes]:
    paths = [path for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in paths if "tensorboard" not in path.parts}


def shares(said: str) -> dict[str, str]:
    """What was printed, by name: ``{"validation: greedy accuracy": "25.0%"}``."""
    return dict(re.findall(r"^(\w+: [^\d]+(?:@\d+)?) ([0-9.]+%)", said, re.MULTILINE))


def test_evaluate_says_what_the_run_measured_and_changes_nothing(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(run_dir)
    assert cli.main(["evaluate", str(run_dir)]) == 0
    found = shares(capsys.readouterr().out)
    logged = {event["split"]: event for event in events_of(run_dir) if event["event"] == "evaluation"}
    assert 0 < logged["validation"]["greedy_accuracy"] < 1
    for split, event in logged.items():
        assert found[f"{split}: greedy accuracy"] == f"{100 * event['greedy_accuracy']:.1f}%"
    assert "validation: Pass@4" in found and "validation: Reward-Pass@2" not in found, "there is no PRM yet"
    after = files_of(run_dir)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("rollouts/evaluation_0000_validation_sampled/") for name in after.keys() - before.keys())
    assert cli.main(["evaluate", str(run_dir)]) == 0
    assert shares(capsys.readouterr().out) == found and files_of(run_dir) == after, "read back"


def test_evaluate_with_other_settings_keeps_its_responses_apart(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(run_dir)
    assert cli.main(["evaluate", str(run_dir), "--generation.max_new_tokens", "2", "--evaluation.k", "2"]) == 0
    found = shares(capsys.readouterr().out)
    assert found["test: greedy accuracy"] == "0.0%" and "validation: Pass@2" in found, "no room for an answer"
    after = files_of(run_dir)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() and all("_changed_" in name for name in after.keys() - before.keys())


def test_other_settings_draw_the_same_samples(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer test questions, or fewer samples: those that there are stay what they were."""
    for arguments in ([], ["--evaluation.k", "2", "--data.test_queries", "3"]):
        assert cli.main(["evaluate", str(run_dir), *arguments]) == 0
    (whole,) = run_dir.glob("rollouts/evaluation_0000_validation_sampled")
    (changed,) = run_dir.glob("rollouts/evaluation_0000_changed_validation_sampled")
    drawn = []
    for folder in (whole, changed):
        groups = [group for path in sorted(folder.glob("block_*.jsonl")) for group in read_groups(path)]
        drawn.append({group.query.id: [r.tokens for r in group.responses[:2]] for group in groups})
    assert drawn[0] == drawn[1] and drawn[0]


def test_generate_shows_responses_to_a_question_of_ones_own(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(run_dir)
    image = str(run_dir / "data/images/digits-test-000000.png")

    def responses(*more: str) -> list[str]:
        command = ["generate", str(run_dir), "--question", "What is the sum?", *more]
        assert cli.main(command) == 0
        return re.split(r"^--- response \d+.*\n", capsys.readouterr().out, flags=re.MULTILINE)[1:]

    assert len(set(responses("--image", image, "--responses", "3"))) > 1
    greedy = responses("--image", image, "--responses", "2", "--temperature", "0")
    assert len(greedy) == 2 and greedy[0] == greedy[1] != ""
    assert len(responses("--responses", "1")) == 1, "without an image"
    assert files_of(run_dir) == before


def test_a_run_that_cannot_be_written_to_is_looked_at_all_the_same(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the file system's answer is played."""

    def refuse(path: Path, *_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    before = files_of(run_dir)
    monkeypatch.setattr(directory, "take", refuse)
    assert cli.main(["evaluate", str(run_dir)]) == 0
    assert "test: greedy accuracy" in shares(capsys.readouterr().out)
    assert cli.main(["generate", str(run_dir), "--question", "What is the sum?", "--responses", "1"]) == 0
    assert files_of(run_dir) == before
    assert cli.main(["warmup", "--config", str(run_dir / "config.yaml"), "--run.dir", str(run_dir)]) == 2
    assert "cannot be used: Read-only file system" in capsys.readouterr().err
    monkeypatch.setattr("mstar_mega.report.html.write_text_atomic", refuse)
    assert cli.main(["report", str(run_dir)]) == 2
    assert "give the page a place by --out FILE" in capsys.readouterr().err
