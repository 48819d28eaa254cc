"""Picture files as people have them: what the policy sees, what the report shows, and that either follows a setting."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_families
import torch
from PIL import Image
from test_data_command import run
from test_data_sets import good_rows, row

from mstar_mega.checkpoint_tools.hf_files import HFWeights
from mstar_mega.config import Config, DataConfig, ModelConfig
from mstar_mega.data.pictures import DEFAULT, PictureReading
from mstar_mega.data.screen import look_at_image
from mstar_mega.data.types import ImageRef, Query, image_digest
from mstar_mega.models.build import build_family, build_model
from mstar_mega.models.description import family_from_hf, read_config
from mstar_mega.models.families.base import opened
from mstar_mega.models.families.phi3_5_vision import hd_grid, hd_image
from mstar_mega.models.inference import inference, run_packed
from mstar_mega.models.packing import pack
from mstar_mega.models.weights import load_originals
from mstar_mega.recipe.job import _given_image
from mstar_mega.report.images import shown_picture

ORIGINAL = PictureReading.of(DataConfig(picture_rotation="none", picture_transparency="drop", picture_depth="clip"))


def save(path: Path, picture: Image.Image, **options: object) -> ImageRef:
    picture.save(path, **options)  # type: ignore[arg-type]
    return ImageRef(str(path), image_digest(path.read_bytes()))


def seen(image: ImageRef, reading: PictureReading = DEFAULT) -> np.ndarray:
    with opened(image, reading) as picture:
        assert picture.mode == "RGB"
        assert look_at_image(Path(image.path).read_bytes(), reading).size == picture.size
        return np.asarray(picture).astype(int)


def deep(values: list[list[float]], dtype: type) -> Image.Image:
    return Image.fromarray(np.asarray(values, dtype=dtype))


@pytest.mark.parametrize(
    ("picture", "name", "expected"),
    [
        (deep([[0, 2000], [40000, 65535]], np.uint16), "a.png", [0, 8, 156, 255]),
        (deep([[0, 2000], [40000, 65535]], np.uint16), "a.tiff", [0, 8, 156, 255]),
        (deep([[0, 2000], [40000, 65535]], np.int32), "a.tiff", [0, 8, 156, 255]),
        (deep([[0, 100], [200, 255]], np.int32), "a.tiff", [0, 100, 200, 255]),
        (deep([[-1000, 0], [0, 1000]], np.int32), "a.tiff", [0, 128, 128, 255]),
        (deep([[0, 0.25], [0.5, 1]], np.float32), "a.tiff", [0, 64, 128, 255]),
        (deep([[0, 1e6], [5e5, 1e6]], np.float32), "a.tiff", [0, 255, 128, 255]),
        (deep([[np.nan, np.inf], [0.5, 1]], np.float32), "a.tiff", [0, 0, 128, 255]),
        (deep([[7e6, 7e6], [7e6, 7e6]], np.float32), "a.tiff", [0, 0, 0, 0]),
    ],
)
def test_deep_gray_is_scaled(tmp_path: Path, picture: Image.Image, name: str, expected: list[int]) -> None:
    image = save(tmp_path / name, picture)
    assert seen(image)[..., 0].ravel().tolist() == expected
    assert look_at_image(Path(image.path).read_bytes()).traits == ("deep",)
    with Image.open(image.path) as file:
        assert (seen(image, ORIGINAL) == np.asarray(file.convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "WEBP"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    """Black writing on nothing: white behind it by default, black in the original code."""
    drawing = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    drawing.putpixel((1, 1), (0, 0, 0, 255))
    drawing.putpixel((2, 1), (0, 0, 0, 128))
    if mode == "P":
        coloured = Image.new("P", (4, 2), 1)
        coloured.putpalette([0, 0, 0, 0, 0, 0])
        coloured.putpixel((1, 1), 0)
        image = save(tmp_path / "a.png", coloured, transparency=1)
    elif mode == "WEBP":
        image = save(tmp_path / "a.webp", drawing, lossless=True)
    else:
        image = save(tmp_path / "a.png", drawing.convert(mode))
    found = seen(image)
    assert found[0, 0].tolist() == [255] * 3 and found[1, 1].tolist() == [0] * 3
    if mode != "P":
        assert found[1, 2].tolist() == [127] * 3
    assert look_at_image(Path(image.path).read_bytes()).traits == ("transparent",)
    assert seen(image, ORIGINAL).max() == 0
    opaque = save(tmp_path / "opaque.png", Image.new("RGBA", (2, 2), (3, 4, 5, 255)))
    assert seen(opaque).tolist() == seen(opaque, ORIGINAL).tolist() == [[[3, 4, 5]] * 2] * 2
    assert look_at_image(Path(opaque.path).read_bytes()).traits == ()


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_data_say(tmp_path: Path, kind: str, orientation: int) -> None:
    from PIL import ImageOps

    marks = np.zeros((32, 64), np.uint8)
    marks[:16, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if kind == "webp" else {}
    image = save(tmp_path / f"a.{kind}", Image.fromarray(marks).convert("RGB"), exif=exif, **lossless)
    with Image.open(image.path) as file:
        expected = np.asarray(ImageOps.exif_transpose(file).convert("RGB")).astype(int)
    assert (seen(image) == expected).all()
    with Image.open(image.path) as file:
        assert (seen(image, ORIGINAL) == np.asarray(file.convert("RGB"))).all()
    if kind != "tiff":  # Pillow turns these itself, in every reading
        assert look_at_image(Path(image.path).read_bytes()).traits == (("rotated",) if orientation > 1 else ())
        assert seen(image, ORIGINAL).shape == (32, 64, 3)


def test_damaged_exif_data_turn_nothing(tmp_path: Path) -> None:
    image = save(tmp_path / "a.jpg", Image.new("RGB", (8, 4)), exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert seen(image).shape == (4, 8, 3)


def test_settings_reach_the_policy(tmp_path: Path) -> None:
    image = save(tmp_path / "a.png", Image.new("RGBA", (48, 48), (0, 0, 0, 0)))
    query = Query("a", "How many?", (image,), None)

    def brightest(data: DataConfig) -> float:
        pixels = build_family(Config(model=ModelConfig(size="digits"), data=data)).prompt(query).pixels
        assert pixels is not None
        return float(pixels.max())

    assert brightest(DataConfig()) > 2 and brightest(DataConfig(picture_transparency="drop")) < 0


def shown(image: ImageRef, reading: PictureReading = DEFAULT) -> np.ndarray:
    """The embedded picture as a browser draws it on a gray ground: transparent, turned."""
    from PIL import ImageOps

    content = base64.b64decode(shown_picture(image, reading).url.split(",")[1])
    with Image.open(io.BytesIO(content)) as file:
        upright = ImageOps.exif_transpose(file).convert("RGBA")
    ground = Image.new("RGBA", upright.size, (100, 100, 100, 255))
    return np.asarray(Image.alpha_composite(ground, upright).convert("RGB")).astype(int)


@pytest.mark.parametrize("reading", [DEFAULT, ORIGINAL], ids=["default", "original"])
def test_the_report_shows_what_the_policy_sees(tmp_path: Path, reading: PictureReading) -> None:
    marks = np.zeros((8, 16, 3), np.uint8)
    marks[:4, :8] = 200
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(marks), Image.new("RGB", (16, 8), "red")]
    files = (
        save(tmp_path / "plain.png", Image.fromarray(marks)),
        save(tmp_path / "turned.png", Image.fromarray(marks), exif=exif),
        save(tmp_path / "clear.png", Image.new("RGBA", (4, 4), (9, 9, 9, 0))),
        save(tmp_path / "deep.png", deep([[0, 40000]], np.uint16)),
        save(tmp_path / "moving.gif", frames[0], save_all=True, append_images=frames[1:]),
    )
    for image in files:
        assert (shown(image, reading) == seen(image, reading)).all(), image.path
    assert shown_picture(files[0], reading).url.endswith(base64.b64encode(Path(files[0].path).read_bytes()).decode())
    moving = base64.b64decode(shown_picture(files[-1], reading).url.split(",")[1])
    assert getattr(Image.open(io.BytesIO(moving)), "n_frames", 1) == 1


def test_data_check_counts_what_is_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = good_rows(tmp_path)
    folder = tmp_path / "GEOS" / "images"
    exif = Image.Exif()
    exif[0x0112] = 6
    save(folder / "t.png", Image.new("RGBA", (8, 8), (0, 0, 0, 0)))
    save(folder / "r.jpg", Image.new("RGB", (16, 8), (1, 2, 3)), exif=exif)
    save(folder / "d.png", deep([[0, 40000]] * 8, np.uint16))
    rows += [row(name, f"GEOS/images/{name}") for name in ("t.png", "r.jpg", "d.png")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    small = ("--data.validation_queries", "10", "--data.test_queries", "14")
    assert run("check", tmp_path / "rows.json", *small, "--out", tmp_path / "out.json") == 0
    text = capsys.readouterr().out
    for line in (
        "     1  transparent, laid on white (data.picture_transparency): GEOS/images/t.png",
        "     1  turned as their EXIF data say (data.picture_rotation): GEOS/images/r.jpg",
        "     1  scaled to 8 bits of gray (data.picture_depth): GEOS/images/d.png",
    ):
        assert line in text
    assert json.loads((tmp_path / "out.json").read_text())["images"]["max_height"] == 16
    assert run("check", tmp_path / "rows.json", *small, "--data.picture_rotation", "none") == 0
    assert "not turned as their EXIF data say (data.picture_rotation)" in capsys.readouterr().out


@pytest.mark.parametrize("size", [(1, 6000), (60_000, 1), (1, 1), (5_376, 1), (1, 5_377)])
def test_phi_reads_pictures_of_any_aspect(size: tuple[int, int], tmp_path: Path) -> None:
    """The original scales them to no height at all, and stops."""
    for crops, crop in ((16, 336), (4, 28)):
        padded = hd_image(Image.new("RGB", size), crops, crop)
        rows, columns = hd_grid(*size, crops, crop)
        assert (padded.width, padded.height) == (columns * crop, rows * crop) and 1 <= rows * columns <= crops
    family = family_from_hf(tiny_families.make_model_directory("phi3_5_vision", tmp_path / "hf"))
    image = save(tmp_path / "a.png", Image.new("RGB", size))
    prompt = family.prompt(Query("a", "How many?", (image,), None))
    assert len(prompt.tokens) == family.prompt_length("How many?", [size])


def test_generate_takes_what_a_set_takes(tmp_path: Path) -> None:
    good = save(tmp_path / "a.png", Image.new("RGB", (4, 4)))
    assert _given_image(good.path) == good
    save(tmp_path / "a.ico", Image.new("RGB", (16, 16)))
    with pytest.raises(ValueError, match=r"--image .*a\.ico: it is no image of the kinds JPEG, PNG"):
        _given_image(str(tmp_path / "a.ico"))
    (tmp_path / "cut.png").write_bytes(Path(good.path).read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"--image .*cut\.png: "):
        _given_image(str(tmp_path / "cut.png"))
    (tmp_path / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"lfs\.png: it is a Git LFS pointer"):
        _given_image(str(tmp_path / "lfs.png"))


@pytest.mark.usefixtures("job_of_one")
@pytest.mark.parametrize("name", tiny_families.NAMES)
def test_the_policy_sees(name: str, tmp_path: Path) -> None:
    """Each query's log-probs follow its own picture: with the pictures of a batch permuted they permute too."""
    directory = tiny_families.make_model_directory(name, tmp_path / "hf")
    family = family_from_hf(directory)
    model = build_model(Config(model=ModelConfig(family=name)), family)
    load_originals(model, family.weight_map(read_config(directory)), HFWeights(directory).read)
    noise = np.random.default_rng(0)
    images = [
        save(tmp_path / f"{i}.png", Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)))
        for i in range(3)
    ]
    response = family.response_tokens("The sum is 7.")

    def log_probs(order: list[int]) -> torch.Tensor:
        """[queries, response tokens]; every query asks the same."""
        prompts = [family.prompt(Query(str(i), "How many?", (images[i],), None)) for i in order]
        packed = pack(prompts, [[response]] * len(prompts), regimes=model.rope.regimes)
        with inference(model):
            hidden = run_packed(model, packed)
            assert hidden is not None
            logits = model.logits(hidden)
        lengths = [len(prompt.tokens) + len(response) for prompt in prompts]
        rows = logits.reshape(-1, logits.size(-1)).split(lengths)
        targets = torch.tensor(response)
        return torch.stack(
            [part[-len(response) - 1 : -1].log_softmax(-1).gather(1, targets[:, None])[:, 0] for part in rows]
        )

    straight = log_probs([0, 1, 2])
    differences = (straight[:, None] - straight[None]).abs().amax(-1)
    assert (differences[~torch.eye(3, dtype=torch.bool)] > 1e-4).all(), "the picture changes nothing"
    torch.testing.assert_close(log_probs([2, 0, 1]), straight[[2, 0, 1]], rtol=0, atol=2e-5)


def test_damage_is_not_hidden_by_looking_for_exif_data(tmp_path: Path) -> None:
    image = save(tmp_path / "a.png", Image.effect_noise((64, 64), 50))
    content = bytearray(Path(image.path).read_bytes())
    content[len(content) // 2] ^= 1
    Path(image.path).write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        look_at_image(bytes(content))
    for look in (lambda ref: opened(ref).__enter__(), lambda ref: shown_picture(ref)):
        with pytest.raises((OSError, ValueError)):
            look(ImageRef(image.path, image_digest(bytes(content))))
