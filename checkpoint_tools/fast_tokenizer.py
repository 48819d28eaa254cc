"""A sentencepiece model as tokenizer.json, so that transformers reads it without code of the model's.

Only models that :class:`~mstar_mega.data.tokenizer.SentencePieceTokenizer` takes: byte fallback, no dummy prefix, no
normalisation. What the file then says is held against that tokenizer on awkward texts before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mstar_mega.data.tokenizer import SPACE_MARK, SentencePieceTokenizer
from mstar_mega.platform.inputs import MOST_JSON, read_input

AWKWARD = (
    "What is the sum of the digits?", " leading and  double   spaces ", "tab\there\n\nnew lines\n", "", " ", "\n",
    "3.14159 × 10⁻⁷ = −12 %", "naïve Ångström Łódź", "数学と画像、由上海人工智能", "🙂👩‍👩‍👧", "x^2+y_{1}=\\frac{a}{b}",
    "</s><s> <unk> <|im_end|> <img>", "AAAAAAAAAAAAAAAAAAA bbbbbbbbbbbbb", "#Answer\n\n# Answer\n\n(B)",
    "\u00a0\u200b\ufeff", "def f(x):\n    return x  # two", "http://a.b/c?d=e&f=g", "0123456789 98765 43210",
)  # fmt: skip
"""Texts whose ids have to be equal."""


def fast_tokenizer(model: Path, controls: Mapping[str, int]) -> dict[str, Any]:
    """The content of tokenizer.json for a sentencepiece model with these control symbols besides its own.

    Raises ValueError where the two disagree on any of :data:`AWKWARD`.
    """
    import tokenizers

    ours = SentencePieceTokenizer(model, controls)
    content = _content(model, controls)
    theirs = tokenizers.Tokenizer.from_buffer(json.dumps(content, ensure_ascii=False).encode())
    names = {token["content"] for token in content["added_tokens"]} | {content["model"].get("unk_token") or "<unk>"}
    for text in AWKWARD:
        for name in names:
            text = text.replace(name, "")  # what spells a control symbol is one for transformers
        if theirs.encode(text, add_special_tokens=False).ids != ours.encode(text):
            raise ValueError(
                f"{model} cannot be written for transformers: the ids of {text[:40]!r} would be others. Export without "
                "--layout native, and tokenize with this program"
            )
    return content


def _content(model: Path, controls: Mapping[str, int]) -> dict[str, Any]:
    from sentencepiece import sentencepiece_model_pb2 as proto

    spec = proto.ModelProto()
    spec.ParseFromString(read_input(model, MOST_JSON))
    kinds = proto.ModelProto.SentencePiece
    pieces = list(spec.pieces)
    names = {id: name for name, id in controls.items()}
    added = [
        _added(id, names.get(id, piece.piece), special=piece.type != kinds.USER_DEFINED)
        for id, piece in enumerate(pieces)
        if id in names or piece.type in (kinds.CONTROL, kinds.USER_DEFINED)
    ]
    added += [_added(id, name, special=True) for id, name in sorted(names.items()) if id >= len(pieces)]
    unknown = next(piece.piece for piece in pieces if piece.type == kinds.UNKNOWN)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": space,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": _unigram(pieces, unknown)
        if spec.trainer_spec.model_type == proto.TrainerSpec.UNIGRAM
        else _bpe(pieces, unknown, kinds),
    }


def _added(id: int, name: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": name, **flags, "special": special}


def _unigram(pieces: list[Any], unknown: str) -> dict[str, Any]:
    vocab = [[piece.piece, piece.score] for piece in pieces]
    place = next(i for i, piece in enumerate(pieces) if piece.piece == unknown)
    return {"type": "Unigram", "unk_id": place, "vocab": vocab, "byte_fallback": True}


def _bpe(pieces: list[Any], unknown: str, kinds: Any) -> dict[str, Any]:
    """Every way to join two pieces to a third is a merge; sentencepiece prefers the third of the highest score."""
    normal = {piece.piece: (-piece.score, id) for id, piece in enumerate(pieces) if piece.type == kinds.NORMAL}
    merges = [
        (rank, len(piece) - cut, [piece[:cut], piece[cut:]])
        for piece, rank in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    merges.sort(key=lambda each: each[:2])
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {piece.piece: id for id, piece in enumerate(pieces)},
        "merges": [pair for _, _, pair in merges],
    }
