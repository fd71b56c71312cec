"""Laws of adapters: their initial values, cutting and expanding them, and the group lasso on them."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from prunetune.config.recipe import LoraSettings
from prunetune.pruning.masking import gates_from_plan
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import dense_plan
from prunetune.train import weight_trainer
from prunetune.train.adapters import (
    adapter_norms,
    add_adapters,
    cut_tensors,
    expand_tensors,
    trainable_parameters,
)
from prunetune.train.loop import tune_and_prune
from prunetune.train.losses import group_lasso
from support.loop import GENERATOR, AllCheckpoints, config_of, identical, job_of, tuned
from support.models import random_plan, tiny


def test_expanding_undoes_cutting_except_for_removed_units() -> None:
    model = tuned(tiny())
    sites, plan = find_sites(model), random_plan(tiny(), keep=0.4)
    state = {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}
    shapes = {name: tensor.shape for name, tensor in state.items()}
    small = cut_tensors(model, state, plan, sites)
    grown = expand_tensors(model, small, plan, sites)
    assert identical(cut_tensors(model, grown, plan, sites), small)
    assert {name: tensor.shape for name, tensor in grown.items()} == shapes
    gates = gates_from_plan(plan, sites)
    for site in sites:
        for cut in site.producers:
            name = f"{cut.module}.lora_B.default.weight"
            open_ = gates[site.name].repeat_interleave(cut.rows_per_unit)[:, None]
            assert torch.equal(grown[name], state[name] * open_)
        name = f"{site.consumer.module}.lora_A.default.weight"
        open_ = gates[site.name].repeat_interleave(site.consumer.rows_per_unit)
        assert torch.equal(grown[name], state[name] * open_)


def test_dense_plan_cuts_no_adapter() -> None:
    model = tuned(tiny())
    sites = find_sites(model)
    state = {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}
    assert identical(cut_tensors(model, state, dense_plan(sites), sites), state)
    assert identical(expand_tensors(model, state, dense_plan(sites), sites), state)


def test_new_adapters_change_no_output_and_follow_the_seed() -> None:
    model, ids = tiny(), torch.arange(3, 13)[None]
    before = model(ids).logits
    add_adapters(model, find_sites(model), config_of().lora, seed=5)
    assert torch.equal(model(ids).logits, before)
    torch.manual_seed(99)
    other = tiny(seed=9)
    add_adapters(other, find_sites(other), config_of().lora, seed=5)
    first, second = trainable_parameters(model), trainable_parameters(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(first) == 2 * 7 * 3


def test_group_lasso_equals_value_by_hand() -> None:
    """Each closed row of B and column of A has its own norm; the mean is over three groups a layer."""
    model = tuned(tiny("qwen3"))
    sites, plan = find_sites(model), random_plan(tiny("qwen3"), keep=0.4)
    weights = {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}
    total = 0.0
    for site in sites:
        for unit in set(range(site.units)) - set(plan.kept[site.name]):
            for cut in site.producers:
                for row in range(unit * cut.rows_per_unit, (unit + 1) * cut.rows_per_unit):
                    total += math.sqrt(float(weights[f"{cut.module}.lora_B.default.weight"][row].square().sum()))
            reads = site.consumer
            for column in range(unit * reads.rows_per_unit, (unit + 1) * reads.rows_per_unit):
                total += math.sqrt(float(weights[f"{reads.module}.lora_A.default.weight"][:, column].square().sum()))
    penalty = group_lasso(model, gates_from_plan(plan, sites), sites)
    assert float(penalty.detach()) == pytest.approx(total / (3 * 3), rel=1e-5)


def test_group_lasso_of_two_pieces_is_computed_by_hand() -> None:
    model = tuned(tiny("qwen3"))
    for parameter in trainable_parameters(model).values():
        parameter.data.zero_()
    sites = find_sites(tiny("qwen3"))
    site = next(site for site in sites if site.kind == "mlp")
    row = model.get_submodule(site.producers[0].module).lora_B["default"].weight.data[0]
    column = model.get_submodule(site.consumer.module).lora_A["default"].weight.data[:, 0]
    row[:2], column[0] = torch.tensor([3.0, 4.0]), 2.0  # norms 5 and 2, of one closed channel
    gates = {entry.name: torch.ones(entry.units) for entry in sites}
    gates[site.name][0] = 0
    penalty = group_lasso(model, gates, sites)
    assert float(penalty.detach()) == pytest.approx((5 + 2 + 1e-4) / 9, rel=1e-5)  # up's empty row counts 1e-4


def test_lasso_weight_rises_once_the_decision_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 0.03 to 100, the authors' numbers: the penalty's gradient is recorded."""
    job, weights = job_of(config_of(GENERATOR)), []

    def group_lasso(model: Any, gates: Any, sites: Any) -> Any:
        penalty = torch.zeros((), requires_grad=True)
        penalty.register_hook(lambda gradient: weights.append(round(float(gradient), 6)))
        return penalty

    monkeypatch.setattr(weight_trainer, "group_lasso", group_lasso)
    tune_and_prune(job)
    assert weights == [0.03] * job.schedule.search + [100] * (job.schedule.settle - job.schedule.search)
    assert weights


def test_group_lasso_has_no_gradient_at_open_units_and_is_smooth_at_zero() -> None:
    model = tuned(tiny())
    sites, plan = find_sites(model), random_plan(tiny(), keep=0.4)
    group_lasso(model, gates_from_plan(plan, sites), sites).backward()  # type: ignore[no-untyped-call]
    for site in sites:
        gradient = model.get_submodule(site.consumer.module).lora_A["default"].weight.grad
        moved = gradient.abs().sum(0).view(site.units, site.consumer.rows_per_unit).sum(1) > 0
        assert torch.equal(~moved, gates_from_plan(plan, sites)[site.name].bool())
    for parameter in trainable_parameters(model).values():
        parameter.data.zero_()
        parameter.grad = None
    group_lasso(model, gates_from_plan(plan, sites), sites).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainable_parameters(model).values())


def test_group_lasso_leaves_adapters_of_closed_blocks() -> None:
    sites = find_sites(tiny(), ["attention-blocks", "kv-groups", "query-heads", "mlp-blocks", "mlp-channels"])
    model = tuned(tiny())
    gates = {site.name: torch.ones(site.units) for site in sites}
    block = next(site for site in sites if site.kind == "mlp-blocks")
    channels, heads = (next(s for s in sites if s.kind == kind) for kind in ("mlp", "query-heads"))
    for site in (block, channels, next(site for site in sites if site.kind == "attention")):
        gates[site.name][0] = 0
    group_lasso(model, gates, sites).backward()  # type: ignore[no-untyped-call]
    for linear in channels.linears():
        for matrix in ("lora_A", "lora_B"):
            gradient = model.get_submodule(linear).get_submodule(matrix)["default"].weight.grad
            assert gradient is None or not gradient.any()
    (queries,) = heads.producers  # of a closed group, which is not gated with its adapters
    assert model.get_submodule(queries.module).lora_B["default"].weight.grad[: queries.rows_per_unit].any()


def test_settling_drives_adapters_of_removed_units_to_zero(tmp_path: Path) -> None:
    store = AllCheckpoints(tmp_path)
    changes = {"train": {"steps": 40}, "search": {"method": "generator", "share": 0.2, "settle": 0.75}}
    job = job_of(config_of(changes), store=store)
    plan = tune_and_prune(job)

    def mean_norms(step: int) -> tuple[float, float]:
        """Mean norm of removed units' and of kept units' adapters."""
        state = store.at(step).latest()
        assert state is not None
        assert not state.is_cut
        model = tiny()
        add_adapters(model, job.sites, job.config.lora, seed=0)
        for name, parameter in trainable_parameters(model).items():
            parameter.data = state.tensors["adapters"][name]
        norms = torch.cat([adapter_norms(model, site) for site in job.sites]).detach()
        gates = torch.cat([gates_from_plan(plan, job.sites)[site.name] for site in job.sites])
        return float(norms[gates == 0].mean()), float(norms[gates == 1].mean())

    removed_before, kept_before = mean_norms(job.schedule.search)
    removed_after, kept_after = mean_norms(job.schedule.settle)
    assert removed_after < 0.5 * removed_before
    assert removed_after / kept_after < 0.5 * removed_before / kept_before


def test_threads_add_adapters_at_the_same_time() -> None:
    """No state that modules share is changed during or after the call (peft patches torch to create empty weights)."""
    before = torch.nn.Module.register_parameter
    models, start = [tiny(seed=seed) for seed in range(4)], Barrier(4)

    def add(model: Any) -> None:
        start.wait()
        add_adapters(model, find_sites(model), LoraSettings(rank=2), seed=0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, models))
    assert torch.nn.Module.register_parameter is before
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"
    for model in models:
        assert all(
            weight.device.type == "cpu" and weight.dtype == torch.float32
            for weight in trainable_parameters(model).values()
        )
