"""The page of a check: reference, limits and paired differences are on it, and it shows only what may be shown."""

from __future__ import annotations

import re

import pytest

from prunetune.errors import HIDDEN
from prunetune.evaluation.results import Evaluation, Item, Score, TaskResult
from prunetune.evaluation.suites import parse_suite
from prunetune.evaluation.suites.check import CheckResult, check_limits
from prunetune.report.check_page import render_check_page
from prunetune.utils.redaction import SHOW_ALL, Redaction
from support.page import ATTACK, Outline, steering


def answers(right: str, text: str = "ask") -> TaskResult:
    """One item for each letter: "1" is right, "0" is wrong."""
    items = tuple(
        Item(
            f"i{number}",
            f"{text} {number}",
            "yes",
            "yes" if sign == "1" else "no",
            sign == "1",
            {"accuracy": int(sign)},
        )
        for number, sign in enumerate(right)
    )
    return TaskResult("t", {"accuracy": Score(right.count("1") / len(right), 0.1, len(right))}, items)


def checked(
    mine: str, theirs: str, *, text: str = "ask", redaction: Redaction = SHOW_ALL, **limits: float
) -> CheckResult:
    suite = parse_suite({"tasks": {"t": {"data": "x.jsonl", "scorer": "accuracy", "limits": limits}}})
    scored = [Evaluation({"t": answers(right, text)}).redacted(redaction) for right in (mine, theirs)]
    return check_limits(scored[0], scored[1], suite, redaction)


@pytest.mark.parametrize(
    ("drop", "verdict", "result"), [(0.6, "The limit holds", "✓ holds"), (0.1, "1 of 1 limits broken", "✗ broken")]
)
def test_page_says_the_verdict_and_the_paired_difference(drop: float, verdict: str, result: str) -> None:
    page = render_check_page(checked("10010000", "11011100", drop=drop), "runs/new", "suite.yaml")
    assert f"<h1>{verdict}</h1>" in page
    assert result in page
    assert "<td>−0.375" in page  # three of eight lost: sd of (0 0 0 -1 ...) over the root of 8
    assert re.search(r"−0\.375 <span class=\"se\">± 0\.183</span>", page)
    assert page.count('<article class="card sample lost">') == 3


def test_page_of_a_check_without_a_reference_says_what_was_not_judged() -> None:
    suite = parse_suite({"tasks": {"t": {"data": "x.jsonl", "scorer": "accuracy", "limits": {"drop": 0.1}}}})
    page = render_check_page(check_limits(Evaluation({"t": answers("10")}), None, suite), "m", "suite.yaml")
    assert "<h1>No limit; 1 task could not be judged</h1>" in page
    assert "needs a reference" in page


def test_page_loads_nothing_and_escapes_what_is_of_others() -> None:
    page = render_check_page(checked("10010000", "11011100", text=ATTACK, drop=0.1), ATTACK, ATTACK)
    outline = Outline(page)
    assert not {tag for tag, _ in outline.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not [name for _, attrs in outline.tags for name in attrs if name.startswith("on")]
    assert all(target.startswith("#") for target in outline.attributes("href"))
    assert "default-src 'none'" in page
    assert not steering(page)


def test_page_of_hidden_rows_counts_failures_only() -> None:
    page = render_check_page(
        checked("10010000", "11011100", text="Mrs Miller", redaction=Redaction(samples=False), drop=0.1), "m", "s"
    )
    assert "3 new failures; rows are not shown" in page
    assert "Miller" not in page
    assert HIDDEN not in page
