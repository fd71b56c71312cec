"""Laws of the monitor: scores are per token, and only limits and gains that nothing could meet are refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import from_mapping
from prunetune.cost.budget_limits import BudgetLimits
from prunetune.data.records import Record
from prunetune.errors import ConfigError, DataError
from prunetune.evaluation.results import Evaluation, Item, TaskResult
from prunetune.manifest import CutFacts, ValidationFacts
from prunetune.pipeline.monitor import ValidationMonitor, aggregate_scores, make_monitor, tuning_facts
from prunetune.pipeline.prepare import RunContext
from prunetune.plan import Plan
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import UnitKind, prunable_params
from prunetune.runs.folder import TUNING_STAGE, RunFolder
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.select import min_params
from prunetune.train.checkpoints import Checkpoints, TrainingState
from prunetune.train.parallel.ranks import SINGLE_PROCESS
from prunetune.train.schedule import build_schedule
from support.evaluation import characters, choice, speaker, text
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


def context_of(folder: Path, *limits: str, guard: int = 0, **options: Any) -> RunContext:
    """A run of 12 steps with cuts before the steps 0, 3 and 6; valid has three rows with choices."""
    recipe = {"train": {"steps": 12}, "search": {"cuts": 3, "span": 0.75}, "limits": list(limits)}
    config = from_mapping(merge_mappings(recipe, options))
    rows = tuple(choice(index) for index in range(3))
    context = SimpleNamespace(
        config=config, sites=SITES, dense_params=DENSE_PARAMS, ranks=SINGLE_PROCESS, base=None,
        folder=RunFolder(folder),
        splits=SimpleNamespace(valid=rows, guard=tuple(text(index) for index in range(guard))),
        encoded={"valid": SimpleNamespace(examples=rows)}, constraints=PlanConstraints(config.layout, align=8),
    )  # fmt: skip
    return cast("RunContext", context)


def monitor_of(folder: Path, *limits: str, **options: Any) -> ValidationMonitor:
    return make_monitor(context_of(folder, *limits, **options))


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


def test_scores_are_of_the_rows_that_there_are() -> None:
    model, choices, texts = speaker(), tuple(choice(index) for index in range(3)), (text(0), text(1))
    context = SimpleNamespace(config=from_mapping({}), tokenizer=characters(), device=torch.device("cpu"))

    def names_of(valid: tuple[Record, ...], guard: tuple[Record, ...]) -> set[str]:
        return set(ValidationMonitor(cast("RunContext", context), (), valid, guard).score(model))

    assert names_of((), ()) == set()
    assert names_of(choices, ()) == {"valid.accuracy"}
    assert names_of((), texts) == {"guard.nll", "guard.perplexity"}
    assert names_of(choices, choices) == {"valid.accuracy", "guard.accuracy", "guard.nll", "guard.perplexity"}


def test_limit_that_has_no_rows_to_score_is_refused(tmp_path: Path) -> None:
    context = context_of(tmp_path, "valid.nll <= 9 -> stop")
    context.encoded["valid"].examples = ()  # type: ignore[index]
    with pytest.raises(DataError, match="valid has no row, or none that fits"):
        make_monitor(context)
    with pytest.raises(DataError, match=r"guard\.accuracy needs rows with choices in data\.guard"):
        monitor_of(tmp_path, "guard.accuracy >= 0.5 -> stop", guard=3, data={"guard": ["x.jsonl"]})
    with pytest.raises(DataError, match=r"data\.guard has no row of its own"):
        monitor_of(tmp_path, data={"guard": ["x.jsonl"]})
    for context in (
        context_of(tmp_path, validate={"accuracy": True}),
        context_of(tmp_path, "valid.accuracy >= 0 -> stop"),
    ):
        context.splits.valid = (text(0),)  # type: ignore[misc]
        with pytest.raises(DataError, match="need rows with choices in valid"):
            make_monitor(context)


# -- facts for the manifest --------------------------------------------------------------------------------------------

DENSE = {"valid.nll": 2.0, "guard.nll": 4.0}
LAST = {"valid.nll": 2.5, "guard.nll": 4.4}
EVENT = {"step": 4, "gates": ["guard.nll <= 1.2x -> back-off"], "did": "back-off"}


def facts_of(
    folder: Path, *limits: str, constraints: PlanConstraints | None = None, seconds: float = 20.0, **changes: Any
) -> dict[str, Any]:
    """Facts of a run whose last checkpoint has half of its units, and was validated for 5 of 20 seconds."""
    given = {"budget": {"keep": 0.4}, "train": {"validate_every": 3}, "data": {"guard": ["x.jsonl"]}}
    context = context_of(folder, *limits, **given)
    if constraints is not None:
        context = cast("RunContext", SimpleNamespace(**{**vars(context), "constraints": constraints}))
    schedule = replace(build_schedule(context.config), allowed_keep=0.45).to_dict()
    history = {
        "dense": DENSE, "last": LAST, "schedule": schedule, "events": [EVENT], "stride": 2, "seconds": 5.0, **changes
    }  # fmt: skip
    half = Plan({s.name: tuple(range(s.units // 2)) for s in SITES}, {s.name: s.units for s in SITES})
    Checkpoints(context.folder.checkpoints).save(TrainingState(12, half, validation_history=history, seconds=seconds))
    return tuning_facts(context)


def test_facts_of_a_run_are_its_time_validations_and_limits(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, "guard.nll <= 1.2x -> back-off", "valid.nll <= 2.4 -> stop")
    assert facts["timings"] == {TUNING_STAGE: 20.0}
    assert facts["validation"] == ValidationFacts(every=6, seconds=5.0, share=0.25, dense=DENSE, last=LAST)
    guard, valid = facts["limits"].limits
    assert (guard.limit, guard.measured, guard.is_met) == (pytest.approx(4.8), 4.4, True)
    assert (valid.limit, valid.measured, valid.is_met) == (2.4, 2.5, False)
    assert [action.step for action in facts["limits"].actions] == [4]
    assert (facts["limits"].requested_keep, facts["limits"].allowed_keep) == (0.4, 0.45)
    assert facts["limits"].kept == pytest.approx(0.5)


def test_share_that_only_other_budgets_fix_counts_as_requested_unless_a_limit_raised_it(tmp_path: Path) -> None:
    others = PlanConstraints(limits=BudgetLimits(()))
    assert facts_of(tmp_path / "a", constraints=others)["limits"].requested_keep == 0.4
    assert facts_of(tmp_path / "b", constraints=others, events=[])["limits"].requested_keep == pytest.approx(0.5)
    assert facts_of(tmp_path / "c", events=[])["limits"].requested_keep == 0.4


def test_facts_count_the_longer_time_and_every_cut(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.update_manifest(timings={TUNING_STAGE: 30.0, "evaluation": 1.0})
    for record in ({"step": 1}, {"step": 3, "kept": 0.7, "widths": {}, "phase": "prune"}):
        folder.append_record("metrics.jsonl", record)
    facts = facts_of(tmp_path)
    assert facts["timings"] == {TUNING_STAGE: 30.0, "evaluation": 1.0}
    assert facts["validation"].share == pytest.approx(5 / 30)
    assert facts["cuts"] == (CutFacts(step=3, kept=0.7),)
    assert facts["limits"].limits == ()


def test_run_without_checkpoints_or_validations_has_fewer_facts(tmp_path: Path) -> None:
    assert tuning_facts(context_of(tmp_path)) == {}
    Checkpoints(RunFolder(tmp_path).checkpoints).save(TrainingState(3, seconds=2.0))
    assert tuning_facts(context_of(tmp_path)) == {"timings": {TUNING_STAGE: 2.0}}
    unmeasured = facts_of(tmp_path / "a", stride=0, seconds=0.0, last={})
    assert (unmeasured["validation"].every, unmeasured["validation"].share) == (3, None)


def test_decision_is_written_with_its_plan_by_the_first_rank_alone(tmp_path: Path) -> None:
    plan = Plan({"a": (0, 5)}, {"a": 6})
    monitor = monitor_of(tmp_path)
    monitor.record_decision({"step": 40, "valid.nll": 2.0}, plan)
    (file,) = (tmp_path / "decisions").iterdir()
    assert file.name == "step-0000040.json"
    units = {"a": {"units": 6, "mask": "21"}}
    assert json.loads(file.read_text()) == {"step": 40, "valid.nll": 2.0, "kept_units": units}
    other_rank = SimpleNamespace(**{**vars(monitor.context), "ranks": SimpleNamespace(is_main=False)})
    replace(monitor, context=cast("RunContext", other_rank)).record_decision({"step": 41}, plan)
    assert len(list((tmp_path / "decisions").iterdir())) == 1
