"""Contrast of the pages' colours by WCAG 2 (AA): 4.5 for text, 3 for marks and lines of figures, in both schemes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "prunetune"
TEXT = ("ink", "muted", "tuned", "pruned", "good", "bad")  # also text of figures, links and readings
LINES = ("dense", "tuned", "pruned", "focus", *(f"series-{number}" for number in range(8)))


def colours(scheme: str) -> dict[str, str]:
    """The custom properties of a scheme by name."""
    css = "".join((SOURCE / name).read_text() for name in ("report/style.css", "compare/comparison.css"))
    blocks = re.findall(r"@media screen and \(prefers-color-scheme: dark\) \{(.*?)\n\}", css, re.DOTALL)
    light = re.sub(r"@media screen and \(prefers-color-scheme: dark\) \{.*?\n\}", "", css, flags=re.DOTALL)
    pattern = r"--([\w-]+): ([^;]+);"
    return dict(re.findall(pattern, light)) | (dict(re.findall(pattern, "".join(blocks))) if scheme == "dark" else {})


def rgb(colour: str, below: str) -> tuple[float, ...]:
    """Red, green and blue from 0 to 255 of a colour over an opaque one."""
    if colour.startswith("#"):
        return tuple(float(int(colour[at : at + 2], 16)) for at in (1, 3, 5))
    *parts, alpha = (float(part) for part in re.findall(r"[\d.]+", colour))
    return tuple(alpha * part + (1 - alpha) * under for part, under in zip(parts, rgb(below, ""), strict=True))


def luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance of an sRGB colour."""
    linear = [part / 3294.6 if part <= 10.31475 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """From 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_known_pairs() -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast(rgb("#767676", ""), rgb("#ffffff", "")) == pytest.approx(4.54, abs=0.01)
    assert rgb("rgba(0, 100, 200, .5)", "#ffffff") == (127.5, 177.5, 227.5)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_on_every_background(scheme: str) -> None:
    known = colours(scheme)
    backgrounds = {name: known[name] for name in ("page", "surface")}
    weak = {
        (text, name): round(ratio, 2)
        for text in TEXT
        for name, background in backgrounds.items()
        if (ratio := contrast(rgb(known[text], ""), rgb(background, ""))) < 4.5
    }
    shaded = rgb(known["search"], known["surface"])  # the row of the reference in a comparison
    weak |= {(text, "search"): 0.0 for text in ("ink", "muted") if contrast(rgb(known[text], ""), shaded) < 4.5}
    assert not weak


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_of_figures_stand_out_from_cards_and_phases(scheme: str) -> None:
    known = colours(scheme)
    backgrounds = {name: rgb(known[name], known["surface"]) for name in ("surface", "search", "settle", "tune")}
    weak = {
        (line, name): round(ratio, 2)
        for line in LINES
        for name, background in backgrounds.items()
        if (ratio := contrast(rgb(known[line], ""), background)) < 3.0
    }
    assert not weak
