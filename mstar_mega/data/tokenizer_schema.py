"""What a tokenizer's JSON files may hold, before tables are made of their ids."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from mstar_mega.platform.files import refuse_lfs_pointer
from mstar_mega.platform.inputs import checked, read_object

MOST_IDS = 1 << 22
"""Ten times the largest vocabulary that is known."""

Id = Annotated[int, Field(ge=0, lt=MOST_IDS)]
_Spelling = Annotated[str, Field(min_length=1, max_length=1000)]


class _Token(BaseModel):
    content: _Spelling


class _TokenizerConfig(BaseModel):
    added_tokens_decoder: dict[Id, _Token] = {}


class _AddedToken(_Token):
    id: Id


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow")

    vocab: dict[str, Annotated[int, Field(strict=True, ge=0, lt=MOST_IDS)]]


_MOST_PARTS = 16
_NORMALIZERS = ("Sequence", "Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD")
_SAVED_AGAIN = (
    "it is no Llama tokenizer, or another program saved it again; copy tokenizer.json from the original model"
)
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")


class _TokenizerJson(BaseModel):
    model: _Model
    added_tokens: list[_AddedToken] | None = None
    decoder: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    normalizer: dict[str, Any] | None = None


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str
    normalizers: list[_Part] = []
    pretokenizers: list[_Part] = []
    prepend: Annotated[str, Field(max_length=_MOST_PARTS)] = ""
    pattern: Any = None
    content: str = ""

    def parts(self) -> list[_Part]:
        """This one and those inside it."""
        return [self, *(part for each in (*self.normalizers, *self.pretokenizers) for part in each.parts())]


_CONFIG = TypeAdapter(_TokenizerConfig)
_ADDED = TypeAdapter(dict[_Spelling, Id])
_WHOLE = TypeAdapter(_TokenizerJson)
_PART = TypeAdapter(_Part)


def config_controls(file: Path) -> dict[str, int]:
    """Control symbols that a tokenizer_config.json names. Raises ValueError naming the file and what is wrong."""
    refuse_lfs_pointer(file)
    found = checked(_CONFIG, read_object(file), file)
    return {token.content: id for id, token in found.added_tokens_decoder.items()}


def added_controls(file: Path) -> dict[str, int]:
    """Control symbols that an added_tokens.json names. Raises ValueError naming the file and what is wrong."""
    refuse_lfs_pointer(file)
    return checked(_ADDED, read_object(file), file)


def check_tokenizer_json(file: Path) -> None:
    """Raises ValueError naming the file for a tokenizer.json that is none, or has ids that no vocabulary has."""
    try:
        checked(_WHOLE, read_object(file), file)
    except ValueError as error:
        raise ValueError(f"{file} is not a tokenizer.json: {str(error).removeprefix(f'{file}: ')}") from None


def harmless(content: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json without the parts that are of no use here, and that could make a text as long as its author
    likes, or end the process inside the library. Raises ValueError where a part that is needed could.

    A text that is encoded becomes at most a few times as long.
    """
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {str(model['type'])[:40]!r}: only BPE is read")
    if affix := next((name for name in _AFFIXES if model.get(name)), None):
        raise ValueError(f"model.{affix} is {str(model[affix])[:40]!r}: only null is read")
    for part in _parts(content, "normalizer"):
        if part.type not in _NORMALIZERS:
            raise ValueError(f"normalizer {part.type[:40]!r} is none of {', '.join(_NORMALIZERS)}: {_SAVED_AGAIN}")
        before = part.pattern.get("String") if isinstance(part.pattern, dict) else None
        if part.type == "Replace" and not (isinstance(before, str) and len(part.content) <= len(before)):
            raise ValueError("normalizer 'Replace' makes a text longer, or has a pattern: it may replace a plain text")
    if sum(part.type == "ByteLevel" for part in _parts(content, "pre_tokenizer")) > 1:
        raise ValueError("pre_tokenizer 'ByteLevel' stands twice")
    unused = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    return {**content, **unused, "model": {**model, "dropout": None}}


def _parts(content: dict[str, Any], name: str) -> list[_Part]:
    if content.get(name) is None:
        return []
    parts = checked(_PART, content[name], name).parts()
    if len(parts) > _MOST_PARTS:
        raise ValueError(f"{name} has {len(parts)} parts, more than {_MOST_PARTS}")
    return parts
