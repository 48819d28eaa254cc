"""Find the option that a response in free text chooses."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from mstar_mega.rewards.choices import resolve_choice
from mstar_mega.rewards.dressing import normalize
from mstar_mega.rewards.polarity import by_polarity, says_yes_or_no, yes_and_no
from mstar_mega.rewards.prose import NO_ANSWER, declines, numbers, sentences, statements
from mstar_mega.rewards.quantities import parse_quantity

_IN_PARENTHESES = re.compile(r"\(([A-Z])\)")
_FIRST = re.compile(r"\(?([A-Z])\)?\*{0,2}(?:[.):,]|$|\s)")
_ALONE = re.compile(r"(?<![A-Za-z0-9_'’/∠△⊙角点])([A-Z])(?![A-Za-z0-9_'’/])")
_ALTERNATIVES = re.compile(r"\W*(?:either )?\(?[A-Z]\)? ?(?:or|and|/|&) ?\(?[A-Z]\b")
_ARTICLE = re.compile(r"[AI] [a-z]")
_LISTED = re.compile(r"[ \t]*\([A-Z]\)[ \t]")
_WORD = re.compile(r"\w+")
_DENIED = re.compile(
    r"(?:\bnot|n't|\bcannot be|\bnever)(?: [^\s,;]+){1,4}\W*$"
    r"|\b(?:is|are|was|were) (?:incorrect|wrong|ruled out|out\b|not\W*$)|^(?:rather than|instead of|over)|不|排除|错",
    re.I,
)
_CLAUSE = re.compile(r"[,;] ?(?:so |but |therefore |hence )?|\bbut\b|\b(?=rather than|instead of|over \(?[A-Z]\b)")
_ARTICLES = re.compile(
    r"(?<!option )(?<!answer )(?<!choice )(?<![\w'’])A(?= (?!(?:or|and|is|because|since)\b)[a-z])"
    r"|(?<![\w'’])I(?= [a-z]|['’])"
)
_BEGINS = re.compile(
    r"(?:\*\*)?[(\[]?(?:([B-Z]|A(?!:))\)?(?:\*\*)?(?:[.:;)\]](?:\*\*)?\s| [-–—] )"
    r"|([A-Z])\)?(?:\*\*)?(?:[ \t]*\n|,? (?:because|since|as) ))"
)
_MARKED = re.compile(r"(?<![\w'’(])([A-Z])[.:)](?=[\s*])")
_JUDGED = re.compile(
    r"^[ \t]*\(?([A-Z])[).:](?:[^\n]{0,200}?[-:–—])?[ \t]*"
    r"(yes|no|correct|incorrect|true|false|right|wrong|✓|✔|✗|✘|x)\W*$",
    re.IGNORECASE | re.MULTILINE,
)
_GOOD = re.compile("yes|correct|true|right|✓|✔", re.IGNORECASE)
_CALLED = re.compile(
    r"(?<![\w'’])(?<![,/] )(?<!\bor )(?<!\band )\(?([A-Z])\)?(?:\*\*)? is "
    r"(?:the |clearly |thus |therefore )?(?:best |most )?(?:correct|right)\b"
)
_SIGN = re.compile(r"(?:(?<=\s)|^)[-−](?=[0-9.])")
_MAX_CHARS = 2000
_MAX_STATEMENT = 80
_MAX_BLOCK = 120
"""What may still be an answer by itself; a longer text is prose."""


def find_option(text: str, options: Mapping[str, str]) -> str:
    """A letter, an option's text or another short answer, or ``N/A``.

    In order: the whole text; what it states; letters in parentheses; option texts and lone letters in its last
    sentence; and, unless it declines to answer, what its last sentences hold of an option's words.
    """
    if text in options.values():
        return text
    if (
        len(text) <= _MAX_BLOCK
        and "\n\n" not in text
        and "".join(options) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]
    ):
        letter = resolve_choice(text, list(options.values()))
        if letter is not None:
            return letter
    whole, text = text, _without_lists(text)
    called = set(_CALLED.findall(text)) & set(options) if "correct" in text or "right" in text else set()
    stated = statements(_CALLED.sub(" ", text) if called else text)
    for statement in stated:
        found = _of_statement(statement, options)
        if found is not None:
            return found
    if len(called) == 1:
        return called.pop()
    parts = sentences(text)
    found = _leading(text, options) or _declining(text, options) or _by_elimination(whole, options)
    if found is not None:
        return found
    letters = yes_and_no(options)
    if letters:
        if stated and says_yes_or_no(stated[0]):
            return by_polarity(stated[0], letters) or NO_ANSWER
        if parts and says_yes_or_no(parts[0]):
            return by_polarity(parts[0], letters) or NO_ANSWER
    else:
        parts = [kept for part in parts if (kept := _without_denied(part, options))]
        if not parts:
            return NO_ANSWER
    for part in reversed(parts):
        named = [letter for letter in _IN_PARENTHESES.findall(part) if letter in options]
        if named:
            return named[0] if len(set(named)) == 1 else NO_ANSWER
    last = parts[-1] if parts else ""
    if not declines(last):
        found = _contained(last.rpartition("=")[2], options) or _contained(last, options) or _alone(last, options)
        if found is not None:
            return found
    if stated and len(stated[0]) <= _MAX_STATEMENT and (declines(stated[0]) or numbers(stated[0])):
        return stated[0].strip(" .*")
    if declines(text):
        return NO_ANSWER
    if not letters:
        text = "\n".join(parts)
    return (
        _contained(text, options)
        or (by_polarity(parts[0], letters) if letters and parts else None)
        or _by_words(parts, options)
        or _by_number(last, options)
        or NO_ANSWER
    )


def _without_lists(text: str) -> str:
    """The text without lines that only repeat the options."""
    lines = text.split("\n")
    listed = [bool(_LISTED.match(line)) for line in lines]
    if sum(listed) < 2:
        return text
    return "\n".join(line for line, is_listed in zip(lines, listed, strict=True) if not is_listed)


def _of_statement(statement: str, options: Mapping[str, str]) -> str | None:
    """The option that "the answer is ..." goes on to name."""
    stripped = statement.strip().strip("*`\"'$ ")
    if _ALTERNATIVES.match(stripped):
        return None
    first = _FIRST.match(stripped)
    if first and first[1] in options and not _ARTICLE.match(stripped):
        return first[1]
    named = _IN_PARENTHESES.search(stripped)
    if named and named[1] in options:
        return named[1]
    if declines(stripped):
        return None
    return _contained(stripped, options) or _alone(stripped, options)


def _alone(text: str, options: Mapping[str, str]) -> str | None:
    """The one letter that stands alone; "A" before a small letter, and "I", are words unless they are called option."""
    letters = {letter for letter in _ALONE.findall(_ARTICLES.sub(" ", text[-_MAX_CHARS:])) if letter in options}
    return letters.pop() if len(letters) == 1 else None


def _leading(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that the text begins with, set off by a mark or a line of its own, where no other is marked so."""
    match = _BEGINS.match(text)
    letter = match[1] or match[2] if match else None
    if match is None or letter not in options or _ALTERNATIVES.match(text):
        return None
    kept = "\n".join(_without_denied(each, options) for each in sentences(text[match.end() :]))
    if not set(_MARKED.findall(kept)) & set(options) <= {letter}:
        return None
    behind = "" if text.startswith("(") else _without_denied(next(iter(sentences(text[match.end() :])), ""), options)
    other = None if _ALONE.search(behind) else _contained(behind, options)
    if other is None:
        return letter
    # "C. 3.5", "B. The time shown is quarter past." and "A - No, it is not." are about what they end in or begin with.
    said, form = normalize(behind), normalize(options[other])
    return other if said.endswith(form) or re.match(rf"{re.escape(form)}[,.;]", said) else letter


def _declining(text: str, options: Mapping[str, str]) -> str | None:
    """The one option that says that there is no answer, where the last sentence says so, too."""
    found = [letter for letter, option in options.items() if declines(option)]
    last = sentences(text)[-1:]
    if len(found) != 1 or not last or not declines(last[0]):
        return None
    others = {letter: option for letter, option in options.items() if letter != found[0]}
    return None if _contained(_without_denied(last[0], others), others) else found[0]


def _by_elimination(text: str, options: Mapping[str, str]) -> str | None:
    """The one option that is marked as right in a list of them."""
    verdicts = dict(_JUDGED.findall(text))
    right = [letter for letter, verdict in verdicts.items() if _GOOD.fullmatch(verdict) and letter in options]
    return right[0] if len(verdicts) > 1 and len(right) == 1 else None


def _without_denied(sentence: str, options: Mapping[str, str]) -> str:
    """The clauses of a sentence that do not deny an option that they name."""
    clauses = _CLAUSE.split(sentence)
    denied = [_DENIED.search(each) and (_alone(each, options) or _contained(each, options)) for each in clauses]
    return ", ".join(each for each, drop in zip(clauses, denied, strict=True) if not drop) if any(denied) else sentence


def _contained(text: str, options: Mapping[str, str]) -> str | None:
    """The one option whose text stands in ``text`` as words; of options inside one another the longest."""
    haystack = _signed(text[-_MAX_CHARS:])
    forms = {letter: _signed(option) for letter, option in options.items()}
    found = {
        letter: form
        for letter, form in forms.items()
        if form and re.search(rf"(?<![\w.\ue001]){re.escape(form)}(?!\w|\.\d)", haystack)
    }
    longest = [
        letter for letter, form in found.items() if not any(form != other and form in other for other in found.values())
    ]
    return longest[0] if len(longest) == 1 else None


@functools.lru_cache(maxsize=1024)
def _signed(text: str) -> str:
    """Normalised, but a number's sign stays apart from the word before it."""
    return normalize(_SIGN.sub("\ue001", text))


def _by_words(parts: list[str], options: Mapping[str, str]) -> str | None:
    """The one option all of whose words (of letters, without a plural's s) stand in one clause, the last such."""
    wanted = {letter: _words(option) for letter, option in options.items()}
    for part in reversed(parts[-3:]):
        for clause in reversed(part[-_MAX_CHARS:].split(",")):
            words = _words(clause)
            found = [letter for letter, needed in wanted.items() if len(needed) > 1 and needed <= words]
            if len(found) == 1:
                return found[0]
    return None


def _words(text: str) -> set[str]:
    return {word.rstrip("s") for word in _WORD.findall(text.lower()) if word.isalpha()}


def _by_number(text: str, options: Mapping[str, str]) -> str | None:
    """The last number, where the options are numbers: it may be none of them."""
    found = numbers(text)
    return found[-1] if found and all(_is_number(option) for option in options.values()) else None


def _is_number(option: str) -> bool:
    form = normalize(option)
    return parse_quantity(form) is not None or bool(re.match(r"[-+]?[0-9.]+ ?[^\W\d]{1,3}$", form))
