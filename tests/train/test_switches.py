"""Laws of the options between the paper's method and its ablations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping, load_recipe
from prunetune.cost.parameters import prunable_params
from prunetune.data import packing
from prunetune.pruning.masking import gates_from_plan, masked
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import kept_params
from prunetune.search.decision_generator import FreeLogits, build_generator
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.searcher import Searcher
from prunetune.train.adapters import adapter_group_norms, soft_threshold, trainable_parameters
from prunetune.train.loop import tune_and_prune
from prunetune.train.losses import TrainingLoss, accumulate_gradients
from prunetune.train.passes import PackedPasses, PaddedPasses
from prunetune.train.schedule import build_schedule
from support.loop import KEEP, AllCheckpoints, config_of, examples, identical, job_of, losses, weights_of
from support.models import random_plan, tiny, with_lora
from support.passes import assert_same, gradients

ROOT = Path(__file__).parents[2]
VARIANTS = yaml.safe_load((ROOT / "benchmarks" / "quality" / "paper.yaml").read_text(encoding="utf-8"))
PAPER: dict[str, Any] = {
    "search": {"gates": "sampled", "init_batches": 0, "share": 0.5, "settle": 0.5, "generator": "gru"},
    "train": {"warmup": 0.0, "decay": "constant"},
}
SWITCHES: dict[str, dict[str, Any]] = {
    "paper": {},
    "joint": {"step": "joint"},
    "free logits": {"generator": "none"},
    "not LoRA-aware": {"lora_aware": False},
    "proximal": {"sparsity": "proximal", "lasso": 1.0},
    "no sparsity": {"sparsity": "off"},
    "soft": {"straight_through": False},
    "joint, soft, gated": {"step": "joint", "straight_through": False, "lora_aware": False},
    "joint, projected": {"step": "joint", "gates": "projected"},
    "soft, projected": {"straight_through": False, "gates": "projected"},
}


def config_with(name: str) -> RunConfig:
    return config_of(merge_mappings(PAPER, {"search": SWITCHES[name]}))


def steps_of(job: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = job.observer.steps
    return steps


# -- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SWITCHES)
def test_option_ends_on_budget_and_is_reproducible(name: str) -> None:
    first, second = job_of(config_with(name)), job_of(config_with(name))
    torch.manual_seed(1)
    plan = tune_and_prune(first)
    torch.manual_seed(2)
    assert tune_and_prune(second) == plan
    assert (
        (KEEP - 0.15) * prunable_params(first.sites)
        < kept_params(first.sites, plan)
        <= KEEP * prunable_params(first.sites)
    )
    assert all(math.isfinite(loss) for loss in losses(first))
    assert losses(first) == losses(second)
    assert identical(weights_of(first), weights_of(second))


@pytest.mark.parametrize("name", [name for name in SWITCHES if name != "paper"])
def test_option_changes_losses(name: str) -> None:
    paper, changed = job_of(config_with("paper")), job_of(config_with(name))
    tune_and_prune(paper)
    tune_and_prune(changed)
    assert losses(paper) != losses(changed)


@pytest.mark.parametrize("name", SWITCHES)
def test_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    config, every = config_with(name), AllCheckpoints(tmp_path)
    whole = job_of(config, store=every)
    plan = tune_and_prune(whole)
    for step in (2, 5, 7):
        resumed = job_of(config, store=every.at(step))
        assert tune_and_prune(resumed) == plan
        assert identical(weights_of(resumed), weights_of(whole)), step
        assert losses(resumed) == losses(whole)[step:]


def test_records_hold_search_loss_and_sparsity() -> None:
    for name, search, lasso in (("paper", True, True), ("joint", False, True), ("no sparsity", True, False)):
        job = job_of(config_with(name))
        tune_and_prune(job)
        assert any("search_loss" in record for record in steps_of(job)) == search
        assert any("lasso" in record for record in steps_of(job)) == lasso
        assert all("ratio_loss" in record for record in steps_of(job) if record["phase"] == "search")


# -- the paper's recipe ----------------------------------------------------------------------------------------------


def test_paper_recipe_cuts_at_the_last_step() -> None:
    schedule = build_schedule(load_recipe(ROOT / "recipes" / "paper.yaml"))
    assert (schedule.search, schedule.settle, schedule.steps) == (750, 1500, 1500)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_ablation_is_a_valid_recipe(name: str) -> None:
    changes = {key: value for key, value in VARIANTS[name].items() if key != "dense"}
    base = load_recipe(ROOT / "recipes" / "paper.yaml")
    assert (load_recipe(ROOT / "recipes" / "paper.yaml", changes) == base) == (not changes)


def test_off_in_yaml_needs_no_quotes() -> None:
    for text in ("search: {sparsity: off}", "search: {sparsity: 'off'}"):
        assert from_mapping(yaml.safe_load(text)).search.sparsity == "off"


# -- one backward pass for adapters and gates -------------------------------------------------------------------------


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("micro_tokens", [10_000, 25])
def test_joint_pass_equals_both_passes(
    micro_tokens: int, soft: bool, aware: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters get the gradients of `tune`. Gates get those of `gate_gradients` if `lora_aware` is off.

    The LoRA-aware forward is another function of the gates.
    """
    monkeypatch.setattr(packing, "TOKEN_STEP", 32)
    monkeypatch.setattr(packing, "LABEL_STEP", 32)
    model = tiny()
    sites, gates = find_sites(model), gates_from_plan(random_plan(model), find_sites(model))
    if soft:
        gates = {name: 0.2 + 0.5 * gate for name, gate in gates.items()}
    model.requires_grad_(False)
    with_lora(model)
    config = from_mapping({"train": {"micro_tokens": micro_tokens}, "search": {"lora_aware": aware}})
    results = []
    for kind in (PaddedPasses, PackedPasses):
        passes: Any = kind(model, sites, 0, config)
        loss, gate_gradients = passes.tune_with_gate_gradients(examples(), gates)
        learnt = gradients(model)
        assert loss == pytest.approx(passes.tune(examples(), gates), rel=1e-5)
        assert_same(gradients(model), learnt)
        others = passes.gate_gradients(examples(), gates)[1]
        if aware:
            assert any(not torch.allclose(gate_gradients[name], others[name], rtol=1e-2) for name in gate_gradients)
        else:
            assert_same(others, gate_gradients)
        results.append((loss, gate_gradients, learnt))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert_same(results[0][1], results[1][1])
    assert_same(results[0][2], results[1][2])


def test_joint_pass_adds_to_gradients_and_does_not_change_gates() -> None:
    model = tiny()
    sites, gates = find_sites(model), gates_from_plan(random_plan(model), find_sites(model))
    model.requires_grad_(False)
    passes = PaddedPasses(with_lora(model), sites, 0, config_of())
    passes.tune_with_gate_gradients(examples(), gates)
    once = {
        name: parameter.grad.clone()
        for name, parameter in trainable_parameters(model).items()
        if parameter.grad is not None
    }
    passes.tune_with_gate_gradients(examples(), gates)
    assert_same({name: 2 * value for name, value in once.items()}, gradients(model))
    assert all(gate.grad is None and not gate.requires_grad for gate in gates.values())


# -- the other switches ----------------------------------------------------------------------------------------------


def test_gated_adapters_have_the_gradients_of_the_cut_model() -> None:
    model = tiny()
    sites, gates = find_sites(model), gates_from_plan(random_plan(model), find_sites(model))
    model.requires_grad_(False)
    with_lora(model)
    results: dict[str, tuple[float, dict[str, Tensor]]] = {}
    for form in ("free", "gated"):
        with masked(model, gates, adapters=form, sites=sites):  # type: ignore[arg-type]
            loss = accumulate_gradients(model, examples(), 0, 10_000, TrainingLoss({"answer": 1.0}))["loss"]
        results[form] = loss, gradients(model)
    for aware, form in ((True, "free"), (False, "gated")):
        config = from_mapping({"search": {"lora_aware": aware}})
        loss, learnt = PaddedPasses(model, sites, 0, config).tune(examples(), gates)["loss"], gradients(model)
        assert loss == pytest.approx(results[form][0])
        assert_same(results[form][1], learnt)
    assert results["free"][0] != pytest.approx(results["gated"][0])


def test_free_logits_have_no_network() -> None:
    sites = find_sites(tiny())
    free = build_generator(sites, kind="none", seed=0)
    assert isinstance(free, FreeLogits)
    assert sum(parameter.numel() for parameter in free.parameters()) == sum(site.units for site in sites)
    logits = free()
    assert {name: len(value) for name, value in logits.items()} == {site.name: site.units for site in sites}
    assert all(not value.any() for value in logits.values())
    torch.cat(list(logits.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in free.parameters() if p.grad is not None)
    assert all(parameter.grad is not None for parameter in free.parameters())


@pytest.mark.parametrize("gates", ["sampled", "projected"])
def test_soft_gates_have_the_gradient_of_hard_ones(gates: str) -> None:
    sites = find_sites(tiny())
    drawn, gate_gradients = [], []
    for hard in (True, False):
        config = config_of({"search": {"straight_through": hard, "gates": gates}})
        searcher = Searcher(sites, PlanConstraints(align=8), config, lambda step: KEEP, torch.device("cpu"))
        sample = searcher.sample(3)
        weights = torch.linspace(-1, 1, sum(site.units for site in sites))
        (torch.cat(list(sample.values())) @ weights).backward()  # type: ignore[no-untyped-call]
        drawn.append(torch.cat(list(sample.values())).detach())
        gate_gradients.append(
            {name: p.grad.clone() for name, p in searcher.generator.named_parameters() if p.grad is not None}
        )
        decided = torch.cat(list(searcher.last_gates.values()))
        assert ((decided == 0) | (decided == 1)).all()
        if hard:
            torch.testing.assert_close(drawn[0], decided)
    assert_same(*gate_gradients)
    assert ((drawn[1] > 0.01) & (drawn[1] < 0.99)).any()


def test_joint_step_decides_its_sample() -> None:
    sites = find_sites(tiny())
    for step, same in (("joint", True), ("alternate", False)):
        config = config_of({"search": {"step": step, "gates": "sampled", "offset": 0.0}})
        searcher = Searcher(sites, PlanConstraints(align=8), config, lambda step: KEEP, torch.device("cpu"))
        sample, decided = searcher.sample(3), searcher.decide(3).gates
        assert all(torch.equal(sample[name].round(), decided[name]) for name in decided) == same


# -- the proximal step -----------------------------------------------------------------------------------------------


def test_soft_threshold_equals_value_by_hand() -> None:
    model = with_lora(tiny("qwen3"))
    sites = find_sites(tiny("qwen3"))
    site = next(site for site in sites if site.kind == "mlp")
    for cut in site.producers:
        model.get_submodule(cut.module).lora_B["default"].weight.data.zero_()
    columns = model.get_submodule(site.consumer.module).lora_A["default"].weight.data
    columns.zero_()
    first = model.get_submodule(site.producers[0].module).lora_B["default"].weight.data
    first[0, 0], columns[0, 0] = 3.0, 4.0  # unit 0: norm 5
    first[1, 0] = 0.5  # unit 1: norm below the threshold
    first[2, 0] = 3.0  # unit 2: open
    gates = {name: torch.ones(entry.units) for name, entry in ((entry.name, entry) for entry in sites)}
    gates[site.name][:2] = 0
    soft_threshold(model, gates, sites, 1.0)
    assert (float(first[0, 0]), float(columns[0, 0])) == pytest.approx((3 * 0.8, 4 * 0.8))  # 1 - 1/5
    assert float(first[1, 0]) == 0
    assert float(first[2, 0]) == 3.0


@pytest.mark.parametrize("threshold", [0.0, 1e-3, 0.5, 100.0])
def test_closed_norms_fall_by_the_threshold_and_open_units_keep_every_bit(threshold: float) -> None:
    model = with_lora(tiny())
    sites = find_sites(tiny())
    gates = gates_from_plan(random_plan(tiny(), keep=0.4), sites)
    parts = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    before = {site.name: adapter_group_norms(model, site).detach() for site in sites}
    soft_threshold(model, gates, sites, threshold)
    for site in sites:
        after, closed = adapter_group_norms(model, site).detach(), gates[site.name] == 0
        assert torch.equal(after[~closed], before[site.name][~closed])
        assert (after <= before[site.name] * (1 + 1e-6)).all()
        expected = (before[site.name][closed] - threshold).clamp(min=0)
        torch.testing.assert_close(after[closed], expected, rtol=1e-4, atol=2e-6)
        for cut in site.producers:
            name = f"{cut.module}.lora_B.default.weight"
            stays = gates[site.name].repeat_interleave(cut.rows_per_unit) == 1
            assert torch.equal(trainable_parameters(model)[name].detach()[stays], parts[name][stays])
            assert torch.equal(
                trainable_parameters(model)[f"{cut.module}.lora_A.default.weight"],
                parts[f"{cut.module}.lora_A.default.weight"],
            )


def test_proximal_steps_drive_removed_units_to_zero() -> None:
    sums = {}
    for name, changes in (("off", {"sparsity": "off"}), ("proximal", {"sparsity": "proximal", "lasso": 20.0})):
        sums_by_step: dict[int, float] = {}

        class NormRecordingStore:
            def save(self, state: Any) -> None:
                if state.plan is not None and not state.is_cut:
                    model = tiny()
                    gates = gates_from_plan(state.plan, find_sites(model))
                    sites = find_sites(model)
                    with_lora(model)
                    for key, parameter in trainable_parameters(model).items():
                        parameter.data = state.tensors["adapters"][key].clone()
                    norms = [(adapter_group_norms(model, s) * (1 - gates[s.name])).sum() for s in sites]
                    sums_by_step[state.step] = float(torch.stack(norms).sum().detach())  # noqa: B023

            def latest(self) -> None:
                return None

        tune_and_prune(job_of(config_of(merge_mappings(PAPER, {"search": changes})), store=NormRecordingStore()))
        sums[name] = sums_by_step[max(sums_by_step)]
    assert sums["proximal"] < 0.5 * sums["off"]
