"""Laws of the monitor: scores are per token, and only limits and gains that nothing could meet are refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import from_mapping
from prunetune.cost.parameters import prunable_params
from prunetune.errors import ConfigError
from prunetune.evaluation.results import Evaluation, Item, TaskResult
from prunetune.pipeline.monitor import ValidationMonitor, aggregate_scores, make_monitor
from prunetune.pipeline.prepare import RunContext
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import UnitKind
from prunetune.runs.folder import RunFolder
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.select import min_params
from prunetune.train.parallel.ranks import SINGLE_PROCESS
from support.evaluation import choice, text
from support.models import tiny

MODEL = tiny()
SITES = find_sites(MODEL)
DENSE_PARAMS = sum(parameter.numel() for parameter in MODEL.parameters())


def evaluation_of(*scores: dict[str, float]) -> Evaluation:
    items = [Item(f"i{index}", "", "", "", None, values) for index, values in enumerate(scores)]
    return Evaluation({"a": TaskResult("a", {}, tuple(items[::2])), "b": TaskResult("b", {}, tuple(items[1::2]))})


def test_nll_of_several_items_is_per_token() -> None:
    scores = aggregate_scores(evaluation_of({"nll": 1.0, "tokens": 1.0}, {"nll": 4.0, "tokens": 3.0}))
    assert scores == pytest.approx({"nll": 3.25, "perplexity": math.exp(3.25)})


def test_choices_give_accuracy_and_leave_nll_to_the_other_items() -> None:
    right, wrong = ({"accuracy": value, "nll": 9.0, "tokens": 5.0} for value in (1.0, 0.0))
    mixed = aggregate_scores(evaluation_of(right, wrong, right, {"nll": 2.0, "tokens": 4.0}))
    assert mixed == pytest.approx({"accuracy": 2 / 3, "nll": 2.0, "perplexity": math.exp(2.0)})
    alone = aggregate_scores(evaluation_of(right, {**wrong, "nll": 3.0, "tokens": 10.0}))
    assert alone == pytest.approx({"accuracy": 0.5, "nll": 5.0, "perplexity": math.exp(5.0)})


def monitor_of(folder: Path, *limits: str, guard: int = 0, **options: Any) -> ValidationMonitor:
    """The monitor of a run of 12 steps with cuts before the steps 0, 3 and 6; valid has three rows with choices."""
    recipe = {"train": {"steps": 12}, "search": {"cuts": 3, "span": 0.75}, "limits": list(limits)}
    config = from_mapping(merge_mappings(recipe, options))
    rows = tuple(choice(index) for index in range(3))
    context = SimpleNamespace(
        config=config, sites=SITES, dense_params=DENSE_PARAMS, ranks=SINGLE_PROCESS, folder=RunFolder(folder),
        splits=SimpleNamespace(valid=rows, guard=tuple(text(index) for index in range(guard))),
        encoded={"valid": SimpleNamespace(examples=rows)}, constraints=PlanConstraints(config.layout, align=8),
    )  # fmt: skip
    return make_monitor(cast("RunContext", context))


def test_first_validation_may_come_with_the_last_decision_and_no_later(tmp_path: Path) -> None:
    limit = "valid.nll <= 9 -> roll-back"
    monitor_of(tmp_path, limit, train={"validate_every": 6})
    with pytest.raises(ConfigError, match=r"before the last decision at step 6.*validate_every \(7\)"):
        monitor_of(tmp_path, limit, train={"validate_every": 7})
    monitor_of(tmp_path, "valid.nll <= 9 -> stop", train={"validate_every": 7})
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    monitor_of(tmp_path, limit, train={"validate_every": 7})  # a resumed run was checked when it began


@pytest.mark.parametrize(("layout", "layers"), [("per-layer", 1), ("uniform", 3)])
def test_gain_is_refused_where_no_plan_of_the_budget_reaches_it(layout: str, layers: int, tmp_path: Path) -> None:
    """A plan keeps up to its largest block less than it may; a uniform one has this block in every layer."""
    keep, prunable = 0.6, prunable_params(SITES)
    block = layers * max(site.unit_params * (8 if site.kind is UnitKind.MLP_CHANNEL else 1) for site in SITES)
    reachable = (prunable - keep * prunable + block) / DENSE_PARAMS
    options: dict[str, Any] = {"layout": layout, "budget": {"keep": keep}}
    monitor_of(tmp_path, require={"smaller": reachable - 1e-6}, **options)
    with pytest.raises(ConfigError, match=rf"under budget\.keep 0\.6 at most {reachable:.1%} of all parameters"):
        monitor_of(tmp_path, require={"smaller": reachable + 1e-3}, **options)


def test_gain_beyond_the_smallest_plan_is_refused(tmp_path: Path) -> None:
    smallest = min_params(SITES, PlanConstraints("per-layer", 8))
    reachable, unprunable = (
        (prunable_params(SITES) - smallest) / DENSE_PARAMS,
        1 - prunable_params(SITES) / DENSE_PARAMS,
    )
    options: dict[str, Any] = {"budget": {"keep": smallest / prunable_params(SITES)}}
    monitor_of(tmp_path, require={"smaller": reachable - 1e-6}, **options)
    with pytest.raises(ConfigError, match=rf"at most {reachable:.1%} .*\({unprunable:.0%} are embeddings"):
        monitor_of(tmp_path, require={"smaller": reachable + 1e-3}, **options)


def test_rows_are_scored_where_they_are_wanted(tmp_path: Path) -> None:
    plain = monitor_of(tmp_path)
    assert (plain.choice_rows, plain.guard_rows, plain.needs_dense_scores) == ((), (), False)
    for monitor in (
        monitor_of(tmp_path, validate={"accuracy": True}),
        monitor_of(tmp_path, "valid.accuracy >= 0.1 -> stop"),
    ):
        assert {row.id for row in monitor.choice_rows} == {"c0", "c1", "c2"}
        assert monitor.needs_dense_scores
    guarded = monitor_of(tmp_path, guard=5, validate={"limit": 2})
    assert (len(guarded.guard_rows), guarded.choice_rows, guarded.needs_dense_scores) == (2, (), True)
    assert monitor_of(tmp_path, "valid.nll <= 9 -> stop").needs_dense_scores
