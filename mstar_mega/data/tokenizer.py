"""Tokenizers from the files of a model directory; encode and decode are exact inverses for any text.

A control symbol (a mark of the chat template, a media token, the end of a text) never comes out of ``encode``, even
where the text spells one, and decodes to nothing. Nothing here runs code that comes with a model.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from mstar_mega.data.tokenizer_schema import added_controls, check_tokenizer_json, config_controls, harmless
from mstar_mega.platform.files import refuse_lfs_pointer
from mstar_mega.platform.inputs import MOST_JSON, read_input

SPACE_MARK = "\u2581"
"""sentencepiece stores a space as this character; a text that holds the character itself goes through byte pieces."""


class Tokenizer:
    """What all tokenizers share: ids back to text, and ids of control symbols."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.vocab_size = 0
        """Number of ids; ids are 0 to ``vocab_size`` - 1."""
        self._texts: list[str] = []
        self._bytes: dict[int, bytes] = {}
        """Ids that stand for bytes, not for text of their own."""
        self._controls: dict[str, int] = {}
        self._first_space = False
        """Texts are encoded with a space in front, which is taken off again."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without begin or end marks; never a control symbol.

        Raises:
            ValueError: ``text`` has a lone surrogate, which no UTF-8 text can hold.
        """
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``. Control symbols decode to nothing, bytes that are not UTF-8 to U+FFFD.

        Raises:
            IndexError: an id is outside the vocabulary.
        """
        return "".join(self._pieces(ids))

    def offsets(self, ids: list[int]) -> list[int]:
        """Decoded characters up to and including each token: ``decode(ids)[:offsets(ids)[i]]`` belongs to the first
        i + 1 tokens. A character spelt with several byte pieces belongs to the last of them."""
        total, offsets = 0, []
        for piece in self._pieces(ids):
            total += len(piece)
            offsets.append(total)
        return offsets

    def id(self, piece: str) -> int:
        """Id of a control symbol such as ``<|im_end|>``.

        Raises:
            ValueError: the tokenizer has no such control symbol.
        """
        id = self._controls.get(piece)
        if id is None:
            raise ValueError(f"the tokenizer {self.path} has no control symbol {piece!r}")
        return id

    def spells_as(self, other: Tokenizer) -> bool:
        """Whether every id stands for the same text, byte or control symbol in both: ids of one can be read as the
        other's."""
        return (
            self.vocab_size == other.vocab_size
            and (self._texts, self._bytes, self._controls) == (other._texts, other._bytes, other._controls)
            and self._first_space == other._first_space
        )

    def silent(self, size: int | None = None) -> list[int]:
        """Ids below ``size`` (None: the vocabulary's) that decode to nothing: control symbols and unassigned ids."""
        ids = range(self.vocab_size if size is None else size)
        return [id for id in ids if id >= self.vocab_size or (not self._texts[id] and id not in self._bytes)]

    def _pieces(self, ids: list[int]) -> list[str]:
        """The text that each token completes."""
        pieces: list[str] = []
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i, id in enumerate(ids):
            if id < 0:
                raise IndexError(f"token id {id} is negative")
            byte = self._bytes.get(id)
            if byte is None:
                pieces.append(self._texts[id])
                continue
            run_ends = i + 1 == len(ids) or ids[i + 1] not in self._bytes
            pieces.append(decoder.decode(byte, final=run_ends))
            if run_ends:
                decoder.reset()
        if self._first_space and pieces and pieces[0].startswith(" "):
            pieces[0] = pieces[0][1:]
        return pieces


class SentencePieceTokenizer(Tokenizer):
    """Encoder and decoder over a sentencepiece model file.

    The model must have byte pieces for everything it has no other piece for, and must leave white space alone (no dummy
    prefix, no squeezing, identity normalisation); otherwise texts would not survive a round trip.

    ``added``: control symbols with ids that the model file has under another name or not at all.

    Raises:
        ValueError: the file is not a sentencepiece model, or not one with these properties.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: str | Path, added: Mapping[str, int] | None = None) -> None:
        super().__init__(path)
        refuse_lfs_pointer(path)
        data = read_input(self.path, MOST_JSON)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ValueError(f"{self.path} is not a sentencepiece model: {error}") from error
        self.vocab_size = self._model.vocab_size()
        for id in range(self.vocab_size):
            piece = self._model.id_to_piece(id)
            if self._model.is_control(id):
                self._controls[piece] = id
            silent = self._model.is_control(id) or self._model.is_unknown(id)
            self._texts.append("" if silent else piece.replace(SPACE_MARK, " "))
            if self._model.is_byte(id):
                self._bytes[id] = bytes([int(piece[3:-1], 16)])
        for piece, id in (added or {}).items():
            self.vocab_size = max(self.vocab_size, id + 1)
            self._texts += [""] * (self.vocab_size - len(self._texts))
            self._texts[id] = ""
            self._controls[piece] = id
        self._added = {id: self._spelling(id) for id in (added or {}).values()}
        self._byte_ids = {value[0]: id for id, value in self._bytes.items()}
        if len(self._byte_ids) != 256 or self.decode(self.encode("  a \n\n b ")) != "  a \n\n b ":
            raise ValueError(
                f"{self.path} cannot encode every text: it needs byte_fallback=true, add_dummy_prefix=false, "
                "remove_extra_whitespaces=false and normalization_rule_name=identity"
            )

    def encode(self, text: str) -> list[int]:
        """See :meth:`Tokenizer.encode`."""
        check_utf8(text)
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE_MARK)):
            if i:
                ids.extend(self._byte_ids[byte] for byte in SPACE_MARK.encode())
            for id in self._model.encode(part):
                # A text may spell the name that the model file has for a control symbol.
                ids.extend((self._byte_ids[byte] for byte in self._added[id]) if id in self._added else (id,))
        return ids

    def _spelling(self, id: int) -> bytes:
        return self._model.id_to_piece(id).encode() if id < self._model.vocab_size() else b""


class FastTokenizer(Tokenizer):
    """Encoder and decoder over a ``tokenizer.json`` with byte-level BPE (Llama-3) or BPE with byte pieces (Llama).

    The latter kind reads U+2581 in a text as a space. Every added token is a control symbol here, also one that the
    file does not call special (Llama's ``</s>``), and text around its spelling keeps its white space.

    Raises:
        ValueError: the file is not a tokenizer.json, or one of another kind.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        refuse_lfs_pointer(path)
        check_tokenizer_json(self.path)
        text = self.path.read_text(encoding="utf-8")
        try:
            content = _as_published(json.loads(text))
            with _no_panic("it"):
                self._model = tokenizers.Tokenizer.from_str(json.dumps(harmless(content)))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{self.path} is not a tokenizer.json: {error}") from error
        self._model.encode_special_tokens = True
        byte_level = "ByteLevel" in json.dumps([content.get("decoder"), content.get("pre_tokenizer")])
        if not byte_level and not content["model"].get("byte_fallback"):
            raise ValueError(
                f"{self.path} is neither a byte-level BPE nor a BPE with byte_fallback, so it cannot encode every text"
            )
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self._texts = [""] * self.vocab_size
        self._controls = {token.content: id for id, token in self._model.get_added_tokens_decoder().items()}
        byte_of = _byte_alphabet()
        for piece, id in vocabulary.items():
            if piece in self._controls:
                continue
            if byte_level:
                if not byte_of.keys() >= set(piece):
                    raise ValueError(f"{self.path}: {piece[:40]!r} is no piece of a byte-level vocabulary")
                self._bytes[id] = bytes(byte_of[character] for character in piece)
            elif len(piece) == 6 and piece.startswith("<0x"):
                self._bytes[id] = bytes([int(piece[3:-1], 16)])
            else:
                self._texts[id] = piece.replace(SPACE_MARK, " ")
        self._spellings = {id: piece.encode() for piece, id in self._controls.items()}
        self._byte_ids = {value[0]: id for id, value in self._bytes.items() if len(value) == 1}
        ids = self._library_ids("a")
        self._first_space = "".join(self._pieces(ids)) == " a"
        for sample in ("  a \n\n b ", "\u00e9\U0001f600", "a\u4f60"):
            if self.decode(self.encode(sample)) != sample:
                raise ValueError(
                    f"{self.path} does not give {sample!r} back after encoding it: it is no Llama tokenizer, or "
                    "another program saved it again; copy tokenizer.json from the original model"
                )

    def encode(self, text: str) -> list[int]:
        """See :meth:`Tokenizer.encode`."""
        check_utf8(text)
        ids: list[int] = []
        for id in self._library_ids(text):
            # Merges may build the spelling of a control symbol; it is then spelt in bytes.
            ids.extend((self._byte_ids[byte] for byte in self._spellings[id]) if id in self._spellings else (id,))
        return ids

    def _library_ids(self, text: str) -> list[int]:
        with _no_panic(self.path):
            ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids


@contextmanager
def _no_panic(where: object) -> Iterator[None]:
    """Where the library gives up on a file in a way that passes ``except Exception``, raise ValueError instead."""
    try:
        yield
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise ValueError(f"{where} fails in the library: {' '.join(str(error).split())[:200]}") from None


def _as_published(content: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json whose added tokens are all special, so that none is found in a text, and whose space in front of
    a text is put there as in the published Llama files.

    transformers 5 saves that space as a pre-tokenizer which leaves it out where a text begins with a space itself, and
    decodes without it all the same.
    """
    for token in content.get("added_tokens") or ():
        token.update(special=True, normalized=False, lstrip=False, rstrip=False, single_word=False)
    spaces = content.get("pre_tokenizer") or {}
    puts_in_front = spaces.get("prepend_scheme") in ("first", "always") and not spaces.get("split")
    if spaces.get("type") == "Metaspace" and puts_in_front and not content.get("normalizer"):
        mark = spaces.get("replacement", SPACE_MARK)
        content["normalizer"] = {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": mark},
                {"type": "Replace", "pattern": {"String": " "}, "content": mark},
            ],
        }
        content["pre_tokenizer"] = None
    return content


def check_utf8(text: str) -> None:
    """Raise ValueError where a text has a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"{error.reason} at character {error.start}"
        raise ValueError(f"the text cannot be encoded as UTF-8 ({where})") from error


def required_file(directory: Path, name: str) -> Path:
    """A file of a model directory. Raises FileNotFoundError naming it where it is missing."""
    path = directory / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy it from the original model")
    return path


def added_tokens(directory: Path) -> dict[str, int]:
    """Control symbols that a model directory names beside its sentencepiece model.

    Raises ValueError where neither ``tokenizer_config.json`` nor ``added_tokens.json`` names any.
    """
    found: dict[str, int] = {}
    if (directory / "tokenizer_config.json").exists():
        found.update(config_controls(directory / "tokenizer_config.json"))
    if (directory / "added_tokens.json").exists():
        found.update(added_controls(directory / "added_tokens.json"))
    if not found:
        raise ValueError(
            f"{directory}: neither tokenizer_config.json (added_tokens_decoder) nor added_tokens.json names the "
            "template's control symbols; copy both from the original model"
        )
    return found


def _byte_alphabet() -> dict[str, int]:
    """Character of a byte-level piece -> byte: printable ones stand for themselves, the others lie from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
