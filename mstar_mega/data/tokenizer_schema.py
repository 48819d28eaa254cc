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


class _TokenizerJson(BaseModel):
    model: _Model
    added_tokens: list[_AddedToken] | None = None
    decoder: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    normalizer: dict[str, Any] | None = None


_CONFIG = TypeAdapter(_TokenizerConfig)
_ADDED = TypeAdapter(dict[_Spelling, Id])
_WHOLE = TypeAdapter(_TokenizerJson)


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
