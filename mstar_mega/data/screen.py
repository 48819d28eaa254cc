"""Set aside queries that no stage can use: unreadable images and malformed questions, each with its reason."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mstar_mega.data.types import ImageRef, Query, Skipped, Task, image_digest
from mstar_mega.platform.files import is_lfs_pointer
from mstar_mega.platform.inputs import read_input

if TYPE_CHECKING:
    from mstar_mega.data.pictures import PictureReading

_DRAFT = (64, 64)
"""JPEG decodes at the scale next above this, which reads the whole file and costs a fraction."""
_THREADS = 8
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row of each pass of an interlaced PNG, and the steps to the next."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is tried, by Pillow's names: pictures, and nothing that needs another program."""
MAX_PIXELS = 1 << 26
"""The largest picture that is decoded: 200 MB as RGB."""
MAX_BYTES = 1 << 28
"""Of an image file: more than its pixels could take."""


_COUNTS = re.compile(r" \(\d+ bytes not processed\)")


def screen(
    queries: Sequence[Query], name: str, check_image: Callable[[ImageRef], None], needs_answer: bool = True
) -> tuple[list[Query], list[Skipped]]:
    """(usable queries in their order, the others). ``name`` is the set's, for the reasons.

    ``check_image`` raises OSError or ValueError for an unusable image; each file is looked at once, several at a time.
    """
    refs = list(dict.fromkeys(image for query in queries for image in query.images))
    with ThreadPoolExecutor(_THREADS) as pool:
        images = dict(zip(refs, pool.map(lambda ref: problem_of(lambda: check_image(ref)), refs), strict=True))
    good: list[Query] = []
    skipped: list[Skipped] = []
    seen: set[str] = set()
    for query in queries:
        problem = _question_problem(query, seen, needs_answer) or next(
            ((image.path, why) for image in query.images if (why := images[image])), None
        )
        seen.add(query.id)
        if problem is None:
            good.append(query)
        else:
            skipped.append(Skipped(f"query {query.id} of the {name} set", *problem))
    return good, skipped


def screen_task(task: Task) -> Task:
    """A task whose sets are in memory without the queries that no stage can use; they are in its ``skipped``."""
    skipped: list[Skipped] = []
    warmup, dropped = screen([query for query, _ in task.warmup], "warm-up", check_image)
    skipped += dropped
    kept = set(map(id, warmup))
    sets: dict[str, Any] = {}
    for name in ("labelled", "unlabelled", "validation", "test"):
        sets[name], dropped = screen(getattr(task, name), name, check_image, needs_answer=name != "unlabelled")
        skipped += dropped
    pairs = [pair for pair in task.warmup if id(pair[0]) in kept]
    return replace(task, warmup=pairs, **sets, skipped=[*task.skipped, *skipped])


@dataclass(frozen=True)
class Seen:
    """An image file that can be decoded to its end."""

    width: int
    height: int
    traits: tuple[str, ...] = ()
    """See ``pictures.traits``."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, as the policy gets it."""
        return self.width, self.height


def check_image(image: ImageRef) -> None:
    """Decode an image to its end. Raises OSError or ValueError when it is missing, cut off, or not the file meant."""
    content = read_input(image.path, MAX_BYTES)
    if image_digest(content) != image.digest:
        raise ValueError("the file is not the one that the data name (its digest differs)")
    readable_image(content)


def readable_image(content: bytes) -> tuple[int, int]:
    """(width, height) of :func:`look_at_image`."""
    return look_at_image(content).size


def look_at_image(content: bytes, reading: PictureReading | None = None) -> Seen:
    """Decode an image file to its end. ``reading`` decides its size (None: by default). Raises OSError or ValueError
    when it is broken, and before anything is decoded when its header announces more than ``MAX_PIXELS``."""
    from io import BytesIO

    from PIL import Image, UnidentifiedImageError

    from mstar_mega.data.pictures import DEFAULT, traits

    try:
        with Image.open(BytesIO(content), formats=FORMATS) as picture:
            size = picture.size
            if size[0] * size[1] > MAX_PIXELS:
                raise ValueError(f"it is {size[0]} x {size[1]} pixels, more than {MAX_PIXELS}: a decompression bomb?")
            picture.draft("RGB", _DRAFT)
            picture.load()
            if picture.format == "PNG":
                _check_png_rows(content)
            elif picture.format in ("JPEG", "MPO"):
                _check_jpeg_blocks(content, size)
            # A JPEG is decoded at a smaller scale; a TIFF may have been turned.
            stored = size if picture.format in ("JPEG", "MPO") else picture.size
            return Seen(*(reading or DEFAULT).size(picture, stored), traits(picture))
    except UnidentifiedImageError:
        if is_lfs_pointer(content):
            raise ValueError("it is a Git LFS pointer, not the picture: run `git lfs pull`") from None
        raise ValueError(f"it is no image of the kinds {', '.join(FORMATS)}") from None
    except (SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, for broken PNG chunks and absurd sizes
        raise ValueError(str(error)) from error


def _check_png_rows(content: bytes) -> None:
    """Raises ValueError for a PNG with fewer pixels than its header announces, whose rest Pillow leaves black."""
    position, unpack, inflated, wanted = 8, zlib.decompressobj(), 0, 0
    while position + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, position)
        data = content[position + 8 : position + 8 + length]
        if name == b"IHDR":
            width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data)
            bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
            passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
            sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes if x < width]
            wanted = sum(max(0, rows) * (1 + -(-columns * bits // 8)) for columns, rows in sizes)
        elif name == b"IDAT":
            while data and inflated < wanted:
                inflated += len(unpack.decompress(data, 1 << 16))
                data = unpack.unconsumed_tail
        position += 12 + length
    if inflated < wanted:
        raise ValueError(f"its header announces more pixels than it holds ({inflated} of {wanted} bytes)")


def _check_jpeg_blocks(content: bytes, size: tuple[int, int]) -> None:
    """Raises ValueError for a JPEG with less than a bit for each of its 8 x 8 blocks, whose rest the decoder fills."""
    blocks = -(-size[0] // 8) * -(-size[1] // 8)
    if 8 * len(content) < blocks:
        raise ValueError(f"its header announces {size[0]} x {size[1]} pixels, more than {len(content)} bytes can hold")


def problem_of(look: Callable[[], object]) -> str:
    """What is wrong with an image that ``look`` reads; empty if nothing is."""
    try:
        look()
    except FileNotFoundError:
        return "there is no such file"
    except (OSError, ValueError) as error:
        # Without the counts of bytes, which would make a reason of its own of each file.
        return _COUNTS.sub("", " ".join(str(error).split())) or type(error).__name__
    return ""


def _question_problem(query: Query, seen: set[str], needs_answer: bool) -> tuple[str, str] | None:
    """(field, what is wrong with it) of a malformed query."""
    letters = [chr(ord("A") + i) for i in range(len(query.choices))]
    if not query.id.strip():
        return "id", "it is empty"
    if query.id in seen:
        return "id", "an earlier query has the same"
    if not query.question.strip():
        return "question", "it is empty"
    answer = query.answer if needs_answer else query.hidden_answer
    if answer is None:
        return ("answer", "there is no gold answer") if needs_answer else None
    if not answer.strip():
        return "answer", "it is empty"
    if letters and answer not in letters:
        return "answer", f"{answer!r} is none of the choices {', '.join(letters)}"
    return None
