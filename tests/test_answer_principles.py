"""docs/answers.md holds, and so do cases from public reports and others of their kinds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mstar_mega.rewards.answers import extract_answer
from mstar_mega.rewards.checker import AnswerChecker
from mstar_mega.rewards.choices import resolve_choice
from mstar_mega.rewards.extraction import find_answer

PAGE = Path(__file__).parents[1] / "docs/answers.md"
REPORTED = Path(__file__).parents[2] / "shared/cases/answers.json"
CHOICES = ("7", "12", "5 cm", "\\sqrt{3}")


@pytest.fixture(scope="module")
def checker() -> Iterator[AnswerChecker]:
    with AnswerChecker() as instance:
        yield instance


def rows() -> list[tuple[str, str, bool, tuple[str, ...]]]:
    """The examples of the page's two tables."""
    plain, lettered = PAGE.read_text(encoding="utf-8").split("The choices are ")
    found: list[tuple[str, str, bool, tuple[str, ...]]] = []
    for part, choices in ((plain, ()), (lettered, CHOICES)):
        for answer, gold, right in re.findall(r"^\| `(.+?)` \| `(.+?)` \| (yes|no) \|$", part, re.MULTILINE):
            found.append((answer.replace("\\|", "|"), gold, right == "yes", choices))
    return found


def test_examples_of_the_page(checker: AnswerChecker) -> None:
    examples = rows()
    assert len(examples) == PAGE.read_text(encoding="utf-8").count("| yes |") + PAGE.read_text().count("| no |") > 40
    for answer, gold, right, choices in examples:
        assert checker.check(answer, gold, choices).correct is right, (answer, gold)


RIGHT = {
    "42": ["\\mathbf{42}", "$$42$$", "`42`", "42.", "42</s>", "42<|eot_id|>", "Hence, the answer is 42.", "x_2=42",
           "forty-two", "四十二", "答案：42", "* 42", "\\textcolor{blue}{42}", "\\mbox{42}", "４２", "42.0", "f(2)=42",
           "\\theta = 42", "Therefore the result is 42", "about 42", "42 is the answer", "6 * 7 = 42", "42 = x"],
    "9 m": ["9", "9 metres", "9 m.", "\\text{9 m}", "9\\,\\mathrm{m}", "9 meters"],
    "60°": ["60", "60 degrees", "60^\\circ", "60^{\\circ}", "∠DEF = 60°", "60\\degree", "60º"],
    "£20": ["20", "20 pounds", "GBP 20", "20 quid", "\\pounds 20"],
    "75%": ["75 percent", "75 per cent", "75\\%", "0.75", "75", "3/4"],
    "1/6": ["\\cfrac{1}{6}", "⅙", "0.1\\overline{6}", "0.1666...", "\\frac16", "\\left( \\frac{1}{6} \\right)"],
    "9.8 m/s^2": ["9.8 m/s²", "9.8 m s^{-2}", "9.8", "9.8 meters per second squared", "9.8\\text{ m/s}^2"],
    "12 cm^2": ["12 sq. cm", "12 square centimeters", "12 cm²", "12 cm2", "12平方厘米", "12"],
    "2500": ["2,500", "2 500", "2'500", "2.5×10³", "2.5e3", "$2{,}500$"],
    "±4": ["\\pm 4", "4, -4", "-4 or 4", "x = ±4", "\\{4, -4\\}"],
    "9:05 AM": ["9:05 a.m.", "9:05am", "09:05 AM"],
    "(1, -2)": ["(1,-2)", "1, -2", "(1;-2)", "x=1, y=-2", "（1，-2）"],
    "H2O": ["H_2O", "H₂O", "$\\mathrm{H_2O}$", "h2o"],
    "5/2": ["two and a half", "2 and 1/2", "five halves", "{5 \\over 2}", "\\frac{5}2", "[5/2]", "2½", "5/2 (2.5)"],
    "3000000": ["3 million", "3,\\!000,\\!000", "三百万", "300万", "3e6"],
    "7": ["7 books", "There are 7 red balls", "We get 7", "is 7", "7 in total", "∴ 7", "\\Rightarrow 7", "7个",
          "seven (7)", "{\\color{red}7}", "\\Large{7}", "7\\\\", "x: 7", "Side = 7", "\\overline{AB} = 7",
          "S_{\\triangle ABC}=7", "7 N\\cdot m", "7\\,\\frac{m}{s}", "7 kgs", "\\begin{equation}7\\end{equation}",
          "7 (approximately)", "7[/INST]", "\\colorbox{yellow}{7}", "This gives 7", "<answer>7", "7</answer>", "Ans. 7",
          "\u202a7\u202c", "A = 7 A", "7 beats per minute", "7 people per square mile", "7 amps", "7 gm", "7\\mu m",
          "CA$7", "US $7", "三角形ABC的面积是7"],
    "7 books": ["7", "seven books", "7 old books", "Books: 7"],
    "30°C": ["30 degrees Celsius", "30 degrees C", "30^{\\circ}\\text{C}", "30℃", "30°"],
    "-7/4": ["minus one and three quarters", "-1¾"],
    "10^{-12}": ["\\frac{1}{10^{12}}", "1e-12", "1 X 10^{-12}", "1\\cdot{10}^{-12}"],
    "\\frac{1}{4!}": ["1/24"],
    "2^{10}": ["1024", "2^{5}\\cdot 2^{5}"],
    "y=2x+1": ["2x+1", "2x - y + 1 = 0", "y - 2x = 1"],
    "triangle": ["a triangle", "the triangle", "It is a triangle.", "The shape is a triangle"],
    "(2, 3)": ["P(2, 3)", "point (2, 3)", "The point is (2, 3)"],
    "half": ["50%", "百分之五十"],
    "100000": ["a hundred thousand", "１００，０００"],
    "\\sqrt{5}": ["√5 (≈2.24)", "\\frac{5}{\\sqrt{5}}"],
    "3\\sqrt{2}": ["3√2", "\\sqrt{18}", "3 \\sqrt 2 \\text{ cm}"],
}  # fmt: skip
WRONG = {
    "42": ["-42", "43", "not 42", "The answer is not 42", "41 or 42", "42 or 43", "0=42", "41=42", "x+1=42", "x > 42",
           "42_5", "42, 43", "4 2", "6*7", "42 million", "42!", "42x", "≠42", "if x = 42", "not x = 42", "42nd"],
    "9 m": ["9 s", "9%", "9°", "9 cm", "9 m^2", "$9", "900 cm", "9 mm"],
    "60°": ["60 rad", "60 cm", "60%", "60 kg", "$60"],
    "£20": ["$20", "€20", "20 euros", "20 kg", "20%", "20 pence", "¥20"],
    "75%": ["75 cm", "75°", "$75", "0.0075", "7500%"],
    "1/6": ["0.1666", "0.17", "1.6", "≈0.167"],
    "9.8 m/s^2": ["9.8 m/s", "9.8 km/s^2", "9.8 m^2/s"],
    "12 cm^2": ["12 cm", "12 cm^3", "12 m^2", "12%"],
    "2500": ["2, 500", "25 00", "2.5", "2,5,00"],
    "±4": ["4", "-4", "4, 4", "4, -5", "±5"],
    "9:05 AM": ["9:05 PM", "9:05", "9:50 AM", "21:05"],
    "(1, -2)": ["(-2, 1)", "(1, 2)", "1 - 2", "-1", "y=1, x=-2"],
    "3\\sqrt{2}": ["2\\sqrt{3}", "1=3\\sqrt{2}", "\\sqrt{3}=3\\sqrt{2}", "3"],
    "\\frac{1}{3^{70}}": ["\\frac{1}{3^{71}}", "0", "\\frac{2}{3^{70}}"],
    "101_2": ["101_3", "101", "5"],
    "5/2": ["one half", "5", "half", "2 and 5", "fifth"],
    "3000000": ["3 thousand", "3", "3, 000, 000"],
    "7": ["7 or 8", "There are 7 or 8", "7 (8)", "seven (eight)", "7 dozens", "7 tens", "7 plus 2", "7不", "7分之2",
          "7 thousand"],
    "7 books": ["7 pens", "7 kg", "7%", "$7", "8 books"],
    "H2O": ["HO2", "2HO"],
    "x+1": ["x=x+1", "0=x+1", "x"],
    "8 AM": ["8", "8 PM", "20:00"],
    "\\sqrt{2}": ["1.4142135624", "\\sqrt{2}+10^{-15}", "\\sqrt{2}+10^{-20}", "1.41421356237309504880"],
    "(\\sqrt{2}, 1)": ["(1.4142135624, 1)", "(1, \\sqrt{2})"],
    "2^{10}": ["1023", "1024.0000001", "2^{11}"],
    "10-20": ["-10"],
    "y=2x+1": ["y=2x-1", "2x-y=1", "1=1", "y=y"],
    "triangle": ["not a triangle", "a square", "triangular"],
    "5 mW": ["5 MW", "5 W"],
}  # fmt: skip


@pytest.mark.parametrize("gold", RIGHT)
def test_right_answers_of_each_kind(checker: AnswerChecker, gold: str) -> None:
    assert [answer for answer in RIGHT[gold] if not checker.check(answer, gold).correct] == []


@pytest.mark.parametrize("gold", WRONG)
def test_wrong_answers_of_each_kind(checker: AnswerChecker, gold: str) -> None:
    assert [answer for answer in WRONG[gold] if checker.check(answer, gold).correct] == []


SIGNS = ("3", "-3", "the cat", "5 cm")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B. -3", "B"), ("(B) −3", "B"), ("B: -3", "B"), ("B - -3", "B"), ("B -3", "B"), ("A - 3", "A"), ("A-3", "A"),
        ("A. -3", None), ("B. 3", None), ("(B) 3", None), ("-3", "B"), ("3 (A)", "A"), ("3 (option A)", "A"),
        ("-3, option B", "B"), ("3 (B)", None), ("-3 (A)", None), ("A cat", "C"), ("cat", "C"), ("D (5 cm)", "D"),
        ("The answer is -3 (B)", "B"), ("D 选项", "D"),
    ],
)  # fmt: skip
def test_letters_and_texts_agree(answer: str, letter: str | None) -> None:
    assert resolve_choice(answer, SIGNS) == letter


ANIMALS = {"A": "horse", "B": "goat", "C": "sheep", "D": "cow"}
LENGTHS = {"A": "4", "B": "-4", "C": "not enough information"}
POLAR = {"A": "Yes", "B": "No"}


@pytest.mark.parametrize(
    ("response", "options", "answer"),
    [
        ("The answer is (B). Option (D) is incorrect because cows are larger.", ANIMALS, "B"),
        ("**C**\n\nOption (D) is incorrect.", ANIMALS, "C"),
        ("C. The horse is taller.", ANIMALS, "C"),
        ("C) cow", ANIMALS, "D"),
        ("So A.", ANIMALS, "A"),
        ("I choose option A because it gallops.", ANIMALS, "A"),
        ("B or C", ANIMALS, "N/A"),
        ("(B) or (C)", ANIMALS, "N/A"),
        ("The answer is either (B) or (C).", ANIMALS, "N/A"),
        ("C because A is a horse.", ANIMALS, "C"),
        ("**B. goat**\n\nOption (D) is incorrect because cows are larger.", ANIMALS, "B"),
        ("**(B)** Option (D) is wrong.", ANIMALS, "B"),
        ("This is a goat rather than a sheep.", ANIMALS, "B"),
        ("A: no\nB: no\nC: yes\nD: no", ANIMALS, "C"),
        ("A is not the correct option. The degree of ∠B is 100°.", ANIMALS, "N/A"),
        ("不选A，选B", ANIMALS, "B"),
        ("答案不是A，是C", ANIMALS, "C"),
        ("排除A，B，C，选D", ANIMALS, "D"),
        ("选项A正确", ANIMALS, "A"),
        ("2 - 6 = -4", LENGTHS, "B"),
        ("Of course not.", POLAR, "B"),
        ("Certainly.", POLAR, "A"),
        ("Yes or no", POLAR, "N/A"),
        ("I don't know.", POLAR, "N/A"),
        ("It is not a sheep, it is a cow.", ANIMALS, "D"),
        ("因此答案选C。", ANIMALS, "C"),
        ("（Ｄ）", ANIMALS, "D"),
        ("Hence it is -4.", LENGTHS, "B"),
        ("There is not enough information.", LENGTHS, "C"),
        ("Hello there", POLAR, "N/A"),
        ("No question, yes.", POLAR, "A"),
        ("不对", POLAR, "B"),
        ("Yes, it is.", POLAR, "A"),
        ("That is false.", POLAR, "B"),
        ("Can you repeat that?", POLAR, "N/A"),
        ("答案是否", POLAR, "B"),
        ("当然", POLAR, "A"),
        ("没错", POLAR, "A"),
        ("是否？", POLAR, "N/A"),
        ("根据图中信息无法确定。", {"A": "3", "B": "4", "C": "无法确定"}, "C"),
        ("无法确定。", ANIMALS, "N/A"),
        ("Option (B) is correct. Option (A) is incorrect.", ANIMALS, "B"),
        ("(D) is the correct answer. (A), (B) and (C) are not.", ANIMALS, "D"),
        ("(A) is incorrect. (B) is incorrect. (C) is right. (D) is incorrect.", ANIMALS, "C"),
        ("None of the options A, B, C, D is correct.", ANIMALS, "N/A"),
        ("The correct option is **A**. The others are wrong: B is a goat, C is a sheep.", ANIMALS, "A"),
        ("I would choose (B) over (A) because of its horns.", ANIMALS, "B"),
        ("[B] The horse is taller.", ANIMALS, "B"),
        ("B – the horse is taller", ANIMALS, "B"),
        ("A - goat, not horse", ANIMALS, "B"),
        ("<think>Perhaps the answer is A?</think>\nB", ANIMALS, "B"),
        ("between -5 and -3 lies -4", LENGTHS, "B"),
        ("It is -4, not 4.", LENGTHS, "B"),
    ],
)
def test_options_in_prose(response: str, options: dict[str, str], answer: str) -> None:
    assert find_answer(response, "text", options) == answer


@pytest.mark.parametrize(
    ("response", "kind", "answer"),
    [
        ("The answer is $\\frac{5}{8}$.", "float", "0.625"),
        ("The answer is 1 3/4.", "float", "1.75"),
        ("The answer is 12{,}500.", "integer", "12500"),
        ("The answer is minus twelve.", "integer", "-12"),
        ("The answer is not 3 but 4.", "integer", "4"),
        ("The answer is 9. Sorry, that was a mistake. The answer is 8.", "integer", "8"),
        ("There are no cats.", "integer", "0"),
        ("two hundred", "integer", "200"),
        ("minus 5", "integer", "-5"),
        ("5/8", "float", "0.625"),
        ("The answer is 1¾.", "float", "1.75"),
        ("two and a half", "float", "2.5"),
        ("7 of 10", "integer", "7"),
        ("十二", "integer", "12"),
        ("答案是２５。", "integer", "25"),
        ("between -3 and 7", "list", "[-3, 7]"),
        ("No cats are left.", "integer", "0"),
        ("8 cats out of 12", "integer", "8"),
        ("The answer is $1.6\\times10^{-19}$ C", "float", "1.6e-19"),
        ("The answer is $1{,}234.5$", "float", "1234.5"),
        ("The answer is minus 0.5", "float", "-0.5"),
        ("The answer is 7.50 dollars", "float", "7.50"),
    ],
)
def test_values_in_prose(response: str, kind: Any, answer: str) -> None:
    assert find_answer(response, kind) == answer


@pytest.mark.skipif(not REPORTED.exists(), reason="the cases from public reports are not beside the project")
def test_cases_from_public_reports(checker: AnswerChecker) -> None:
    failed = []
    for case in json.loads(REPORTED.read_bytes()):
        given = case["input"]
        if case["kind"].startswith("reward"):
            answer = given["answer"] if "answer" in given else extract_answer(given["response"])
            found = "accepted" if checker.check(answer, given["gold"], given.get("choices", ())).correct else "rejected"
        elif case["kind"].startswith("prose"):
            found = find_answer(given["response"], given.get("type", "text"), given.get("options"))
        else:
            continue  # of files, not of answers
        if found != case["expected"]:
            failed.append((case["id"], given, found))
    assert not failed
