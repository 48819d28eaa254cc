"""Reading prose: what a text states as its answer, whether it declines to answer, which numbers stand in it.

Rules only, linear in the length of the text (every repetition in a pattern is bounded or cannot overlap itself).
"""

from __future__ import annotations

import re

NO_ANSWER = "N/A"
"""What a reader writes down for a response that declines to answer."""

_CONTINUED = re.compile(r"(?:^|\n)[ \t]*(?:Question|Hint|Human|User|Instruction)[ \t]*:", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed ?\{((?:[^{}]|\{[^{}]{0,200}\}){0,500})\}")
_ENGLISH = (
    r"\b(?:answer|solution|result|final (?:value|list|integer|number)|(?:correct )?(?:option|choice)(?: letter)?)\b"
    r"[^.\n:]{0,60}?(?:\bis\b|\bare\b|\bbe\b|:|=)[ \t]*(?:\n+(?=\S))?([^\n]{1,300})"
)
_STATED = re.compile(
    rf"{_ENGLISH}|(?:答案|结果|选项)(?:应该|应)?(?:是|为|选|:){{1,2}}[ \t]*([^\n,。;]{{1,100}})"
    r"|(?<!不)选(?:择|项)? ?(?=\(?[A-Z])([^\n,。;]{1,100})",
    re.IGNORECASE,
)
_STATED_IN_ENGLISH = re.compile(_ENGLISH, re.IGNORECASE)
_WRONG = re.compile(r"\W*(?:not|incorrect|wrong)\b", re.IGNORECASE)
_CORRECTS = re.compile(r"\b(?:wait|actually|correction|sorry|mistake|mistaken)\b", re.IGNORECASE)
_BUT = re.compile(r"not\b[^.\n]{0,80}?(?:\bbut\b|[;,] ?(?:it is|it's|rather|instead)) ?", re.IGNORECASE)
_DECLINED = re.compile(
    r"\bnot (?:possible|able)|\bcannot|\bcan't|\bcan not|\bunable|\bimpossible|\binsufficient"
    r"|(?:\bnot|n't) (?:\w{1,30} ){0,4}(?:enough|sufficient|any)\b|\bnot clear\b|n't clear\b"
    r"|(?:\bnot|n't) (?:provide|show|contain|specify|give|include)\b|\bno (?:information|data|context)\b"
    r"|\bwithout (?:\w{1,30} ){0,5}(?:information|context|details|data|image)|\bplease provide"
    r"|\bneed (?:\w{1,30} ){0,3}more |\bundefined|\bnone of the|\bno (?:\w{1,30} )?(?:correct )?(?:answer|option)"
    r"|(?:\bnot|n't) (?:know|sure)\b|无法(?:确定|判断|得出|回答)|不能确定|信息不足",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])[-+\u2212]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3})?(?![0-9])"
    r"|(?<![\w.])[-+]?\.[0-9]+"
)
_UNIT_OR_POWER = re.compile(r"\^\{?-?[0-9]+\}?|\\mathrm\s{0,9}\{[^{}]{0,40}\}")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def first_turn(text: str) -> str:
    """The part of a text that answers, where the policy went on to ask itself further questions, or began by
    repeating the prompt."""
    turns = [turn.strip() for turn in _CONTINUED.split(text)]
    if len(turns) == 1:
        return turns[0]
    for turn in turns:
        if _STATED_IN_ENGLISH.search(turn):
            return turn
    return next((turn for turn in turns if turn), "")


def statements(text: str) -> list[str]:
    """What the text says its answer is, the last statement first; a boxed answer before all.

    Of "not 12 but 15" it is 15; what only denies ("not (A)", "cannot be ...") states nothing.
    """
    boxed = _BOXED.findall(text) if "\\boxed" in text else []
    stated: list[str] = []
    position = 0
    pattern = _STATED_IN_ENGLISH if text.isascii() else _STATED
    while match := pattern.search(text, position):
        place = next(place for place in (1, 2, 3) if match[place]) if pattern is _STATED else 1
        said = match[place].strip()
        if not declines(match[0][: -len(match[place])]):
            stated.append(said if not _WRONG.match(said) else _BUT.sub("", said) if _BUT.match(said) else "")
        position = match.start(place) if len(said) > 20 and _CORRECTS.search(said) else match.end()
    return [each for each in (*boxed[-1:], *reversed(stated)) if each]


def declines(text: str) -> bool:
    """Whether the text says that it cannot answer."""
    return bool(_DECLINED.search(text))


def sentences(text: str) -> list[str]:
    """Sentences and lines."""
    return [part for line in text.split("\n") for part in _SENTENCE_END.split(line) if part.strip()]


def numbers(text: str) -> list[str]:
    """All numbers of a text as Python reads them; exponents and units of LaTeX are no numbers of their own."""
    plain = _UNIT_OR_POWER.sub(" ", text)
    return [match[0].replace(",", "").replace("\u2212", "-").lstrip("+") for match in _NUMBER.finditer(plain)]
