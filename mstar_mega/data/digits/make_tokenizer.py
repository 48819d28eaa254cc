"""Train the tokenizer that the built-in task ships: ``python -m mstar_mega.data.digits.make_tokenizer``.

The task's words and phrases are single pieces, so that responses are short; other texts are spelt with the printable
ASCII characters, and everything else falls back to bytes. Nothing is learnt from texts: the pieces are these lists.
"""

from __future__ import annotations

import argparse
import io
import string
from pathlib import Path

import sentencepiece

from mstar_mega.data.digits.questions import BACKWARDS, CLOSING, READINGS, WORDINGS
from mstar_mega.data.tokenizer import SPACE_MARK

MODEL_PATH = Path(__file__).with_name("tokenizer.model")
VOCAB_SIZE = 512
"""An upper bound: there are only as many pieces as are named here, and the bytes."""
CONTROL_SYMBOLS = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
FORMAT_PIECES = ("\n\n", "\n", "# Answer", "user", "assistant", "system", "A. ", "B. ", "C. ", ", ", ": ")
READING_PIECES = tuple(f"{reading}: " for reading in dict.fromkeys([*READINGS.values(), BACKWARDS]))
ARITHMETIC_PIECES = (
    *(sign for signs in WORDINGS for sign in signs), " - ", " > ", " is ", CLOSING, "count ", "none", "not ", "yes",
    "no",
)  # fmt: skip
QUESTION_PIECES = (
    "What is the", "Is the", "How many", "Are all", "Are more", "Which", " there", " sum of the", " digits", " digit",
    " are", " minus the", " than",
)  # fmt: skip
NAMES = ("largest", "smallest", "even", "odd", "greater than")
NAME_PIECES = tuple(form.format(name) for name in NAMES for form in ("{}", " {}", "{} "))
"""A name at the start of a step, inside a question, and before a number."""
COMPARISON_PIECES = (" greater than ",)
PIECES = (
    *FORMAT_PIECES, *READING_PIECES, *ARITHMETIC_PIECES, *QUESTION_PIECES, *NAME_PIECES, *COMPARISON_PIECES,
)  # fmt: skip
CHARACTERS = string.ascii_letters + string.digits + string.punctuation


def train() -> bytes:
    """The serialized sentencepiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CHARACTERS]),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        required_chars=SPACE_MARK + CHARACTERS,
        split_digits=True,
        control_symbols=list(CONTROL_SYMBOLS),
        user_defined_symbols=[piece.replace(" ", SPACE_MARK) for piece in PIECES],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the built-in task's tokenizer.")
    parser.add_argument("--out", type=Path, default=MODEL_PATH, help="where the model is written")
    out: Path = parser.parse_args().out
    out.write_bytes(train())
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
