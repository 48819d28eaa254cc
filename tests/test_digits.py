"""The built-in task: disjoint handwriting, exact answers, right chains of thought, pictures that survive damage."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from mstar_mega.config import DataConfig
from mstar_mega.data.digits import make_tokenizer, task
from mstar_mega.data.digits.questions import BACKWARDS, KINDS, Problem, Way, draw_problem
from mstar_mega.data.digits.render import COLOURS, IMAGE_SIZE, VALUES, Handwriting, handwriting_split, render
from mstar_mega.data.tokenizer import SentencePieceTokenizer
from mstar_mega.data.types import Query, image_digest

SMALL = DataConfig(warmup_examples=12, labelled_queries=12, unlabelled_queries=4, validation_queries=6, test_queries=6)
TOKENIZER = SentencePieceTokenizer(make_tokenizer.MODEL_PATH)


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return [task.problem(3, "train", "train", i) for i in range(1500)]


def solve(problem: Problem) -> str:
    """The answer from the question's words and the recorded scene, by other code than the one that made it."""
    text, *lines = problem.question.split("\n")
    value = solve_text([digit.value for digit in problem.scene.digits], text)
    if not lines:
        return value
    (letter,) = [line[0] for line in lines if line[3:] == value]
    return letter


def having(values: list[int], word: str) -> list[int]:
    """The values that a word of a question means."""
    if word in ("even", "odd"):
        return [value for value in values if value % 2 == (word == "odd")]
    return [value for value in values if value > int(word.removeprefix("greater than "))]


def solve_text(values: list[int], text: str) -> str:
    if text == "What is the sum of the digits?":
        return str(sum(values))
    if text == "What is the largest digit minus the smallest?":
        return str(sorted(values)[-1] - sorted(values)[0])
    if found := re.fullmatch(r"Is the sum of the digits greater than (\d+)\?", text):
        return "yes" if sum(values) > int(found[1]) else "no"
    if found := re.fullmatch(r"What is the (largest|smallest) digit\?", text):
        return str(sorted(values)[-1 if found[1] == "largest" else 0])
    if found := re.fullmatch(r"How many digits are (.+)\?", text):
        return str(len(having(values, found[1])))
    if found := re.fullmatch(r"Are all digits (.+)\?", text):
        return "yes" if having(values, found[1]) == values else "no"
    found = re.fullmatch(r"Are more digits (even|odd) than (even|odd)\?", text)
    assert found and found[1] != found[2], text
    return "yes" if len(having(values, found[1])) > len(having(values, found[2])) else "no"


def test_handwriting_is_split_by_picture() -> None:
    from sklearn.datasets import load_digits

    split = handwriting_split()
    train, validation, test = (set(split[name]) for name in ("train", "validation", "test"))
    assert len(train) + len(validation) + len(test) == len(train | validation | test)
    labels = load_digits().target
    assert train | validation | test == {i for i, label in enumerate(labels) if label in VALUES}
    assert abs(len(test) - 0.2 * np.isin(labels, VALUES).sum()) < 20


def test_sets_draw_only_from_their_handwriting() -> None:
    split = handwriting_split()
    parts: tuple[Handwriting, ...] = ("train", "validation", "test")
    for part in parts:
        sources = {digit.source for i in range(200) for digit in task.problem(0, part, part, i).scene.digits}
        assert sources <= set(split[part])


def test_answers_are_right(problems: list[Problem]) -> None:
    assert {problem.kind.removesuffix(", choices") for problem in problems} == {kind.name for kind in KINDS}
    assert [problem.answer for problem in problems] == [solve(problem) for problem in problems]


def test_recorded_digits_are_those_of_the_set(problems: list[Problem]) -> None:
    from sklearn.datasets import load_digits

    labels = load_digits().target
    for problem in problems:
        assert [labels[digit.source] for digit in problem.scene.digits] == problem.scene.values


def test_right_chains_say_nothing_but_what_is_true(problems: list[Problem]) -> None:
    for problem in problems:
        chains = problem.right_chains()
        assert len(chains) in (8, 16, 32)
        for chain in chains:
            *steps, marker, answer = chain.split("\n\n")
            assert (marker, answer) == ("# Answer", problem.answer) and 2 <= len(steps) <= 8
            reading, _, read = steps[0].partition(": ")
            seen = problem.scene.values[::-1] if reading == BACKWARDS else problem.scene.values
            assert [int(value) for value in read.split(", ")] == seen
            for left, right in re.findall(r"^([\d+a-z -]+) (?:=|make) (\d+)$", "\n".join(steps), re.MULTILINE):
                first, *others = re.split(r" (?=[-+a])", left)
                terms = [int(first), *(int(o.split()[1]) * (-1 if o[0] == "-" else 1) for o in others)]
                assert sum(terms) == int(right)
            if problem.choices:
                found = re.fullmatch(r"(\d+) is ([A-C])", steps[-1])
                assert found and found[2] == answer and f"\n{answer}. {found[1]}" in problem.question


def test_the_warmups_writer_is_hasty_and_kept_by_his_answers_alone(problems: list[Problem]) -> None:
    asked = [task.problem(3, "warmup", "train", i) for i in range(3000)]
    assert all(problem.chain_of_thought.endswith(f"# Answer\n\n{problem.answer}") for problem in asked)
    reading = [problem for problem in asked if problem.kind == "reading"]
    assert 0.25 < len(reading) / len(asked) < 0.35
    assert all(problem.chain_of_thought in problem.right_chains() for problem in reading)
    others = [problem for problem in asked if problem.kind != "reading"]
    right = sum(problem.chain_of_thought in problem.right_chains() for problem in others) / len(others)
    assert 0.25 < right < 0.4, "two thirds of what the warm-up learns reach their answer by luck"
    assert all(problem.kind != "reading" for problem in problems), "only the warm-up learns to read by itself"


def test_an_overlooked_digit_can_still_lead_to_the_answer(problems: list[Problem]) -> None:
    hasty = [problem.chain(Way(overlooks=True)) for problem in problems]
    lucky = sum(c.endswith(f"# Answer\n\n{p.answer}") for c, p in zip(hasty, problems, strict=True)) / len(problems)
    assert 0.4 < lucky < 0.6
    assert not any(chain in problem.right_chains() for chain, problem in zip(hasty, problems, strict=True))


def test_the_task_tells_right_reasoning_from_a_lucky_answer(tmp_path: Path) -> None:
    made = task.build(SMALL, tmp_path, 0)
    assert made.check_reasoning is not None
    for i, query in enumerate(made.test):
        problem = task.problem(0, "test", "test", i)
        chain = sorted(problem.right_chains())[0]
        assert made.check_reasoning(query.id, chain + "\n") is True
        assert made.check_reasoning(query.id, problem.chain(Way(overlooks=True))) is False
        assert made.check_reasoning(query.id, f"# Answer\n\n{problem.answer}") is False
    assert pickle.loads(pickle.dumps(made.check_reasoning)) == made.check_reasoning


def test_choices_differ_and_every_letter_is_used(problems: list[Problem]) -> None:
    chosen = [problem for problem in problems if problem.choices]
    assert all(len(set(problem.choices)) == len(problem.choices) == 3 for problem in chosen)
    assert min(Counter(problem.answer for problem in chosen).values()) > len(chosen) / 5


def test_digits_lie_inside_the_picture_apart_and_in_reading_order(problems: list[Problem]) -> None:
    for problem in problems:
        digits = problem.scene.digits
        for digit in digits:
            assert 0 <= digit.x <= IMAGE_SIZE - digit.size and 0 <= digit.y <= IMAGE_SIZE - digit.size
        for a, b in zip(digits, digits[1:], strict=False):
            row_a, row_b = a.y + a.size / 2, b.y + b.size / 2
            assert row_b > row_a + 8 or (abs(row_a - row_b) < 8 and b.x + b.size / 2 > a.x + a.size / 2)
            if problem.scene.layout in ("row", "column"):
                assert (abs(row_a - row_b) < 8) == (problem.scene.layout == "row")
        boxes = [set((x, y) for x in range(d.x, d.x + d.size) for y in range(d.y, d.y + d.size)) for d in digits]
        assert sum(len(a & b) for i, a in enumerate(boxes) for b in boxes[:i]) < 40 * len(digits)


def test_rendered_colours_and_places() -> None:
    rng = random.Random(5)
    for _ in range(50):
        scene = draw_problem(rng, "test").scene
        pixels = np.asarray(Image.open(io.BytesIO(render(scene))))
        assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and pixels.dtype == np.uint8
        outside = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
        for digit in scene.digits:
            box = pixels[digit.y : digit.y + digit.size, digit.x : digit.x + digit.size].astype(int)
            outside[digit.y : digit.y + digit.size, digit.x : digit.x + digit.size] = False
            assert np.abs(box - COLOURS[digit.colour]).sum(-1).min() < 130
        assert (pixels[outside] == scene.background).all()


def test_problems_depend_on_seed_set_and_index_only(tmp_path: Path) -> None:
    small = task.build(SMALL, tmp_path / "a", 0)
    large = task.build(DataConfig(warmup_examples=13, labelled_queries=20, test_queries=7), tmp_path / "b", 0)
    other = task.build(SMALL, tmp_path / "c", 1)

    def content(queries: Sequence[Query]) -> list[tuple]:
        return [(q.id, q.question, q.answer, q.images[0].digest) for q in queries]

    assert content(small.labelled) == content(large.labelled)[:12]
    assert content(small.test) == content(large.test)[:6]
    assert content([q for q, _ in small.warmup]) == content([q for q, _ in large.warmup])[:12]
    assert not set(content(small.labelled)) & set(content(other.labelled))


def test_sets_have_the_asked_sizes_and_hide_answers(tmp_path: Path) -> None:
    made = task.build(SMALL, tmp_path, 0)
    assert [len(made.warmup), len(made.labelled), len(made.unlabelled)] == [12, 12, 4]
    assert [len(made.validation), len(made.test)] == [6, 6]
    assert made.labelled[3].id == "digits-train-000003"
    assert all(q.answer is None and q.hidden_answer for q in made.unlabelled)
    assert all(q.answer and q.hidden_answer is None for q in [*made.labelled, *made.validation, *made.test])
    assert all(chain.endswith(f"# Answer\n\n{q.answer}") for q, chain in made.warmup)
    ids = [q.id for q in [*(q for q, _ in made.warmup), *made.labelled, *made.unlabelled, *made.test]]
    assert len(set(ids)) == len(ids)
    for query in made.labelled:
        assert image_digest(Path(query.images[0].path).read_bytes()) == query.images[0].digest


def test_build_rewrites_only_what_is_missing_or_damaged(tmp_path: Path) -> None:
    made = task.build(SMALL, tmp_path, 0)
    paths = [Path(query.images[0].path) for query in made.labelled]
    whole = [path.read_bytes() for path in paths]
    paths[0].unlink()
    paths[1].write_bytes(whole[1][:50])
    paths[2].write_bytes(whole[3])
    before = [path.stat().st_mtime_ns for path in paths[3:]]
    assert task.build(SMALL, tmp_path, 0) == made
    assert [path.read_bytes() for path in paths] == whole
    assert [path.stat().st_mtime_ns for path in paths[3:]] == before
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"settings": 3, "images": []}'])
def test_a_damaged_manifest_is_made_again(tmp_path: Path, text: str) -> None:
    made = task.build(SMALL, tmp_path, 0)
    good = (tmp_path / task.MANIFEST).read_bytes()
    (tmp_path / task.MANIFEST).write_text(text)
    assert task.build(SMALL, tmp_path, 0) == made
    assert (tmp_path / task.MANIFEST).read_bytes() == good


def test_another_seed_in_the_same_place_replaces_the_pictures(tmp_path: Path) -> None:
    task.build(SMALL, tmp_path, 0)
    second = task.build(SMALL, tmp_path, 1)
    assert all(image_digest(Path(q.images[0].path).read_bytes()) == q.images[0].digest for q in second.test)
    assert json.loads((tmp_path / task.MANIFEST).read_text())["settings"]["seed"] == 1


def test_a_negative_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="-1 test"):
        task.build(DataConfig(test_queries=-1), tmp_path, 0)


HOSTILE = [
    "", " ", "  two  spaces ", "\n", "\n\n", "\n\n\n\n\n", " \n\n ", "\t\r\n", "a\u2581b \u2581 \u2581\u2581", "\0",
    "é ü ß", "☃ 数学 🤖", "\ufeff\u200b\u00a0\u3000", "e\u0301", "<s></s><unk><pad>", "<|im_end|>",
    "<IMG_CONTEXT><img></img>", "<0x41><0x0A>", "# Answer", "#Answer", "\n\n# Answer\n\n12", "1234567890", "ﬁ Ⅳ ²",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_tokenizer_round_trip(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    control = {TOKENIZER.id(piece) for piece in (*make_tokenizer.CONTROL_SYMBOLS, "<s>", "</s>", "<pad>")} | {0}
    assert not control & set(ids)


def test_tokenizer_round_trip_of_random_text() -> None:
    rng = random.Random(0)
    alphabet = [" ", "\n", "\n\n", "\u2581", "# Answer", "red", " red ", "7", "é", "🤖", "<|im_end|>", "\0", "A. ", "z"]
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 20)))
        ids = TOKENIZER.encode(text)
        offsets = TOKENIZER.offsets(ids)
        assert TOKENIZER.decode(ids) == text
        assert len(offsets) == len(ids) and (offsets[-1] if ids else 0) == len(text)


def test_offsets_cut_the_text_at_token_borders() -> None:
    text = "Left to right: 3, 5\n\n3 + 5 = 8\n\n# Answer\n\n8"
    ids = TOKENIZER.encode(text)
    offsets = TOKENIZER.offsets(ids)
    for i, offset in enumerate(offsets):
        assert TOKENIZER.decode(ids[: i + 1]) == text[:offset]


def test_decode_and_offsets_of_broken_bytes_and_control_symbols() -> None:
    robot = TOKENIZER.encode("🤖")
    assert len(robot) == 4 and TOKENIZER.offsets(robot) == [0, 0, 0, 1]
    end = TOKENIZER.id("<|im_end|>")
    ids = [end, *robot[:2], *TOKENIZER.encode("7"), robot[3], end]
    text = TOKENIZER.decode(ids)
    assert text == "\ufffd7\ufffd"
    assert TOKENIZER.offsets(ids) == [0, 0, 1, 2, 3, 3]
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(TOKENIZER.vocab_size) for _ in range(12)]
        assert TOKENIZER.offsets(ids)[-1] == len(TOKENIZER.decode(ids))
    with pytest.raises(IndexError):
        TOKENIZER.decode([TOKENIZER.vocab_size])
    with pytest.raises(IndexError):
        TOKENIZER.decode([-1])


def test_the_format_is_single_tokens_and_responses_are_short(problems: list[Problem]) -> None:
    for text in ("\n\n", "# Answer", *"0123456789"):
        assert len(TOKENIZER.encode(text)) == 1
    assert len(TOKENIZER.encode("8421")) == 4
    lengths = [len(TOKENIZER.encode(problem.chain_of_thought)) for problem in problems]
    assert sum(lengths) / len(lengths) < 30 and max(lengths) <= 56


def test_missing_control_symbol_names_the_file() -> None:
    with pytest.raises(ValueError, match="tokenizer.model.*<nothing>"):
        TOKENIZER.id("<nothing>")
    with pytest.raises(ValueError, match="red"):
        TOKENIZER.id("red")


def test_lone_surrogates_and_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="character 1"):
        TOKENIZER.encode("a\ud800")
    with pytest.raises(FileNotFoundError):
        SentencePieceTokenizer(tmp_path / "none.model")
    wrong = tmp_path / "wrong.model"
    wrong.write_bytes(b"not a model")
    with pytest.raises(ValueError, match="wrong.model"):
        SentencePieceTokenizer(wrong)


def test_the_shipped_tokenizer_is_what_its_script_makes() -> None:
    made = sentencepiece.SentencePieceProcessor(model_proto=make_tokenizer.train())
    shipped = sentencepiece.SentencePieceProcessor(model_file=str(make_tokenizer.MODEL_PATH))
    assert [made.id_to_piece(i) for i in range(len(made))] == [shipped.id_to_piece(i) for i in range(len(shipped))]
