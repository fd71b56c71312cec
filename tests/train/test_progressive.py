"""Laws of every cut of progressive removal: masked equals cut, plans nest, momentum stays, a resumed run is exact."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from prunetune.config.quantities import Amount
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.budget_limits import make_budget_limits
from prunetune.cost.layer_shapes import model_shape
from prunetune.errors import RunFolderError
from prunetune.plan import Plan
from prunetune.pruning.masking import gates_from_plan, masked
from prunetune.pruning.units import DEFAULT_UNITS, dense_plan, kept_params, prunable_params
from prunetune.search.select import select, with_limits
from prunetune.train import loop
from prunetune.train.adapters import trainable_parameters
from prunetune.train.checkpoints import TrainingState, optimizer_tensors
from prunetune.train.job import TrainingJob
from prunetune.train.loop import tune_and_prune
from prunetune.train.losses import mean_loss
from prunetune.train.schedule import build_schedule
from prunetune.train.weight_trainer import WeightTrainer
from support.loop import KEEP, MemoryStore, config_of, identical, job_of, losses, weights_of
from support.models import random_plan, tiny

BLOCKS = ("attention-blocks", "mlp-blocks", "kv-groups", "mlp-channels")
QUERIES = ("kv-groups", "query-heads", "mlp-channels")
EXPERTS = ("kv-groups", "experts", "expert-channels")
HIDDEN = ("hidden-channels", "kv-groups", "mlp-channels")
CASES: list[tuple[str, tuple[str, ...], str, str]] = [
    ("llama", DEFAULT_UNITS, "per-layer", "all"),
    ("llama", DEFAULT_UNITS, "per-layer", "adapters"),
    ("gpt2", DEFAULT_UNITS, "uniform", "all"),
    ("phi3", DEFAULT_UNITS, "uniform", "adapters"),
    ("llama", ("layers", *DEFAULT_UNITS), "per-layer", "all"),
    ("qwen2", ("layers", *DEFAULT_UNITS), "uniform", "adapters"),
    ("gemma3_text", BLOCKS, "per-layer", "adapters"),
    ("qwen3", QUERIES, "per-layer", "all"),
    ("llama", QUERIES, "uniform", "adapters"),
    ("qwen3_moe", EXPERTS, "per-layer", "all"),
    ("mixtral", EXPERTS, "uniform", "adapters"),
    ("llama", HIDDEN, "uniform", "all"),
    ("gemma2", ("hidden-channels", *BLOCKS), "per-layer", "all"),
    ("gemma3_text", HIDDEN, "per-layer", "adapters"),
    ("qwen2_moe", ("hidden-channels", *EXPERTS), "per-layer", "all"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join((case[0], case[1][0], *case[2:])))
CHANGES: dict[str, Any] = {"train": {"steps": 8, "weights_rate": 1e-2}, "search": {"cuts": 3, "span": 0.75}}
CUTS = (0, 2, 4)  # the steps before which such a run is cut


@dataclass
class ObservedCut:
    """A cut of a run, with what the model was before it and after it."""

    step: int
    plan: Plan
    masked_loss: float  # of the model before, masked by the plan
    cut_loss: float
    moments: tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclass
class ObservedRun:
    """A run of the loop, its cuts and all of its states."""

    job: TrainingJob
    plan: Plan
    cuts: list[ObservedCut]
    states: dict[int, TrainingState]


def observed(job: TrainingJob) -> ObservedRun:
    """Run the job, and look at the model around every cut."""
    cuts: list[ObservedCut] = []
    cut, expected = WeightTrainer.cut, list[float]()

    def loss() -> float:
        return mean_loss(job.model, job.valid_examples, job.pad_id, 10_000)

    def moments(trainer: WeightTrainer) -> dict[str, Tensor]:
        named = optimizer_tensors(trainer.optimizer, list(trainable_parameters(job.model)))
        return {name: tensor.clone() for name, tensor in named.items()}

    def cut_observed(trainer: WeightTrainer, plan: Plan, steps: int) -> None:
        cut_layers = trainer.cut_layers

        def cut_layers_observed(relative: Plan, sites: Any, before: Plan | None) -> None:
            with masked(job.model, gates_from_plan(relative, sites), sites=sites):
                expected.append(loss())
            cut_layers(relative, sites, before)

        before, step = moments(trainer), len(job.observer.steps)  # type: ignore[attr-defined]
        with mock.patch.object(trainer, "cut_layers", cut_layers_observed):
            cut(trainer, plan, steps)
        cuts.append(ObservedCut(step, plan, expected[-1], loss(), (before, moments(trainer))))

    store = MemoryStore()
    with mock.patch.object(WeightTrainer, "cut", cut_observed):
        plan = tune_and_prune(replace(job, checkpoints=store))
    return ObservedRun(job, plan, cuts, store.states)


def job_of_case(case: tuple[str, tuple[str, ...], str, str], **changes: Any) -> TrainingJob:
    family, units, layout, weights = case
    train = {**CHANGES["train"], "weights": weights}
    config = config_of({**CHANGES, "train": train, "layout": layout, **changes})
    job = job_of(config, model=tiny(family, groups=3, layers=4), units=units)
    if "hidden-channels" not in units:
        return job
    # A random model's channels are not worth removing, so others may lose no more than a third.
    return replace(job, constraints=replace(job.constraints, min_share=0.6))


@cache
def run_of_case(case: tuple[str, tuple[str, ...], str, str]) -> ObservedRun:
    return observed(job_of_case(case))


# -- every cut ---------------------------------------------------------------------------------------------------------


@every_case
def test_masked_model_has_the_loss_of_the_cut_one_at_every_cut(case: Any) -> None:
    run = run_of_case(case)
    assert [cut.step for cut in run.cuts] == list(CUTS)
    for cut in run.cuts:
        assert cut.cut_loss == pytest.approx(cut.masked_loss, rel=1e-5), cut.step


@every_case
def test_plans_nest_and_each_is_within_its_budget(case: Any) -> None:
    run, larger = run_of_case(case), dense_plan(run_of_case(case).job.sites)
    total = prunable_params(run.job.sites)
    for cut, keep in zip(run.cuts, (1 - 0.4 / 3, 1 - 0.8 / 3, KEEP), strict=True):
        assert all(set(kept) <= set(larger.kept[name]) for name, kept in cut.plan.kept.items())
        assert kept_params(run.job.sites, cut.plan) <= keep * total * (1 + 1e-9)
        larger = cut.plan
    assert run.plan == larger
    if case[1] == HIDDEN:
        assert len(run.plan.kept["model:hidden-channels"]) < 48
    assert kept_params(run.job.sites, run.plan) < total
    if run.job.constraints.layout == "uniform":
        widths = {(site.kind, len(run.plan.kept[site.name])) for site in run.job.sites if run.plan.kept[site.name]}
        assert len(widths) == len({kind for kind, _ in widths})


@every_case
def test_every_plan_is_the_one_of_the_highest_scores(case: Any) -> None:
    """So it is maximal, as `select` is: see its own laws."""
    scored: list[Any] = []

    def score(*arguments: Any) -> Any:
        scored.append(score_units(*arguments))
        return scored[-1]

    score_units, job = loop.score_units, job_of_case(case)
    with mock.patch.object(loop, "score_units", score):
        run = observed(job)
    assert run.plan == run_of_case(case).plan, "the same seed decides the same"
    larger: Plan | None = None
    for cut, scores in zip(run.cuts, scored, strict=True):
        share = (CUTS.index(cut.step) + 1) / 3
        assert cut.plan == select(scores, job.sites, 1 - share * (1 - KEEP), job.constraints, larger_plan=larger)
        larger = cut.plan
        for site in job.sites:  # of the dense model's units, zero for those that are gone
            assert scores[site.name].shape == (site.units,)


@every_case
def test_moments_of_what_is_kept_are_carried_over_every_cut(case: Any) -> None:
    run = run_of_case(case)
    for cut in run.cuts[1:]:
        before, after = cut.moments
        assert after, "of every weight that is left"
        assert after.keys() <= before.keys()
        for name, moment in after.items():
            kept = before[name]
            while kept.shape != moment.shape:  # rows or columns that are left, in their order
                dim = next(dim for dim in range(kept.dim()) if kept.shape[dim] != moment.shape[dim])
                kept = rows_of(kept, moment, dim)
            assert torch.equal(kept, moment), name
    named = trainable_parameters(run.job.model)
    without = set(named) - {name.partition("#")[0] for name in run.cuts[-1].moments[1]}
    assert all("norm" in name for name in without), "norms are tuned from the first cut of hidden channels on"


def rows_of(larger: Tensor, smaller: Tensor, dim: int) -> Tensor:
    """The slices of a tensor along an axis, in order, that also hold the first column or row of the smaller one."""
    columns = larger.movedim(dim, 0).flatten(1).sort(1).values
    wanted = smaller.movedim(dim, 0).flatten(1)
    index, at = [], 0
    for row in wanted:
        while not torch.isin(row, columns[at]).all():
            at += 1
        index.append(at)
        at += 1
    return larger.index_select(dim, torch.tensor(index))


def test_momentum_over_a_cut_is_that_of_the_kept_columns_and_rows() -> None:
    run = run_of_case(CASES[0])
    first, second = (cut.plan for cut in run.cuts[:2])
    before, after = run.cuts[1].moments
    assert not run.cuts[0].moments[0], "nothing was tuned before the first cut"
    changed = 0
    for layer in range(4):
        mlp = f"model.layers.{layer}.mlp"
        position = [first.kept[mlp].index(unit) for unit in second.kept[mlp]]
        for name, kept in (
            (f"{mlp}.down_proj.weight#momentum", before[f"{mlp}.down_proj.weight#momentum"][:, position]),
            (f"{mlp}.up_proj.weight#momentum", before[f"{mlp}.up_proj.weight#momentum"][position]),
        ):
            assert kept.any()
            assert torch.equal(after[name], kept)
        changed += len(first.kept[mlp]) - len(second.kept[mlp])
    assert changed > 0


# -- resuming ----------------------------------------------------------------------------------------------------------

RUNS: list[tuple[int, float, tuple[int, ...], Any]] = [  # steps, span, steps after which the run is resumed, case
    (4, 0.2, (1, 2, 3), CASES[0]),
    (4, 0.2, (1, 2, 3), CASES[10]),
    (12, 0.5, (1, 2, 3, 4, 5, 8), CASES[1]),
    (12, 0.5, (1, 3, 4), CASES[4]),
    (12, 0.5, (1, 3, 4), CASES[7]),
    (12, 0.5, (1, 3, 4), CASES[11]),
    (12, 0.5, (1, 3, 4), CASES[13]),
    (20, 0.5, (2, 3, 5, 6, 7, 8, 19), CASES[0]),
]


@pytest.mark.parametrize(("steps", "span", "stops", "case"), RUNS)
def test_run_resumed_before_between_and_after_cuts_equals_the_uninterrupted_one(
    steps: int, span: float, stops: tuple[int, ...], case: Any
) -> None:
    train = {**CHANGES["train"], "weights": case[3], "steps": steps}
    job_anew = partial(
        job_of_case, case, train=train, search={"cuts": 4, "span": span}, lora={"rank": 4, "dropout": 0.1}
    )
    whole = observed(job_anew())
    assert [cut.step for cut in whole.cuts] == [int(steps * max(span, 4 / steps)) * index // 4 for index in range(4)]
    weights, records = weights_of(whole.job), whole.job.observer.steps  # type: ignore[attr-defined]
    for stop in stops:
        store = MemoryStore(whole.states[stop])
        job = replace(job_anew(), checkpoints=store)
        assert tune_and_prune(job) == whole.plan
        assert identical(weights_of(job), weights), stop
        for step, state in store.states.items():
            expected = whole.states[step]
            assert (state.plan, state.is_cut, state.guard_state) == (
                expected.plan,
                expected.is_cut,
                expected.guard_state,
            )
            assert all(identical(tensors, expected.tensors[name]) for name, tensors in state.tensors.items())
        timed = ("seconds", "tokens_per_s")
        assert (
            [
                {name: value for name, value in record.items() if name not in timed}
                for record in job.observer.steps  # type: ignore[attr-defined]
            ]
            == [{name: value for name, value in record.items() if name not in timed} for record in records[stop:]]
        )


def test_norms_before_removed_blocks_are_tuned_without_a_gradient() -> None:
    """A plan that removes a layer, blocks and channels at once: the loop runs, and resumes to the same weights."""
    units = ("hidden-channels", "layers", *BLOCKS)
    model = tiny("gemma2", layers=6)
    plan = random_plan(model, units=units, seed=2)
    gone = {name.partition(":")[2] for name, kept in plan.kept.items() if not kept}
    assert {"layers", "attention-blocks", "mlp-blocks"} <= gone
    config = config_of({"train": {"steps": 4, "weights": "all", "weights_rate": 1e-2}})
    whole = observed(job_of(config, model=model, plan=plan, units=units))
    assert whole.cuts[0].cut_loss == pytest.approx(whole.cuts[0].masked_loss, rel=1e-5)
    job = replace(
        job_of(config, model=tiny("gemma2", layers=6), plan=plan, units=units),
        checkpoints=MemoryStore(whole.states[2]),
    )
    tune_and_prune(job)
    assert identical(weights_of(job), weights_of(whole.job))
    assert any("input_layernorm" in name for name in weights_of(job))


# -- budgets of other kinds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flops", "memory"])
def test_budget_of_another_kind_is_met_by_the_last_cut_and_not_before(kind: str) -> None:
    job = job_of_case(CASES[0])
    (budget,) = make_budget_limits({kind: Amount(0.8, True)}, model_shape(job.model, job.sites), WorkloadConfig())
    constraints = with_limits(job.constraints, job.sites, [budget], 1.0)
    assert constraints.limits is not None
    config = replace(job.config, budget=replace(job.config.budget, keep=constraints.limits.feasible_keep))
    run = observed(replace(job, config=config, constraints=constraints, schedule=build_schedule(config)))
    costs = [budget.cost(cut.plan.widths()) for cut in run.cuts]
    for cost, progress in zip(costs, (1 / 3, 2 / 3, 1.0), strict=True):
        assert 0.98 * budget.limit_at(progress) < cost <= budget.limit_at(progress) * (1 + 1e-9)
    assert costs[-1] <= budget.limit * (1 + 1e-9) < costs[-2] < costs[0]


# -- sizes -----------------------------------------------------------------------------------------------------------


def test_state_to_branch_off_is_saved_and_changes_nothing() -> None:
    case, branch = CASES[0], MemoryStore()
    job = replace(job_of_case(case), branch_checkpoints=branch)
    run, plain = observed(job), run_of_case(case)
    assert identical(weights_of(run.job), weights_of(plain.job))
    assert losses(run.job) == losses(plain.job)
    assert list(branch.states) == [job.schedule.branch_step] == [6]
    state = branch.states[6]
    assert state.plan == run.plan
    smaller = job_of_case(case, budget={"keep": 0.4, "align": 8}, search={"cuts": 2, "span": 0.5})
    smaller = replace(smaller, start_state=state, schedule=replace(smaller.schedule, start_keep=KEEP))
    second = observed(smaller)
    assert identical(second.cuts[0].moments[0], state.tensors["adapter_optimizer"])
    assert [cut.step for cut in second.cuts] == [0, 2]
    for cut, keep in zip(second.cuts, (0.5, 0.4), strict=True):
        assert all(set(kept) <= set(state.plan.kept[name]) for name, kept in cut.plan.kept.items())
        assert kept_params(job.sites, cut.plan) <= keep * prunable_params(job.sites)
        assert cut.cut_loss == pytest.approx(cut.masked_loss, rel=1e-5)


# -- checkpoints of version 0.1.0 --------------------------------------------------------------------------------------

OLD_SCHEDULE = {"search": 4, "settle": 5, "steps": 8, "anneal": 3, "keep": 0.6}


@pytest.mark.parametrize("is_cut", [True, False])
def test_run_of_version_010_is_refused(is_cut: bool) -> None:
    state = run_of_case(CASES[0]).states[6]
    history = {**state.validation_history, "schedule": OLD_SCHEDULE}
    old = replace(state, is_cut=is_cut, plan=state.plan if is_cut else None, validation_history=history)
    with pytest.raises(RunFolderError, match=r"begun by version 0\.1, .* start anew with --out$") as refused:
        tune_and_prune(replace(job_of_case(CASES[0]), checkpoints=MemoryStore(old)))
    assert "\n" not in str(refused.value)
