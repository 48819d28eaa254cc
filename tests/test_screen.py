"""Images and questions that cannot be used are named, and each image is looked at once."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mstar_mega.data.screen import Skipped, check_image, screen
from mstar_mega.data.types import ImageRef, Query


def picture(kind: str = "PNG", size: tuple[int, int] = (48, 48)) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def ref(path: Path, content: bytes) -> ImageRef:
    path.write_bytes(content)
    return ImageRef(str(path), sha256(content).hexdigest()[:16])


def query(id: str, images: tuple[ImageRef, ...] = (), **fields: object) -> Query:
    return replace(Query(id, "How many?", images, "3"), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_whole_images_pass_and_cut_ones_do_not(tmp_path: Path, kind: str) -> None:
    whole = picture(kind, (200, 300))
    check_image(ref(tmp_path / "whole", whole))
    for cut in (0, 1, 20, len(whole) // 2, len(whole) * 9 // 10):
        with pytest.raises((OSError, ValueError)):
            check_image(ref(tmp_path / "cut", whole[:cut]))


def test_damaged_and_foreign_files_are_no_images(tmp_path: Path) -> None:
    whole = bytearray(picture())
    named = ref(tmp_path / "flipped", bytes(whole))
    whole[len(whole) // 2] ^= 1
    (tmp_path / "flipped").write_bytes(whole)
    with pytest.raises(ValueError, match="digest"):
        check_image(named)
    with pytest.raises((OSError, ValueError)):  # the same damage, in a file that was so from the start
        check_image(ref(tmp_path / "flipped", bytes(whole)))
    with pytest.raises(ValueError, match="it is no image of the kinds JPEG, PNG"):
        check_image(ref(tmp_path / "text", b"not an image"))


def test_an_image_of_absurd_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="decompression bomb"):
        check_image(ref(tmp_path / "large", picture()))


def test_the_screen_names_what_it_leaves_out(tmp_path: Path) -> None:
    image = ref(tmp_path / "good.png", picture())
    cut = ref(tmp_path / "cut.png", picture()[:99])
    missing = ImageRef(str(tmp_path / "none.png"), "")
    choices = ("one", "two")
    queries = [
        query("a", (image,)),
        query("b", (image, cut)),
        query("c", (missing,)),
        query("d", question=" \n"),
        query("e", answer=None),
        query("f", answer="C", choices=choices),
        query("g", answer="B", choices=choices),
        query("a", (image,)),
        query(" "),
        query("h", answer=" "),
        query("i"),
    ]
    usable, skipped = screen(queries, "test", check_image)
    assert usable == [queries[0], queries[6], queries[10]]
    assert [(each.what, each.where) for each in skipped] == [
        ("query b of the test set", cut.path),
        ("query c of the test set", missing.path),
        ("query d of the test set", "question"),
        ("query e of the test set", "answer"),
        ("query f of the test set", "answer"),
        ("query a of the test set", "id"),
        ("query   of the test set", "id"),
        ("query h of the test set", "answer"),
    ]
    assert all(each.reason for each in skipped)
    assert skipped[4].reason == "'C' is none of the choices A, B"
    hidden = query("u", answer=None, hidden_answer="3")
    assert screen([hidden], "unlabelled", check_image, needs_answer=False) == ([hidden], [])


def test_each_image_is_looked_at_once() -> None:
    seen: list[ImageRef] = []
    image = ImageRef("x", "y")
    screen([query("a", (image,)), query("b", (image,))], "test", seen.append)
    assert seen == [image]


def test_a_reason_is_one_line_of_plain_text() -> None:
    def fail(image: ImageRef) -> None:
        raise ValueError("several\nlines")

    assert screen([query("a", (ImageRef("x", ""),))], "test", fail)[1] == [
        Skipped("query a of the test set", "x", "several lines")
    ]
