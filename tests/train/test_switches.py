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
from prunetune.pruning.masking import gates_from_plan, masked
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import kept_params, prunable_params
from prunetune.train.loop import tune_and_prune
from prunetune.train.passes import PaddedPasses
from prunetune.train.schedule import build_schedule
from support.loop import KEEP, AllCheckpoints, config_of, examples, identical, job_of, losses, weights_of
from support.models import random_plan, tiny, with_lora
from support.passes import assert_same, gradients

ROOT = Path(__file__).parents[2]
VARIANTS = yaml.safe_load((ROOT / "benchmarks" / "quality" / "paper.yaml").read_text(encoding="utf-8"))
PAPER: dict[str, Any] = {
    "search": {"method": "generator", "share": 0.5, "settle": 0.5, "offset": 0.0},  # so that few steps close units
    "train": {"warmup": 0.0, "decay": "constant"},
    "lora": {"dropout": 0.1},
}
SWITCHES: dict[str, dict[str, Any]] = {
    "paper": {},
    "no sparsity": {"sparsity": "off"},
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
    for name, lasso in (("paper", True), ("no sparsity", False)):
        job = job_of(config_with(name))
        tune_and_prune(job)
        assert any("lasso" in record for record in steps_of(job)) == lasso
        for record in steps_of(job):
            assert ("search_loss" in record) == ("ratio_loss" in record) == (record["phase"] == "search")


# -- the paper's recipe ----------------------------------------------------------------------------------------------


def test_paper_recipe_cuts_at_the_last_step() -> None:
    schedule = build_schedule(load_recipe(ROOT / "recipes" / "paper.yaml"))
    assert (schedule.search, schedule.settle, schedule.steps) == (750, 1500, 1500)


def test_paper_recipe_has_the_numbers_of_the_authors_code() -> None:
    config = load_recipe(ROOT / "recipes" / "paper.yaml")
    search, lora, train = config.search, config.lora, config.train
    assert train.steps / 2 * train.batch_size == 15_000
    assert (train.learning_rate, train.decay, train.warmup, train.weight_decay, train.clip) == (
        1e-4, "constant", 0, 0.01, 1.0,
    )  # fmt: skip
    assert (lora.rank, lora.alpha / lora.rank, lora.dropout) == (8, 1, 0.1)
    assert (search.temperature, search.offset, search.ratio_weight, search.learning_rate) == (0.4, 3, 5, 1e-3)
    assert (search.batch_size, search.sparsity) == (20, "lasso")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_ablation_is_a_valid_recipe(name: str) -> None:
    changes = {key: value for key, value in VARIANTS[name].items() if key != "dense"}
    base = load_recipe(ROOT / "recipes" / "paper.yaml")
    assert (load_recipe(ROOT / "recipes" / "paper.yaml", changes) == base) == (not changes)


def test_off_in_yaml_needs_no_quotes() -> None:
    for text in ("search: {sparsity: off}", "search: {sparsity: 'off'}"):
        assert from_mapping(yaml.safe_load(text)).search.sparsity == "off"


def test_adapters_are_tuned_with_their_own_branch_open() -> None:
    """y = gate * (W x) + B A x: the loss of the cut model, in which both branches are gated, is another."""
    model = tiny()
    sites, gates = find_sites(model), gates_from_plan(random_plan(model), find_sites(model))
    model.requires_grad_(False)
    with_lora(model)
    results: dict[str, tuple[float, dict[str, Tensor]]] = {}
    for form in ("free", "gated"):
        with masked(model, gates, adapters=form, sites=sites):  # type: ignore[arg-type]
            loss = PaddedPasses(model, sites, 0, config_of()).tune(examples(), None)["loss"]
        results[form] = loss, gradients(model)
    loss, learnt = PaddedPasses(model, sites, 0, config_of()).tune(examples(), gates)["loss"], gradients(model)
    assert loss == pytest.approx(results["free"][0])
    assert_same(results["free"][1], learnt)
    assert results["free"][0] != pytest.approx(results["gated"][0])
