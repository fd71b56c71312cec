"""Plans: they round-trip through JSON to the byte, and anything else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prunetune import Plan
from prunetune.errors import PlanError
from prunetune.plan import FORMAT
from support.models import random_plan, tiny

SITE = "model.layers.0.mlp"


@pytest.mark.parametrize("seed", range(5))
def test_round_trip_is_stable_to_the_byte(seed: int, tmp_path: Path) -> None:
    plan = random_plan(tiny(), seed=seed)
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text
    assert list(Plan.from_json(text).kept) == list(plan.kept)
    (tmp_path / "plan.json").write_text(text)
    assert Plan.load(tmp_path / "plan.json") == plan


def test_plan_may_keep_no_unit_of_a_site() -> None:
    plan = Plan({SITE: ()}, {SITE: 4})
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.widths() == {SITE: 0}


def test_widths_count_kept_units() -> None:
    assert Plan({"a": (0, 2), "b": (1,)}, {"a": 3, "b": 2}).widths() == {"a": 2, "b": 1}


@pytest.mark.parametrize("kept", [(1, 0), (0, 0), (-1, 0), (0, 4), (4,), (-1,)])
def test_kept_units_must_ascend_within_range(kept: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match=r"model\.layers\.0\.mlp.*0\.\.3"):
        Plan({SITE: kept}, {SITE: 4})


def test_every_site_needs_kept_units_and_a_unit_count() -> None:
    with pytest.raises(PlanError, match="b only once"):
        Plan({"a": (0,)}, {"a": 1, "b": 1})
    with pytest.raises(PlanError, match="b only once"):
        Plan({"a": (0,), "b": (0,)}, {"a": 1})


def text_with(**changes: Any) -> str:
    good = {"format": FORMAT, "sites": {SITE: {"units": 4, "kept": [0, 2]}}}
    return json.dumps(good | changes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        text_with(format="prunetune-plan-9"),
        text_with(sites=None),
        text_with(sites=[SITE]),
        text_with(sites={SITE: {"units": 4}}),
        text_with(sites={SITE: {"kept": [0]}}),
        text_with(sites={SITE: {"units": "many", "kept": [0]}}),
        text_with(sites={SITE: {"units": 4, "kept": 0}}),
        text_with(sites={SITE: {"units": 4, "kept": ["x"]}}),
        text_with(sites={SITE: {"units": 4, "kept": [2, 0]}}),
        text_with(sites={SITE: {"units": 4, "kept": [0, 4]}}),
    ],
)
def test_text_that_is_no_plan_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(PlanError) as refused:
        Plan.from_json(text)
    assert "\n" not in str(refused.value)
