"""A picture for a page: as the policy read it, small, and with a word where that is not the file as it lies."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mstar_mega.data.pictures import DEFAULT, PictureReading, is_plain, open_picture
from mstar_mega.data.screen import MAX_BYTES
from mstar_mega.data.types import ImageRef, image_digest
from mstar_mega.platform.inputs import read_input

MOST_SIDE = 448
"""Pixels of an embedded image's longer side."""
MOST_IMAGE_BYTES = 40_000
"""A larger file is encoded again."""
_EMBEDDABLE = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


@dataclass(frozen=True)
class Shown:
    """A picture on a page."""

    url: str
    """Data URL."""
    note: str
    """How the policy's picture is not the file as it lies, and whether this one is smaller; empty: neither."""


NOT_SHOWN = Shown("", "")


def shown_picture(image: ImageRef, reading: PictureReading = DEFAULT) -> Shown:
    """An image as the policy reads it, at most 448 pixels a side.

    Raises OSError where it cannot be read or decoded, ValueError where the file is no longer the one the run used.
    """
    content = read_input(Path(image.path), MAX_BYTES)
    if image_digest(content) != image.digest:
        raise ValueError("the file has changed since the run used it")
    try:
        with open_picture(io.BytesIO(content)) as picture:
            kind = _EMBEDDABLE.get(picture.format or "")
            large = max(picture.size) > MOST_SIDE or len(content) > MOST_IMAGE_BYTES
            words = []
            # A browser turns, composes, animates and colours the file by its own rules.
            if kind is None or large or not is_plain(picture):
                small = reading.read(picture)
                words, size = reading.changes(picture), small.size
                small.thumbnail((MOST_SIDE, MOST_SIDE))
                if small.size != size:
                    words.append(f"{size[0]} × {size[1]} pixels, shown smaller")
                buffer = io.BytesIO()
                if large:
                    small.save(buffer, "JPEG", quality=82)
                else:
                    small.save(buffer, "PNG")
                kind, content = "image/jpeg" if large else "image/png", buffer.getvalue()
    except (Image.DecompressionBombError, SyntaxError, struct.error, zlib.error) as error:  # Pillow's, on damaged files
        raise ValueError(str(error)) from error
    note = f"As the policy read it: {'; '.join(words)}." if words else ""
    return Shown(f"data:{kind};base64,{base64.b64encode(content).decode()}", note)
