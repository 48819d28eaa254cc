"""A sentencepiece tokenizer whose encode and decode are exact inverses for any text."""

from __future__ import annotations

import codecs
from pathlib import Path

import sentencepiece

SPACE_MARK = "\u2581"
"""sentencepiece stores a space as this character; a text that holds the character itself goes through byte pieces."""


class SentencePieceTokenizer:
    """Encoder and decoder over a sentencepiece model file.

    The model must have byte pieces for everything it has no other piece for, and must leave white space alone (no dummy
    prefix, no squeezing, identity normalisation); otherwise texts would not survive a round trip.

    Raises:
        ValueError: the file is not a sentencepiece model, or not one with these properties.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        data = self.path.read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ValueError(f"{self.path} is not a sentencepiece model: {error}") from error
        self.vocab_size: int = self._model.vocab_size()
        """Number of ids; ids are 0 to ``vocab_size`` - 1."""
        self._ids: dict[str, int] = {}
        self._texts: list[str] = []
        self._bytes: dict[int, bytes] = {}
        for id in range(self.vocab_size):
            piece = self._model.id_to_piece(id)
            self._ids[piece] = id
            silent = self._model.is_control(id) or self._model.is_unknown(id)
            self._texts.append("" if silent else piece.replace(SPACE_MARK, " "))
            if self._model.is_byte(id):
                self._bytes[id] = bytes([int(piece[3:-1], 16)])
        self._byte_ids = {value[0]: id for id, value in self._bytes.items()}
        if len(self._byte_ids) != 256 or self.decode(self.encode("  a \n\n b ")) != "  a \n\n b ":
            raise ValueError(
                f"{self.path} cannot encode every text: it needs byte_fallback=true, add_dummy_prefix=false, "
                "remove_extra_whitespaces=false and normalization_rule_name=identity"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without begin or end marks; never a control symbol, even where ``text`` spells one.

        Raises:
            ValueError: ``text`` has a lone surrogate, which no UTF-8 text can hold.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"{error.reason} at character {error.start}"
            raise ValueError(f"the text cannot be encoded as UTF-8 ({where})") from error
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE_MARK)):
            if i:
                ids.extend(self._byte_ids[byte] for byte in SPACE_MARK.encode())
            ids.extend(self._model.encode(part))
        return ids

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
            ValueError: the model has no such control symbol.
        """
        id = self._ids.get(piece)
        if id is None or not self._model.is_control(id):
            raise ValueError(f"the tokenizer {self.path} has no control symbol {piece!r}")
        return id

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
        return pieces
