"""Files from a stranger: pipes, links, names that steer, sizes that nothing has; and long names of honest users."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_directories import make_checkpoint
from report_runs import make_run
from test_data_sets import good_rows

from mstar_mega import cli
from mstar_mega.checkpoint_tools.convert import hf_to_megatron
from mstar_mega.platform.terminal import one_line, visible
from mstar_mega.report.html import write_report
from mstar_mega.settings.yaml_files import parse_yaml, yaml

STEERING = "\x1b[2J\x1b]0;title\x07\u202e\x9b1m\r"


def raw(text: str) -> list[str]:
    """Characters that steer a terminal."""
    return [each for each in text if (not each.isprintable() and each not in "\n\t") or each in "\u202e\u2066"]


# ------------------------------------------------------------------------------------------------- pipes and devices

Way = Callable[[Path, Path], list[str]]


def _data(folder: Path, file: Path) -> list[str]:
    return ["data", "check", str(file)]


def _score(folder: Path, file: Path) -> list[str]:
    (folder / "p.jsonl").write_text("{}\n")
    options = ["--predictions", str(folder / "p.jsonl"), "--out", str(folder / "s.json")]
    return ["score", "--benchmark", "mmstar", "--data", str(file), *options]


def _inside(name: str, *command: str) -> Way:
    def way(folder: Path, file: Path) -> list[str]:
        hf = folder / "hf"
        make_checkpoint(hf, "internvl2", shards=2)
        (hf / name).unlink(missing_ok=True)
        file.rename(hf / name)
        return [*command, str(hf)]

    return way


WAYS: dict[str, tuple[str, Way]] = {
    "rows": ("rows.json", _data),
    "tsv": ("set.tsv", _score),
    "json": ("set.json", _score),
    "parquet": ("set.parquet", _score),
    "settings": ("run.yaml", lambda _, file: ["plan", "--gpus", "1", "--memory", "1GB", "--config", str(file)]),
    "weight map": ("x", _inside("model.safetensors.index.json", "inspect")),
    "shard": ("x", _inside("model-00001-of-00002.safetensors", "inspect")),
    "golden": ("x", lambda folder, file: ["verify", "--checkpoint", str(folder), "--golden", str(file)]),
}


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("way", WAYS)
def test_pipes_and_devices_are_not_read(
    tmp_path: Path, way: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, command = WAYS[way]
    file = tmp_path / name
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    assert cli.main(command(tmp_path, file)) == cli.USER_ERROR
    said = capsys.readouterr().err
    assert "not a regular file" in said or "is missing" in said or "no such file" in said


def test_a_picture_that_is_a_pipe_is_an_unusable_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = good_rows(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    victim = tmp_path / rows[0]["image"]
    victim.unlink()
    os.mkfifo(victim)
    small = ["--data.validation_queries", "10", "--data.test_queries", "14"]
    assert cli.main(["data", "check", str(tmp_path / "rows.json"), *small]) == 0
    assert "not a regular file" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- what is copied


@pytest.mark.usefixtures("job_of_one")
def test_conversion_copies_known_names_and_nothing_from_outside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the key")
    hf = tmp_path / "hf"
    make_checkpoint(hf, "internvl2")
    (hf / "notes.json").symlink_to(secret)
    (hf / "tokenizer_config.json").write_text("{}")
    (hf / "modeling_internvl.py").write_text("raise SystemExit")
    hf_to_megatron(hf, tmp_path / "out")
    copied = sorted(path.name for path in (tmp_path / "out/model").iterdir())
    assert copied == ["added_tokens.json", "config.json", "modeling_internvl.py", "tokenizer_config.json"]
    assert "not copied, as no part of a model: notes.json" in caplog.text
    (hf / "README.md").symlink_to(secret)
    with pytest.raises(ValueError, match=r"README.md is a link that leads out of"):
        hf_to_megatron(hf, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.usefixtures("job_of_one")
def test_weights_and_pieces_are_not_taken_from_behind_a_link(tmp_path: Path) -> None:
    hf, outside = tmp_path / "hf", tmp_path / "outside"
    make_checkpoint(hf, "internvl2")
    hf_to_megatron(hf, tmp_path / "there")
    outside.mkdir()
    for source, name in (
        (hf, "model.safetensors"),
        (tmp_path / "there", "__0_0.distcp"),
        (tmp_path / "there", "model"),
    ):
        (source / name).rename(outside / name)
        (source / name).symlink_to(outside / name)
        way = ["hf-to-megatron", "--hf"] if source == hf else ["megatron-to-hf", "--checkpoint"]
        assert cli.main(["convert", *way, str(source), "--out", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        (source / name).unlink()
        (outside / name).rename(source / name)


@pytest.mark.usefixtures("job_of_one")
def test_links_inside_and_into_the_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x/snapshots/abc", tmp_path / "models--x/blobs"
    make_checkpoint(snapshot, "internvl2")
    blobs.mkdir()
    (snapshot / "config.json").rename(blobs / "1234")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    (snapshot / "README.md").symlink_to("added_tokens.json")
    hf_to_megatron(snapshot, tmp_path / "out")
    assert (tmp_path / "out/model/config.json").read_bytes() == (blobs / "1234").read_bytes()
    assert not (tmp_path / "out/model/README.md").is_symlink()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(ValueError, match="is a link: name the directory itself"):
        hf_to_megatron(snapshot, tmp_path / "link")


# --------------------------------------------------------------------------------------------------- sizes and shapes


@pytest.mark.parametrize("family", ["internvl2", "phi3_5_vision", "minicpm_v2_5"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 10**9), ("num_hidden_layers", 10**18), ("vocab_size", None), ("num_attention_heads", 0),
     ("rope_theta", []), ("hidden_size", "16"), ("rope_scaling", {"type": "dynamic", "factor": float("inf")})],
)  # fmt: skip
def test_config_values_that_no_model_has(
    tmp_path: Path, family: str, key: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(tmp_path / "hf", family)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (config["llm_config"] if family == "internvl2" else config)[key] = value
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    assert cli.main(["inspect", str(tmp_path / "hf")]) == 0
    assert key in capsys.readouterr().out, "said in the line of the family"


@pytest.mark.parametrize(
    "text",
    ["a: &a [*a]", "[" * 5000, "? [x]\n: 1", "x: 1\nx: 2", "d: 2001-99-99",
     "a: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [" + "*a," * 10 + "]\nc: &c [" + "*b," * 10 + "]\nd: &d [" + "*c," * 10
     + "]\ne: [" + "*d," * 10 + "]"],
)  # fmt: skip
def test_yaml_that_is_no_settings(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


def test_yaml_with_a_few_aliases_is() -> None:
    assert parse_yaml("a: &x {lr: 1.0}\nb: *x\n") == {"a": {"lr": 1.0}, "b": {"lr": 1.0}}


# ----------------------------------------------------------------------------------------------------------- terminal


def test_text_that_steers_is_shown_escaped() -> None:
    assert not raw(visible(STEERING)) and visible("\x1b[2J") == "\\x1b[2J" and visible("\u202e") == "\\u202e"
    assert visible("Größe 5\n\tΔ≥ 中 🙂") == "Größe 5\n\tΔ≥ 中 🙂"
    assert one_line("a\nNOTE: all is well") == "a\\nNOTE: all is well"


def test_nothing_prints_but_through_one_place() -> None:
    package = Path(cli.__file__).parent
    allowed = {"platform/terminal.py", "rewards/algebra.py", "data/digits/make_tokenizer.py", "kernels/report.py"}
    for path in package.rglob("*.py"):
        name = str(path.relative_to(package))
        if name not in allowed:
            assert not re.search(r"(?<![\w.])print\(|sys\.std(out|err)\.write", path.read_text()), name


def test_ids_and_names_of_data_do_not_steer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = good_rows(tmp_path)
    rows[0]["conversations"][0]["value"] += STEERING
    rows[1]["id"] = f"x{STEERING}\nNOTE: all is well"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    small = ["--data.validation_queries", "10", "--data.test_queries", "14"]
    cli.main(["data", "check", str(tmp_path / "rows.json"), *small])
    cli.main(["data", "show", str(tmp_path / "rows.json"), rows[0]["id"], *small])
    cli.main(["plan", "--gpus", "1", "--memory", "1GB", f"--{STEERING}", "1"])
    said = "".join(capsys.readouterr())
    assert "\\x1b[2J" in said and not raw(said) and "\nNOTE: all is well" not in said


# ----------------------------------------------------------------------------------------------------------- the page


def renamed_kinds(run_dir: Path, name: str) -> None:
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text().replace('"sum": ', f"{json.dumps(name)}: "))


@pytest.mark.parametrize(
    "name", ["charts_from_annual_reports_2019_2024, multiple choice", "x" * 5000, "two\nlines", STEERING, "$x_1"]
)
def test_a_kind_of_any_name_has_its_place_in_the_plot(tmp_path: Path, name: str) -> None:
    run_dir = make_run(tmp_path / "run", iterations=1, queries=1)
    renamed_kinds(run_dir, name)
    page = write_report(run_dir).read_text()
    assert 'id="plot-kinds"' in page and "cannot be drawn" not in page


def test_a_plot_that_fails_does_not_take_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mstar_mega.report import plots

    def broken(*_: object) -> None:
        raise OverflowError("too wide")

    monkeypatch.setattr(plots, "kinds_plot", broken)
    page = write_report(make_run(tmp_path / "run", iterations=1, queries=1)).read_text()
    assert "cannot be drawn (OverflowError: too wide)" in page
    assert 'id="plot-accuracy"' in page and 'id="plot-kinds"' not in page


def test_events_of_wrong_values_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", iterations=1, queries=1)
    wrong: list[dict[str, Any]] = [
        {"event": "selection", "iteration": float("inf"), "kept_per_query": 3},
        {"event": "evaluation", "stage": "evolve", "split": "test", "iteration": 1, "by_kind": [1], "queries": 10**400},
        {"event": "temperature", "iteration": 1, "temperature": 1e308, "grid": [3]},
        {"event": "generation", "iteration": 1, "time": 1e18, "responses": "many"},
    ]
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(event) + "\n" for event in wrong) + "[" * 10**5 + "\n")
    page = write_report(run_dir).read_text()
    for text in ("kept_per_query is 3", "by_kind is a list", "grid.0 is 3", "responses is", "not JSON"):
        assert text in page, text
    assert 'id="plot-accuracy"' in page


@pytest.mark.parametrize("template", ["template.html", "benchmark.html"])
def test_only_the_templates_script_may_run(template: str, tmp_path: Path) -> None:
    from mstar_mega.report import page as pages

    names = re.findall(r"\{\{(\w+)\}\}", (Path(pages.__file__).parent / template).read_text())
    page = pages.fill(Path(pages.__file__).parent / template, dict.fromkeys(names, "<script>alert(1)</script>"))
    (policy,) = re.findall(r"script-src ([^;\"]*)", page)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode(): text for text in scripts}
    assert "unsafe" not in policy
    (allowed,) = [text for digest, text in hashes.items() if policy == f"'sha256-{digest}'"]
    assert "alert(1)" not in allowed and "getElementById" in allowed
