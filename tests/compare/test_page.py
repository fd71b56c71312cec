"""The page of a comparison: it loads and executes nothing, escapes text, and is deterministic."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from prunetune.compare.charts import method_styles
from prunetune.compare.markdown import render_markdown
from prunetune.compare.page import render_page, significance_class, write_page
from prunetune.compare.table import aggregate
from prunetune.config.recipe import from_mapping
from prunetune.manifest import Manifest
from support.comparison import failed, realistic
from support.page import ATTACK, Outline, steering

METHODS = ("dense", "untuned", "random", "taylor", "progressive")


def comparison_of(keeps: list[float], methods: tuple[str, ...] = METHODS) -> dict[str, Any]:
    cells = [*realistic(methods, keeps, [0, 1]), failed("random", "the loss is nan", seed=7, keep=keeps[0])]
    return aggregate(cells, dict.fromkeys(methods, 1e-3), from_mapping({"compare": {"keeps": keeps}}))


@pytest.mark.parametrize("keeps", [[0.6], [0.8, 0.6]], ids=["one size", "two sizes"])
def test_page_loads_nothing_and_has_every_section(keeps: list[float]) -> None:
    page = render_page(
        comparison_of(keeps), Manifest.from_dict({"command": "prunetune compare r.yaml"}), "model: demo\n", "legal"
    )
    outline = Outline(page)
    assert not {tag for tag, _ in outline.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert all(target.startswith("#") for target in outline.attributes("href"))
    assert not outline.attributes("src")
    assert not [name for _, attrs in outline.tags for name in attrs if name.startswith("on")]
    assert "default-src 'none'" in page
    assert "http://" not in page
    assert "https://" not in page
    names = outline.attributes("id")
    assert len(names) == len(set(names))
    assert page.count("<svg") == 5  # accuracy, NLL, ROUGE-L and two perplexities
    assert page.count("<caption") == page.count("<table") == 2 * len(keeps) + 1
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))))
    assert all(colour.startswith("var(--") or colour in ("none", "currentColor") for colour in colours), colours
    assert "the loss is nan" in page
    assert "removed: NLL +" in page


def test_page_escapes_text_from_files() -> None:
    hostile = {**comparison_of([0.6], ("dense", "progressive")), "model": ATTACK}
    for row in hostile["rows"]:
        row["method"] = ATTACK if row["method"] == "dense" else row["method"]
        row["scores"][f"ppl {ATTACK}"] = row["scores"].pop("ppl legal/text")
    hostile["metrics"] = [*hostile["metrics"][:3], f"ppl {ATTACK}"]
    hostile["errors"] = [{"cell": ATTACK, "error": ATTACK}]
    hostile["rates"] = [{"method": ATTACK, "learning_rate": 1e-3, "valid_nll": None, "chosen": False}]
    manifest = {"command": ATTACK, "device": ATTACK, "versions": {ATTACK: ATTACK}, "model": {"name": ATTACK}}
    page = render_page(hostile, Manifest.from_dict(manifest), f"model: x\n</pre>{ATTACK}", ATTACK)
    outline = Outline(page)
    assert not {tag for tag, _ in outline.tags} & {"script", "img"}
    assert not [name for _, attrs in outline.tags for name in attrs if name.startswith("on")]
    assert "&lt;script&gt;" in page
    assert not steering(page)
    table = render_markdown(hostile)
    assert not steering(table)
    assert "<" not in table


def test_write_page_is_deterministic(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(comparison_of([0.6])))
    first = write_page(tmp_path).read_bytes()
    assert write_page(tmp_path).read_bytes() == first


def test_page_of_failed_cells_only_lists_the_errors() -> None:
    failed_comparison = aggregate([failed("random", "no memory")], {"random": 1e-3}, from_mapping({}))
    page = render_page(failed_comparison, Manifest.empty(), "", "empty")
    Outline(page)
    assert "no memory" in page


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ({"difference": -0.1, "difference_se": 0.04}, "worse"),
        ({"difference": -0.1, "difference_se": 0.06}, ""),
        ({"difference": -0.1, "difference_se": 0.0}, "worse"),
        ({"difference": 0.0, "difference_se": 0.0}, ""),
        ({"difference": -0.1, "difference_se": None}, ""),
        ({"difference": -0.1, "difference_se": 0.04, "difference_seed_se": 0.06}, ""),
        ({"difference": -0.1, "difference_se": 0.04, "difference_seed_se": 0.02}, "worse"),
        ({}, ""),
    ],
)
def test_significance_class_needs_two_standard_errors(score: dict[str, Any], expected: str) -> None:
    assert significance_class(score, "acc") == expected


def test_method_styles_are_distinct() -> None:
    names = [*METHODS, *(f"variant-{n}" for n in range(20))]
    styles = method_styles(names, "progressive")
    assert len({(style.colour, style.marker) for style in styles.values()}) == len(names)  # as the legend shows them
