"""MathV360K as its authors lay it out, through the example config: rows in the published form, written by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mstar_mega import cli, settings
from mstar_mega.commands import UNUSABLE
from mstar_mega.data import disk, written_out
from mstar_mega.data.prompts import ANSWER_MARKER, LETTER_HINT
from mstar_mega.models.families.internvl2 import InternVL2
from mstar_mega.recipe.directory import build_task
from mstar_mega.settings import rules

CONFIGS = Path(__file__).parents[1] / "examples/configs"
MATHV360K = str(CONFIGS / "mathv360k.yaml")
FREE_HINT = "Hint: Please answer the question and provide the final answer at the end."
FEW = ("--data.validation_queries", "2", "--data.test_queries", "3")
# (source and file, question with its choices, answer, gold)
ROWS = [
    ("CLEVR-Math/images/CLEVR_train_000011.png", "Subtract all balls. How many objects are left?", "7", "7"),
    ("A-OKVQA/images/420634.jpg", "What is he doing?\nChoices:\n(A) surfing\n(B) eating", "B", "B"),
    ("Geometry3K/images/1803.png", "Find y.\nChoices:\n(A) 18.8\n(B) 23.2\n(C) 25.9\n(D) 44.0", "C", "C"),
    ("UniGeo/images/2.png", "求角的度数\nChoices:\n(A) 50°\n(B) 80°\n(C) 无法确定", "B", "B"),  # noqa: RUF001
    ("FigureQA/images/77.png", "Is Dark Green the minimum?\nChoices:\n(A) no\n(B) yes", "A", "A"),
    ("TabMWP/images/19561.png", "How much more does it cost? (Unit: $)", "1.45", "1.45"),
    ("PlotQA/images/11.png", "What is the difference between two ticks of the y-axis?", "10^4", "10^4"),
    ("VizWiz/images/9.jpg", "What is this?", "unanswerable", "unanswerable"),
    ("PMC-VQA/images/PMC1_Fig2.jpg", "Which organ?\nChoices:\n(A) The liver.\n(B) A: the lung", "A", "A"),
]


def row(number: int, image: str, question: str, answer: str) -> dict[str, Any]:
    hint = LETTER_HINT if "Choices:" in question else FREE_HINT
    turns = [
        {"from": "human", "value": f"<image>\n{hint}\nQuestion: {question}"},
        {"from": "gpt", "value": f"The answer is {answer}"},
    ]
    return {"id": f"identity_{number}", "image": image, "conversations": turns}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The two files as the authors' README lays them out, at the place that the config names."""
    place = tmp_path / "data/MathV360K"
    rows = []
    for i in range(6):
        for j, (image, question, answer, _) in enumerate(ROWS):
            name = image.replace("/images/", f"/images/{i}_")
            path = place / "data_images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (60 + i, 40 + j), (40 * i, 20 * j, 0)).save(path)
            rows.append(row(1000 + 10 * i + j, name, question, answer))
    (place / "train_samples_all_tuning.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    yield place


@pytest.mark.parametrize("policy", ["internvl2_2b", "phi3_5_vision", "minicpm_v2_5"])
def test_it_goes_over_every_policys_config(policy: str) -> None:
    config = settings.parse(["--config", str(CONFIGS / f"{policy}.yaml"), "--config", MATHV360K])
    rules.validate(config)
    assert (config.model.checkpoint, config.run.dir) == (f"checkpoints/{policy}", f"runs/{policy}")
    assert config.data.name == "mathv360k"
    assert config.data.warmup_examples == 100_000 and config.data.labelled_queries is None


def test_the_published_layout_is_read(folder: Path) -> None:
    config = settings.parse(["--config", MATHV360K, *FEW])
    labelled = disk.DiskQueries(disk.open_source(config.data, Path("index")), "labelled")
    assert config.data.warmup_file == "runs/mathv360k_warmup/warmup_set.jsonl", "what `mstar warmup-data` writes there"
    Path(config.data.warmup_file).parent.mkdir(parents=True)
    written_out.write(Path(config.data.warmup_file), [(q, f"so\n\n{ANSWER_MARKER}\n\n{q.answer}") for q in labelled])
    task = build_task(config, Path("run"), InternVL2("digits"))
    assert [each for each in task.skipped if "it has enough" not in each.reason] == []
    assert len(task.validation) == 2 and len(task.test) == 3 and len(task.warmup) == len(task.labelled) > 10
    queries = [*task.labelled, *task.unlabelled, *task.validation, *task.test]
    assert len(queries) == 54, "every picture is of one question, so none is left over"
    for query in queries:
        image, question, _, gold = ROWS[int(query.id[-1])]
        assert (query.answer or query.hidden_answer) == gold
        hint = LETTER_HINT if "Choices:" in question else FREE_HINT
        assert query.question.startswith(f"{hint}\nQuestion: {question}\n"), "word for word, then the instruction"
        assert len(query.choices) == question.count("\n(") and query.kind.startswith(image.split("/")[0])
        assert Path(query.images[0].path).is_file()
    assert queries[0].images[0].path.startswith("data/MathV360K/data_images/")


def test_check_reads_it_through_the_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(folder / "train_samples_all_tuning.json")
    command = ["data", "check", rows, "--config", MATHV360K, *FEW]
    assert cli.main(command) == UNUSABLE, "the warm-up file is not made yet"
    said = capsys.readouterr().out
    assert "runs/mathv360k_warmup/warmup_set.jsonl: 0 usable responses\n  left out: there is no such file yet" in said
    assert "54 rows" in said and "unusable: 0" in said and "  A-OKVQA         6 multiple choice\n" in said
    assert cli.main([*command, "--data.warmup_file", "null"]) == 0
    assert "warm-up file" not in capsys.readouterr().out
