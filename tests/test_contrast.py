"""Every colour of the pages against what it stands on: WCAG 2.1 AA, in the light and in the dark scheme.

Text needs 4.5 to 1 (1.4.3); what must be seen to understand a plot or to find a control 3 to 1 (1.4.11).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mstar_mega.report import page
from mstar_mega.report.drawing import RAMP, SERIES

TEMPLATES = Path(page.__file__).parent
PAGES = ["template.html", "benchmark.html", "compare.html"]
DECORATION = {"--line", "--grid"}
"""Lines between things that are told apart without them."""

Colour = tuple[float, float, float]


def style(name: str) -> str:
    text = (TEMPLATES / name).read_text()
    if "{{style}}" in text:
        text = text.replace("{{style}}", style("template.html"))
    return re.sub(r"/\*.*?\*/", "", "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL)), flags=re.DOTALL)


def schemes(css: str) -> dict[str, dict[str, Colour]]:
    """Of each scheme, variable -> linear RGB."""
    light, dark = re.findall(r":root\s*\{(.*?)\}", css, re.DOTALL)[:2]

    def colours(block: str) -> dict[str, Colour]:
        return {name: linear(value) for name, value in re.findall(r"(--[\w-]+): (#\w+)", block)}

    return {"light": colours(light), "dark": colours(light) | colours(dark)}


def linear(value: str) -> Colour:
    digits = value.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    red, green, blue = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))

    def of(channel: float) -> float:
        return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4

    return of(red), of(green), of(blue)


def contrast(one: Colour, other: Colour) -> float:
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in (one, other))
    return (high + 0.05) / (low + 0.05)


def rules(css: str) -> list[tuple[str, dict[str, str]]]:
    """(selector, property -> value) of every rule outside :root."""
    flat = re.sub(r"@media[^{]*\{((?:[^{}]*\{[^{}]*\})*)[^{}]*\}", r"\1", css)
    found = []
    for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", flat):
        pairs = (each.partition(":") for each in body.split(";") if ":" in each)
        found.append((selector.strip(), {name.strip(): value.strip() for name, _, value in pairs}))
    return [(selector, properties) for selector, properties in found if ":root" not in selector]


def variable(value: str | None) -> str | None:
    match = re.fullmatch(r"var\((--[\w-]+)\)", value or "")
    return match[1] if match else None


def text_pairs(css: str) -> set[tuple[str, str]]:
    """(text, background): of a rule that says both; text alone stands on the page and on cards; a background alone is
    under the text's usual colour."""
    pairs = {("--ink", "--page"), ("--ink", "--surface")}
    for _, properties in rules(css):
        text, ground = variable(properties.get("color")), variable(properties.get("background"))
        if text and not properties.get("background"):
            pairs |= {(text, "--page"), (text, "--surface")}
        elif text and ground:
            pairs.add((text, ground))
        elif ground and not properties.get("color") and not re.fullmatch("[0-9.]+px", properties.get("width", "")):
            pairs.add(("--ink", ground))
    return pairs


def test_contrast_is_computed_as_published() -> None:
    assert contrast(linear("#000"), linear("#ffffff")) == pytest.approx(21)
    assert contrast(linear("#777777"), linear("#fff")) == pytest.approx(4.48, abs=0.01)
    css = ":root { --a: #fff } @media (x) { :root { --a: #000 } } .b { color: var(--a); background: var(--c); }"
    assert ("--a", "--c") in text_pairs(css) and schemes(css)["dark"]["--a"] == linear("#000")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_text_can_be_read(name: str, scheme: str) -> None:
    css = style(name)
    colours = schemes(css)[scheme]
    pairs = text_pairs(css)
    assert len(pairs) > 8
    poor = {pair: round(contrast(*(colours[each] for each in pair)), 2) for pair in pairs}
    assert not {pair: value for pair, value in poor.items() if value < 4.5}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_borders_and_outlines_that_say_something_can_be_seen(name: str, scheme: str) -> None:
    css = style(name)
    colours = schemes(css)[scheme]
    told = {
        found
        for _, properties in rules(css)
        for key, value in properties.items()
        if key.startswith(("border", "outline"))
        for found in re.findall(r"var\((--[\w-]+)\)", value)
    } - DECORATION
    assert told
    poor = {(each, on): contrast(colours[each], colours[on]) for each in told for on in ("--page", "--surface")}
    assert not {pair: value for pair, value in poor.items() if value < 3}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_plots_draw_can_be_seen(scheme: str) -> None:
    colours = schemes(style("template.html"))[scheme]
    drawn = [f"--series-{i + 1}" for i in range(len(SERIES))] + [f"--ramp-{i + 1}" for i in range(len(RAMP))]
    assert not {name: v for name in drawn if (v := contrast(colours[name], colours["--surface"])) < 3}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_chips_can_be_read_at_every_score(scheme: str) -> None:
    css = style("template.html")
    colours = schemes(css)[scheme]
    (chip,) = [properties for selector, properties in rules(css) if selector == ".chip"]
    text, ground = (
        re.fullmatch(r"color-mix\(in oklab, var\(--c\) (\d+)%, var\((--\w+)\)\)", chip[key])
        for key in ("color", "background")
    )
    assert text is not None and ground is not None
    for tenth in range(11):
        score = oklab_mix(colours["--high"], colours["--low"], tenth / 10)
        pair = [oklab_mix(score, colours[found[2]], int(found[1]) / 100) for found in (text, ground)]
        assert contrast(pair[0], pair[1]) >= 4.5, tenth / 10


def oklab_mix(one: Colour, other: Colour, share: float) -> Colour:
    """So much of one in the other, as CSS mixes (Björn Ottosson's OKLab)."""
    mixed = [share * a + (1 - share) * b for a, b in zip(to_oklab(one), to_oklab(other), strict=True)]
    light, a, b = mixed
    long = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (light - 0.0894841775 * a - 1.2914855480 * b) ** 3
    rgb = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    red, green, blue = (min(1.0, max(0.0, channel)) for channel in rgb)
    return red, green, blue


def to_oklab(colour: Colour) -> Colour:
    red, green, blue = colour
    long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
    medium = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
    short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
    return (
        0.2104542553 * long + 0.7936177850 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.8086757660 * short,
    )


def test_oklab_there_and_back() -> None:
    for value in ("#d9552a", "#17966a", "#ffffff"):
        assert oklab_mix(linear(value), linear("#000"), 1.0) == pytest.approx(linear(value), abs=1e-4)
