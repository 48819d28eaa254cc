"""The sample queries of a run's page: which are chosen, their pictures as the policy read them, and their texts."""

from __future__ import annotations

import base64
import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_runs import make_run, write_image, write_rollouts
from test_html import Page

from mstar_mega.data.records import read_groups, write_groups
from mstar_mega.data.types import Group, ImageRef, Response, Step, image_digest
from mstar_mega.report import samples as samples_module
from mstar_mega.report.html import write_report
from mstar_mega.report.images import shown_picture
from mstar_mega.report.run import Run, load_run
from mstar_mega.report.samples import choose_groups, collect_samples, pieces, place_of


def test_the_sample_does_not_depend_on_the_blocks(tmp_path: Path) -> None:
    choices = []
    for block in (2, 7):
        write_rollouts(tmp_path / str(block), 1, 14, block=block)
        directory = tmp_path / str(block) / "rollouts" / "iteration_0001"
        choices.append([group.query.id for group in choose_groups(directory, 1, 7, [])])
    assert choices[0] == choices[1] and len(choices[0]) == 7
    assert choices[0] != [f"q-1-{i}" for i in range(7)]


def test_of_many_blocks_only_some_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rollouts(tmp_path, 1, 10, block=1)
    reads: list[str] = []

    def read(path: Path) -> list[Group]:
        reads.append(path.name)
        return read_groups(path)

    monkeypatch.setattr(samples_module, "read_groups", read)
    assert len(choose_groups(tmp_path / "rollouts" / "iteration_0001", 1, 4, [])) == 4
    assert reads == [f"block_{i:05d}.jsonl" for i in (0, 2, 5, 7)]


def test_a_full_page_keeps_every_iteration_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run(tmp_path / "run", iterations=3)
    one = len(json.dumps(collect_samples(load_run(run_dir)).iterations[0]["queries"][0]))
    monkeypatch.setattr(samples_module, "MOST_BYTES", 5 * (one + 3000))
    samples = collect_samples(load_run(run_dir))
    kept = [len(entry["queries"]) for entry in samples.iterations]
    assert len(kept) == 3 and min(kept) >= 1 and 0 < samples.left_out == 12 - sum(kept)
    assert f"{samples.left_out} more sampled queries were left out" in Page(write_report(run_dir)).text


def test_images_are_embedded_small(tmp_path: Path) -> None:
    small = shown_picture(write_image(tmp_path / "small.png")).url
    assert small.startswith("data:image/png;base64,")
    large = shown_picture(write_image(tmp_path / "large.png", (1600, 900))).url
    with Image.open(io.BytesIO(base64.b64decode(large.split(",")[1]))) as image:
        assert image.size == (448, 252)
    file = write_image(tmp_path / "small.png")
    Path(file.path).write_bytes(b"other")
    with pytest.raises(ValueError, match="has changed"):
        shown_picture(file)


def test_images_are_found_where_the_run_is_now(tmp_path: Path) -> None:
    """Begun in another working directory, with a relative or absolute path, and moved; or with images beside it."""
    images = tmp_path / "now/data/images"
    images.mkdir(parents=True)
    shutil.copy(write_image(tmp_path / "a.png").path, images / "a.png")
    beside = tmp_path / "a.png"
    for recorded, path, wanted in (
        ("runs/a", "runs/a/data/images/a.png", images / "a.png"),
        ("/gone/a", "/gone/a/data/images/a.png", images / "a.png"),
        ("runs/a", str(beside), beside),
        ("runs/a", "data/images/a.png", images / "a.png"),
        (None, "data/images/a.png", images / "a.png"),
    ):
        run = Run(tmp_path / "now", {"run": {"dir": recorded}}, "", [])
        assert place_of(ImageRef(path, ""), run) == wanted, (recorded, path)


def test_lost_images_are_counted_and_few_are_named(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", iterations=2)
    shutil.rmtree(run_dir / "images")
    *named, counted = collect_samples(load_run(run_dir)).problems
    assert len(named) == 3 and all("is not shown: " in line for line in named), "of 4 queries an iteration"
    assert counted == "5 further images are not shown"


def test_a_picture_is_shown_as_the_policy_read_it_and_the_page_says_where_it_was_changed(tmp_path: Path) -> None:
    turned = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(tmp_path / "deep.png")
    shown = {}
    for name in ("turned", "clear", "deep"):
        content = (tmp_path / f"{name}.png").read_bytes()
        shown[name] = shown_picture(ImageRef(str(tmp_path / f"{name}.png"), image_digest(content)))
    assert [each.note for each in shown.values()] == [
        "As the policy read it: turned as its EXIF data say.",
        "As the policy read it: laid on white where it is transparent.",
        "As the policy read it: its deep gray scaled to 8 bits.",
    ]
    pictures = {name: Image.open(io.BytesIO(base64.b64decode(each.url.split(",")[1]))) for name, each in shown.items()}
    assert pictures["turned"].size == (20, 40)
    assert pictures["clear"].getpixel((0, 0)) == (255, 255, 255) and pictures["deep"].getpixel((0, 0)) == (117,) * 3
    assert shown_picture(write_image(tmp_path / "plain.png")).note == ""
    large = shown_picture(write_image(tmp_path / "large.png", (1600, 900)))
    assert large.note == "As the policy read it: 1600 × 900 pixels, shown smaller."


def test_notes_about_pictures_are_on_the_page(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", iterations=1, queries=2)
    clear = run_dir / "images" / "1-0.png"
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(clear)
    block = run_dir / "rollouts" / "iteration_0001" / "block_00000.jsonl"
    groups = read_groups(block)
    image = ImageRef(str(clear), image_digest(clear.read_bytes()))
    groups = [Group(replace(group.query, images=(image,)), group.responses) for group in groups]
    block.unlink()
    write_groups(block, groups)
    samples = Page(write_report(run_dir)).samples
    assert samples["notes"] == {image.digest: "As the policy read it: laid on white where it is transparent."}


def test_pieces_cover_the_whole_text() -> None:
    text = "Look:\nFirst. \nSecond.\nThe answer is 5."
    steps = [Step(0, 3, "First. \n", 0.5, 1.0), Step(3, 6, "Second.\n", math.nan)]
    assert pieces(Response(0, [], text, steps=steps)) == [
        ["Look:", False, None, None], ["First.", True, 0.5, 1.0], ["Second.", True, None, None],
        ["The answer is 5.", False, None, None],
    ]  # fmt: skip
    assert pieces(Response(0, [], "no steps")) == [["no steps", False, None, None]]
    assert pieces(Response(0, [], "x", steps=[Step(0, 1, "elsewhere", 0.1)]))[0] == ["elsewhere", True, 0.1, None]
