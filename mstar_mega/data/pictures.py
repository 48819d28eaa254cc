"""How an image file becomes the RGB picture that a policy sees.

By default a picture is what a person sees of the file: turned as its EXIF data say, on white where it is transparent,
and with gray of more than 8 bits scaled to them. The policies' original code does none of this (Pillow's
``convert("RGB")`` alone); the settings ``data.picture_rotation none``, ``data.picture_transparency drop`` and
``data.picture_depth clip`` together read exactly as it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from PIL import Image

from mstar_mega.config import DataConfig
from mstar_mega.data.screen import FORMATS, MAX_PIXELS
from mstar_mega.platform.inputs import open_input

ROTATED, TRANSPARENT, DEEP = "rotated", "transparent", "deep"
"""What can be special about a file; :func:`traits` gives them."""
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By the value of EXIF's orientation; 1 and everything else: as it lies."""
_RANGES = (1, 255, 65_535)
"""Brightest values that deep gray usually has, where the format does not say."""


def open_picture(raw: IO[bytes]) -> Image.Image:
    """A picture, nothing of it decoded yet. Raises OSError for another format than :data:`FORMATS`, some of which
    Pillow would hand to another program, and ValueError for more than ``MAX_PIXELS``."""
    picture = Image.open(raw, formats=FORMATS)
    if picture.size[0] * picture.size[1] > MAX_PIXELS:
        raise ValueError(f"it is {picture.size[0]} x {picture.size[1]} pixels, more than {MAX_PIXELS}")
    return picture


def file_size(path: str) -> tuple[int, int]:
    """(width, height) of a file as it lies; only its head is read. Raises OSError where it is no picture."""
    with open_input(path) as raw, open_picture(raw) as picture:
        return picture.size


@dataclass(frozen=True)
class PictureReading:
    """The settings that decide how files are read."""

    rotate: bool
    on_white: bool
    scale: bool

    @staticmethod
    def of(config: DataConfig) -> PictureReading:
        """Those of a run."""
        return PictureReading(
            config.picture_rotation == "exif", config.picture_transparency == "white", config.picture_depth == "scale"
        )

    @staticmethod
    def of_settings(data: Any) -> PictureReading:
        """Those of a run's own ``data`` settings as they stand in its file; the default where they say nothing."""
        names = ("picture_rotation", "picture_transparency", "picture_depth")
        known = {name: data[name] for name in names if name in data} if isinstance(data, dict) else {}
        return PictureReading.of(DataConfig(**known))

    def size(self, picture: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) that :meth:`read` gives a file of this size; ``picture`` is decoded, at any scale."""
        width, height = size
        return (height, width) if self.rotate and _orientation(picture) >= 5 else (width, height)

    def read(self, picture: Image.Image) -> Image.Image:
        """The RGB picture of an opened file. Raises OSError or ValueError as decoding does."""
        picture.load()
        turn = _TURNS.get(_orientation(picture)) if self.rotate else None
        if self.scale and _is_deep(picture):
            read = Image.fromarray(_scaled(picture)).convert("RGB")
        elif self.on_white and _alpha(picture) is not None:
            coloured = picture.convert("RGBA")
            white = Image.new("RGBA", coloured.size, "white")
            read = Image.alpha_composite(white, coloured).convert("RGB")
        else:
            read = picture.convert("RGB")
        return read if turn is None else read.transpose(turn)

    def tells(self, trait: str) -> str:
        """What is done with the files of a trait, and the setting that says so."""
        done, left, does, setting = {
            ROTATED: ("turned as their EXIF data say", "not turned as their EXIF data say", self.rotate, "rotation"),
            TRANSPARENT: ("transparent, laid on white", "read without transparency", self.on_white, "transparency"),
            DEEP: ("scaled to 8 bits of gray", "of more than 8 bits of gray, white above 255", self.scale, "depth"),
        }[trait]
        return f"{done if does else left} (data.picture_{setting})"

    def changes(self, picture: Image.Image) -> list[str]:
        """In words, how what :meth:`read` gives of a decoded file is not the file as it lies, or not what a viewer
        shows of it."""
        done = {
            ROTATED: "turned as its EXIF data say" if self.rotate else "not turned as its EXIF data say",
            DEEP: "its deep gray scaled to 8 bits" if self.scale else "everything above 255 of its deep gray is white",
            TRANSPARENT: "laid on white where it is transparent" if self.on_white else "read without its transparency",
        }
        words = [done[trait] for trait in traits(picture)]
        frames = getattr(picture, "n_frames", 1)
        words += [f"the first of its {frames} frames"] if frames > 1 else []
        return words + (["without its colour profile"] if "icc_profile" in picture.info else [])


DEFAULT = PictureReading.of(DataConfig())


def traits(picture: Image.Image) -> tuple[str, ...]:
    """What of :data:`ROTATED`, :data:`TRANSPARENT` and :data:`DEEP` a decoded file is."""
    found = {ROTATED: _orientation(picture) > 1, DEEP: _is_deep(picture), TRANSPARENT: _alpha(picture) is not None}
    return tuple(name for name, holds in found.items() if holds)


def is_plain(picture: Image.Image) -> bool:
    """Whether a file shows in every viewer as every reading reads it: 8-bit gray or colour alone. Decodes it;
    raises OSError or ValueError as that does."""
    picture.load()
    modes = picture.mode in ("1", "L", "RGB") or (picture.mode == "P" and "transparency" not in picture.info)
    still = getattr(picture, "n_frames", 1) == 1
    return modes and still and _orientation(picture) == 1 and not picture.info.keys() & {"icc_profile", "transparency"}


def _orientation(picture: Image.Image) -> int:
    """EXIF's orientation, 1 to 8, of a decoded picture: a PNG would be decoded here, and its damage hidden. A TIFF is
    turned by Pillow itself."""
    try:
        found = picture.getexif().get(_ORIENTATION, 1) if picture.format != "TIFF" else 1
    except Exception:  # a damaged EXIF block says nothing; Pillow raises whatever its parser meets
        return 1
    return found if isinstance(found, int) and found in _TURNS else 1


def _is_deep(picture: Image.Image) -> bool:
    """Gray of more than 8 bits or in floats, of which ``convert("RGB")`` keeps what lies in 0 to 255."""
    return picture.mode == "F" or picture.mode.startswith("I")


def _scaled(picture: Image.Image) -> np.ndarray:
    """uint8 [H, W]: 16 bits by their range; others by the smallest usual range that holds every value, or, where none
    does, from the lowest to the highest value. What is no number is black."""
    values = np.asarray(picture, dtype=np.float64)
    values = np.where(np.isfinite(values), values, 0.0)
    low, high = float(values.min()), float(values.max())
    if picture.mode.startswith("I;16"):
        low, high = 0.0, 65_535.0
    elif low >= 0 and high <= _RANGES[-1]:
        low, high = 0.0, float(next(most for most in _RANGES if high <= most))
    scaled: np.ndarray = np.rint((values - low) * (255 / max(high - low, 1e-300))).astype(np.uint8)
    return scaled


def _alpha(picture: Image.Image) -> Image.Image | None:
    """How opaque a decoded picture is, point by point; None where it is everywhere."""
    if not picture.has_transparency_data or _is_deep(picture):
        return None
    alpha = picture.convert("RGBA").getchannel("A")
    return alpha if alpha.getextrema()[0] != 255 else None
