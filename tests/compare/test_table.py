"""The table of a comparison, against numbers computed by hand."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from prunetune.compare.markdown import render_markdown, verdict_sentences
from prunetune.compare.page import render_page
from prunetune.compare.table import SeedGroup, aggregate, mean_difference
from prunetune.config.recipe import from_mapping
from prunetune.evaluation.statistics import mean_score as mean_of
from prunetune.manifest import Manifest
from support.comparison import cell, failed, item, realistic, task

CONFIG = from_mapping({"compare": {"keeps": [0.6]}})
RATES = {"dense": 1e-3, "random": 1e-3, "progressive": 1e-3}


def simple(method: str, *nlls: float, seed: int = 0, **values: Any) -> dict[str, Any]:
    """A cell with one task whose items have these NLLs; an item is right if its NLL is below 2."""
    items = [item(f"i{n}", nll=nll, tokens=2.0, accuracy=float(nll < 2)) for n, nll in enumerate(nlls)]
    return cell(method, task("a", items, "nll", "accuracy"), seed=seed, **values)


def row_of(comparison: dict[str, Any], method: str) -> dict[str, Any]:
    return next(row for row in comparison["rows"] if row["method"] == method)


def test_aggregate_gives_means_deviations_and_paired_errors() -> None:
    cells = [
        simple("dense", 1.0, 1.0, 1.0, 1.0),
        simple("random", 1.0, 2.0, 3.0, 4.0, seed=0),
        simple("random", 3.0, 2.0, 3.0, 6.0, seed=1),
        simple("progressive", 1.0, 1.0, 2.0, 4.0, seed=0),
        simple("progressive", 1.0, 2.0, 3.0, 4.0, seed=1),
    ]
    comparison = aggregate(cells, RATES, CONFIG)
    scores = row_of(comparison, "random")["scores"]
    # Seeds: 2.5 and 3.5. Items over seeds: 2, 2, 3, 5.
    assert scores["nll"]["value"] == pytest.approx(3.0)
    assert scores["nll"]["sd"] == pytest.approx(math.sqrt(0.5))
    assert scores["nll"]["se"] == pytest.approx(math.sqrt(2) / 2)
    # One-stage's items over seeds: 1, 1.5, 2.5, 4; apart by 1, 0.5, 0.5, 1.
    assert scores["nll"]["difference"] == pytest.approx(0.75)
    assert scores["nll"]["difference_se"] == pytest.approx(math.sqrt(0.25 / 3) / 2)
    # The seeds' differences are 0.5 and 1.
    assert scores["nll"]["difference_seed_se"] == pytest.approx(math.sqrt(0.125 / 2))
    assert scores["acc"]["value"] == pytest.approx(0.125)
    # Beside dense only the seed that both have: 2.5 - 1, and 1 of 4 right against 4 of 4.
    assert row_of(comparison, "random")["gap"] == pytest.approx(1.5)
    assert row_of(comparison, "random")["acc_of_dense"] == pytest.approx(0.25)
    assert row_of(comparison, "dense")["scores"]["nll"]["sd"] is None
    assert row_of(comparison, "dense")["gap"] == 0
    assert "difference" not in row_of(comparison, "progressive")["scores"]["nll"]
    assert row_of(comparison, "progressive")["teacher_seconds"] == 60
    assert [row_of(comparison, name)["cost_seconds"] for name in RATES] == [60, 60, 120]
    assert comparison["made"]["dates"] == ["2026-11-30"]
    assert render_markdown(comparison).startswith("demo, 2026-11-30, commit a7e92a6a7.\n")


def test_reference_is_the_first_progressive_variant_without_progressive() -> None:
    cells = [
        simple("random", 1.0, 3.0),
        simple("faster", 1.0, 2.0, changes={"train": {"learning_rate": 2e-3}}),
        simple("slower", 2.0, 2.0, changes={"train": {"learning_rate": 5e-4}}),
    ]
    rates = dict.fromkeys(("random", "faster", "slower"), 1e-3)
    comparison = aggregate(cells, rates, CONFIG)
    assert comparison["reference"] == "faster"
    assert row_of(comparison, "random")["scores"]["nll"]["difference"] == pytest.approx(0.5)
    assert row_of(comparison, "slower")["scores"]["nll"]["difference"] == pytest.approx(0.5)
    assert "difference" not in row_of(comparison, "faster")["scores"]["nll"]
    whole = aggregate([*cells, simple("progressive", 1.0, 1.0)], rates | {"progressive": 1e-3}, CONFIG)
    assert whole["reference"] == "progressive"
    assert aggregate(cells[:1], {"random": 1e-3}, CONFIG)["reference"] == "progressive"


def test_aggregate_weighs_tasks_equally_and_keeps_perplexity_apart() -> None:
    def cell_of(method: str, shift: float) -> dict[str, Any]:
        few = [item(f"a{n}", nll=1.0 + n + shift, tokens=1.0, accuracy=1.0) for n in range(2)]
        many = [item(f"b{n}", nll=3.0 + n % 2 + shift, tokens=1.0) for n in range(8)]
        texts = [item(f"t{n}", nll=math.log(10) + shift, tokens=5.0) for n in range(4)]
        return cell(
            method, task("a", few, "nll", "accuracy"), task("b", many, "nll"), task("prose", texts, "perplexity")
        )

    group, other = SeedGroup((cell_of("random", 0.5),)), SeedGroup((cell_of("progressive", 0.0),))
    scores = row_of(aggregate([*group.cells, *other.cells], RATES, CONFIG), "random")["scores"]
    assert scores["nll"]["value"] == pytest.approx((2.0 + 4.0) / 2)
    assert scores["nll"]["se"] == pytest.approx(math.hypot(mean_of([1.5, 2.5]).se, mean_of([3.5, 4.5] * 4).se) / 2)
    assert scores["nll"]["difference"] == pytest.approx(0.5)
    assert scores["nll"]["difference_se"] == pytest.approx(0, abs=1e-12)
    assert scores["ppl prose"]["value"] == pytest.approx(10 * math.exp(0.5))
    assert scores["ppl prose"]["difference"] == pytest.approx(10 * math.exp(0.5) - 10)
    assert mean_difference(group, None, "nll") == {}


def test_gap_of_untuned_is_to_the_mean_over_seeds() -> None:
    cells = [simple("untuned", 3.0, 3.0), simple("dense", 1.0, 1.0, seed=5), simple("dense", 2.0, 2.0, seed=6)]
    comparison = aggregate(cells, {"untuned": 1e-3, "dense": 1e-3}, CONFIG)
    assert row_of(comparison, "untuned")["gap"] == pytest.approx(1.5)


def test_failed_seeds_are_counted_and_left_out_of_means() -> None:
    cells = [
        simple("random", 1.0, 2.0), failed("random", "nan", seed=1), failed("dense", "no memory"),
        simple("progressive", 1.0, 2.0, seed=1),
    ]  # fmt: skip
    comparison = aggregate(cells, RATES, CONFIG)
    assert (row_of(comparison, "random")["seeds"], row_of(comparison, "random")["failed"]) == ([0], 1)
    assert (row_of(comparison, "dense")["seeds"], row_of(comparison, "dense")["failed"]) == ([], 1)
    assert "difference" not in row_of(comparison, "random")["scores"]["nll"]  # no seed in common
    assert row_of(comparison, "random")["gap"] is None
    text = render_markdown(comparison)
    assert "1 (1 failed)" in text
    assert "- dense-keep0.6-seed0: no memory" in text


def test_values_that_are_not_finite_are_null() -> None:
    comparison = aggregate([simple("random", 1.0, math.nan), simple("progressive", 1.0, 1.0)], RATES, CONFIG)
    json.dumps(comparison, allow_nan=False)
    render_markdown(comparison)


def test_rows_have_the_chosen_learning_rate_alone() -> None:
    cells = [simple("random", 1.0, 2.0, learning_rate=rate, valid_nll=nll) for rate, nll in ((1e-3, 2.0), (1e-2, 1.0))]
    comparison = aggregate(cells, {"random": 1e-2}, CONFIG)
    assert [(row["learning_rate"], row["chosen"]) for row in comparison["rates"]] == [(1e-3, False), (1e-2, True)]
    assert [row["learning_rate"] for row in comparison["rows"]] == [1e-2]
    assert "| random | 0.01 | 1.000 | chosen |" in render_markdown(comparison)


def test_markdown_has_a_table_for_each_budget_with_dense_in_all() -> None:
    config = from_mapping({"compare": {"keeps": [0.8, 0.6]}})
    comparison = aggregate(realistic(list(RATES), [0.8, 0.6], [0, 1]), RATES, config)
    assert [(row["method"], row["keep"]) for row in comparison["rows"]] == [
        (method, keep) for keep in (0.8, 0.6) for method in RATES
    ]
    tables = re.findall(r"(?:^\|.*\n)+", render_markdown(comparison), re.MULTILINE)
    assert [len(table.splitlines()) for table in tables] == [5, 5] * 2  # means and tasks
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_general_tasks_are_in_a_table_of_their_own_and_in_no_mean() -> None:
    def cell_of(method: str, shift: float) -> dict[str, Any]:
        own = [item(f"a{n}", nll=1.0 + shift, tokens=1.0, accuracy=1.0) for n in range(4)]
        school = [item(f"b{n}", nll=5.0 + shift, tokens=1.0, accuracy=0.0) for n in range(4)]
        texts = [item(f"t{n}", nll=math.log(10) + shift, tokens=5.0) for n in range(4)]
        tasks = task("a", own, "nll", "accuracy"), task("school", school, "nll", "accuracy", general=True)
        floors = {"a": {"chance": 0.25, "majority": 0.3, "longest": 0.375}}
        return cell(method, *tasks, task("law", texts, "perplexity", general=True), floors=floors)

    comparison = aggregate([cell_of("random", 0.5), cell_of("progressive", 0.0)], RATES, CONFIG)
    scores = row_of(comparison, "random")["scores"]
    assert (scores["nll"]["value"], scores["acc"]["value"]) == (1.5, 1.0)
    assert scores["nll"]["difference"] == pytest.approx(0.5)
    assert (comparison["metrics"], comparison["tasks"]) == (["acc", "nll"], ["acc a"])
    assert comparison["forgetting"] == ["acc school", "ppl law"]
    assert scores["acc school"]["value"] == 0
    assert scores["ppl law"]["difference"] == pytest.approx(10 * math.exp(0.5) - 10)
    text = render_markdown(comparison)
    assert "| method | acc school | ppl law |" in text
    assert "| method | acc a |\n|---|---|\n| chance | 0.250 |\n| majority | 0.300 |\n| longest | 0.375 |\n" in text


def test_cells_of_0_1_0_give_the_same_table() -> None:
    """Their items are {id: {metric: value}}, and they name no general tasks, floors, day and commit."""
    cells = realistic(list(RATES), [0.6], [0, 1])
    old = []
    for new in cells:
        items = {
            name: {
                id: {metric: values[n] for metric, values in columns.items() if metric != "id"}
                for n, id in enumerate(columns["id"])
            }
            for name, columns in new["items"].items()
        }
        old.append({key: value for key, value in new.items() if key not in ("general", "made")} | {"items": items})
    assert aggregate(old, RATES, CONFIG)["rows"] == aggregate(cells, RATES, CONFIG)["rows"]


def sized(method: str, loss: float, megabytes: int, **formats: tuple[float, int]) -> dict[str, Any]:
    """A cell of four items of this loss, with its scores in formats: (loss, megabytes) each."""
    stored = {}
    for name, (stored_loss, stored_megabytes) in formats.items():
        found = simple(method, *[stored_loss] * 4)
        stored[name] = {key: found[key] for key in ("headline", "scores", "items")} | {
            "bytes": stored_megabytes * 10**6
        }
    return simple(method, *[loss] * 4, bytes=megabytes * 10**6, formats=stored)


def test_model_scored_in_a_format_has_a_row_of_its_own_and_the_smallest_about_as_good_is_named() -> None:
    cells = [
        sized("dense", 1.0, 270, q8_0=(1.001, 140), q4_k_m=(1.1, 90)),
        sized("progressive", 1.01, 200, q8_0=(1.015, 110), q4_k_m=(1.2, 70)),
        simple("taylor", *[1.3] * 4),
    ]
    comparison = aggregate(cells, {"dense": 1e-3, "taylor": 1e-3, "progressive": 1e-3}, CONFIG)
    assert {row["method"] for row in comparison["rows"]} == {
        "dense", "dense+q8_0", "dense+q4_k_m", "taylor", "progressive", "progressive+q8_0", "progressive+q4_k_m",
    }  # fmt: skip
    assert (comparison["reference"], comparison["rates"]) == ("progressive", [])
    words = "The smallest weights within 2% of dense in loss: progressive+q8_0 with 40% removed, 110 of 270 MB."
    assert verdict_sentences(comparison) == [words]
    assert "The smallest weights within 2% of dense" in render_markdown(comparison)
    assert "<svg" in render_page(comparison, Manifest.from_dict({}), "", "formats")
    assert words in render_page(comparison, Manifest.from_dict({}), "", "formats")


def test_comparison_in_one_format_names_no_smallest_weights() -> None:
    comparison = aggregate([sized("dense", 1.0, 270), sized("progressive", 1.0, 200)], RATES, CONFIG)
    assert verdict_sentences(comparison) == []
