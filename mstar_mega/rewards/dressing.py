"""The dressing of an answer: LaTeX, markdown, tags, widths and typography that say nothing about what it is.

String work in bounded time, on texts of at most ``MAX_ANSWER_CHARS``; nothing is evaluated.
"""

from __future__ import annotations

import functools
import re
import unicodedata

MAX_ANSWER_CHARS = 2048
"""Longer answers are compared as they stand, without normalisation."""

_BARE = re.compile(r"(?!(?i:plus))[A-Za-z0-9]+(?:[ -][A-Za-z0-9]+){0,8}|-?[0-9]+(?:\.[0-9]+)?")
"""An answer without dressing: nothing to do."""

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
_TYPOGRAPHY = str.maketrans(
    {**dict.fromkeys("\u2212\u2012\u2013\u2014\u2010\u2011\ufe63\uff0d", "-"), **dict.fromkeys("“”″", '"'), "⁄": "/",
     **dict.fromkeys("‘’′", "'"), **dict.fromkeys("º˚∘", "°"), "。": ".", "、": ", ", "，": ", ", "；": "; ", "µ": "μ",
     "Ω": "Ω", **dict.fromkeys("≃≅∼", "≈"), "⋅": "·", "∗": "*", "∠": "∠", "…": "…"}
)  # fmt: skip
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋"
_WIDE_COMMA = re.compile("(?<=[０-９])，(?=[０-９])")
_BARRED = re.compile("([0-9])[\u0304\u0305\u0307]")
_SCRIPTS = re.compile(f"([{_RAISED}]+)|([{_LOWERED}]+)|([½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞⅐⅑⅒])")

_SPECIAL_TOKEN = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|</?s>|<(?:eos|bos|pad|end_of_turn|endoftext|end_of_text)>|\[/?INST\]"
    r"|(?i:</?(?:final_)?answer>|</?ans>)"
)
_TAGGED = re.compile(r"<(b|strong|em|i|p|span|code)>(.*?)</\1>", re.IGNORECASE | re.DOTALL)
_FENCED = re.compile(r"```[a-z]*\s(.*?)\s?```", re.DOTALL)
_BOLD = re.compile(r"(?<![\w*)\]}])(\*\*|__)(?=\S)([^*_]{1,200}?)(?<=\S)\1(?![\w*(])")

_TEXT_WRAPPER = re.compile(r"\\(?:(?:text(?!color)|mathrm|operatorname|mbox|hbox)[a-z]*|mathrm|unit|si) ?\{")
_WRAPPER = re.compile(
    r"\\(?:boxed|fbox|framebox|underbrace|math(?:bb|bf|it|sf|tt|cal|scr|frak|normal)|bm|boldsymbol|pmb|bold|underline|emph|ang"
    r"|(?:(?:text)?color|colorbox|fcolorbox ?\{[^{}]{0,40}\}) ?\{[^{}]{0,40}\}) ?\{"
)
_DECLARATION = re.compile(
    r"\\(?:boxed|displaystyle|textstyle|scriptstyle|left|right|middle|[bB]igg?[lrm]?|limits|bf|rm|it|mathrm|mathbf"
    r"|text|tiny|small|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])[.]?|\\(?:text)?color ?\{[^{}]{0,40}\}"
    r"|\\[hv]?phantom ?\{[^{}]{0,40}\}|\\(?:begin|end) ?\{(?:equation|align|aligned"
    r"|gather|math|displaymath|center)\*?\}"
)
_THIN_SPACE_IN_NUMBER = re.compile(r"(?<=[0-9])(?:\\[,!]|,\\!|\{,\})(?=[0-9]{3})")
_LATEX_SPACE = re.compile(r"\\(?:[,;:!~ ]|quad\b|qquad\b)|~")
_LATEX_NOISE = re.compile(r"\\[()\[\]]")
_OVER = re.compile(r"\{? ?([^{}\\]{1,40}?) ?\\over(?![a-z]) ?([^{}\\]{1,40}?) ?(?:\}|$)")
_DEGREES = re.compile(
    r"\\degrees?(?![a-z])|\\textdegree|\^ ?\{? ?(?:\\circ|°) ?\}?|\^ ?\{? ?o ?\}?(?!\w)|\\circ(?![a-z])"
)
_GROUPED_NUMBER = re.compile(r"(?<![\w}\]^])\{([0-9.]{1,40})\}(?=\^)")
_PLUS_MINUS = re.compile(r"\+/-|\bplus[ -](?:or[ -])?minus\b ?", re.IGNORECASE)
_FRACTION = re.compile(r"\\(?:[dtcsx]|nice)frac(?![a-z])")
_LATEX_SIGNS = (
    ("\\%", "%"), ("\\&", "&"), ("\\#", "#"), ("\\_", "_"), ("\\pm", "±"), ("\\approx", "≈"), ("\\simeq", "≈"),
    ("\\angle", "∠"), ("\\ldots", "…"), ("\\cdots", "…"), ("\\dots", "…"), ("...", "…"), ("\\Omega", "Ω"),
    ("\\mu", "μ"), ("\\pounds", "£"), ("\\euro", "€"), ("\\yen", "¥"), ("\\colon", ":"), ("\\lbrace", "\\{"),
    ("\\rbrace", "\\}"), ("\\sim", "≈"), ("\\cdot", "·"), ("\\times", "×"), ("\\triangle", "△"), ("\\therefore", "∴"),
    ("\\Rightarrow", "⇒"), ("\\implies", "⇒"), ("\\rightarrow", "→"),
)  # fmt: skip
_ESCAPED_DOLLAR = "\ue000"
_PAIRS = ("**", "__", "*", "_", "`", '"', "'")


def _script(match: re.Match[str]) -> str:
    if match[1] or match[2]:
        digits = unicodedata.normalize("NFKC", match[0]).replace("\u2212", "-")
        return f"{'^' if match[1] else '_'}{digits if len(digits) == 1 else f'{{{digits}}}'}"
    value = unicodedata.normalize("NFKC", match[3])
    return f" {value}" if match.start() and match.string[match.start() - 1].isdigit() else value


def compatible(text: str) -> str:
    """Full-width and other compatibility characters as plain ones; raised and lowered digits as ``^`` and ``_``."""
    if text.isascii():
        return text
    text = _BARRED.sub(r"\\overline{\1}", _WIDE_COMMA.sub(",", _INVISIBLE.sub("", text)))
    text = _SCRIPTS.sub(_script, text.translate(_TYPOGRAPHY))
    return unicodedata.normalize("NFKC", text).translate(_TYPOGRAPHY)


def _drop_wrappers(text: str) -> str:
    """Remove ``\\boxed{`` and its like together with the brace that closes it, at any depth, in one pass.

    ``\\text`` and its like leave a space on both sides: what stands in them is no factor.
    """
    kept: list[str] = []
    closing: list[str] = []
    position = 0
    while position < len(text):
        if text[position] == "\\":
            wrapper, space = _TEXT_WRAPPER.match(text, position), " "
            if wrapper is None:
                wrapper, space = _WRAPPER.match(text, position), ""
            if wrapper:
                kept.append(space)
                closing.append(space)
                position = wrapper.end()
                continue
        char = text[position]
        position += 1
        if char == "{":
            closing.append("}")
        elif char == "}" and closing:
            char = closing.pop()
        kept.append(char)
    return "".join(kept)


def _drop_dollars(text: str) -> str:
    """``$...$`` is LaTeX; a dollar sign that is escaped, or alone before a number, is money."""
    text = text.replace("\\$", _ESCAPED_DOLLAR)
    if text.count("$") % 2 == 0:
        text = text.replace("$", "")
    return text.replace(_ESCAPED_DOLLAR, "$")


def encloses(text: str, opening: str, closing: str) -> bool:
    """Whether the first bracket is closed by the last one."""
    if not (len(text) > 2 and text.startswith(opening) and text.endswith(closing)):
        return False
    depth = 0
    for index, char in enumerate(text):
        depth += (char == opening) - (char == closing)
        if depth == 0:
            return index == len(text) - 1
    return False


def _strip_surroundings(text: str) -> str:
    """Strip white space, sentence punctuation, and paired quotes, brackets or markdown around the text."""
    while True:
        before = text
        text = text.strip().rstrip(".,;:?\\").lstrip(",;:?").removeprefix("**").removesuffix("**")
        if text.endswith("…") and not re.search(r"\.[0-9]+…$", text):
            text = text[:-1]
        text = text.lstrip("…")
        if text.startswith(".") and not re.match(r"\.[0-9]", text):
            text = text[1:]
        if re.search(r"[^\W\d_]{2}!+$", text):  # "yes!" but not the factorials "5!" and "n!"
            text = text.rstrip("!")
        for mark in _PAIRS:
            if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
                text = text[len(mark) : -len(mark)]
                break
        if encloses(text, "{", "}") and "," not in text:
            text = text[1:-1]
        if text == before:
            return text


def _clean_once(text: str) -> str:
    text = _PLUS_MINUS.sub("±", compatible(_CONTROL.sub(" ", text)))
    if "<" in text or "[/" in text:
        text = _SPECIAL_TOKEN.sub("", text)
        text = _TAGGED.sub(r"\2", text)
    if "`" in text:
        text = _FENCED.sub(r"\1", text)
    if "*" in text or "__" in text:
        text = _BOLD.sub(r"\2", text)
    if "\\" in text or "~" in text or "{" in text:
        text = _FRACTION.sub(r"\\frac", _DEGREES.sub("°", _drop_wrappers(" ".join(text.split()))))
        text = _OVER.sub(r"\\frac{\1}{\2}", text)
        text = _THIN_SPACE_IN_NUMBER.sub(lambda match: "" if match[0] in ("\\,", "\\!") else ",", text)
        for command, sign in _LATEX_SIGNS:
            if command in text:
                text = re.sub(re.escape(command) + (r"(?![A-Za-z])" if command[-1].isalpha() else ""), sign, text)
        text = _LATEX_NOISE.sub("", _DECLARATION.sub("", _LATEX_SPACE.sub(" ", text)))
        text = _GROUPED_NUMBER.sub(r"\1", text.replace(" ^", "^").replace(" _", "_").replace("μ ", "μ"))
    elif "^" in text or "..." in text:
        text = _DEGREES.sub("°", text).replace("...", "…")
    if "$" in text:
        text = _drop_dollars(text)
    return _strip_surroundings(" ".join(text.split()))


def clean(answer: str) -> str:
    """The answer without its dressing; case is kept, white space is single spaces. Idempotent.

    Answers longer than ``MAX_ANSWER_CHARS`` are only stripped.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return answer.strip()
    return answer if _BARE.fullmatch(answer) else _clean(answer)


@functools.lru_cache(maxsize=4096)
def _clean(answer: str) -> str:
    while True:
        shorter = _clean_once(answer)
        if shorter == answer:
            return shorter
        answer = shorter


_SPACE_AROUND = re.compile(r" ?([,;=+\-*/^(){}\[\]<>|]) ?")


def squeeze(cleaned: str) -> str:
    """In lower case and without white space around signs: the form in which texts and expressions are compared."""
    return _SPACE_AROUND.sub(r"\1", cleaned.casefold())


def normalize(answer: str) -> str:
    """A spelling-independent form: case, white space, surrounding punctuation, markdown and LaTeX dressing removed.

    Idempotent. Answers longer than ``MAX_ANSWER_CHARS`` are only stripped.
    """
    cleaned = clean(answer)
    if len(cleaned) > MAX_ANSWER_CHARS:
        return cleaned
    squeezed = squeeze(cleaned)
    return squeezed if squeezed == cleaned else normalize(squeezed)
