"""Laws of tuning all weights: merging changes no loss, every linear of the cut model is tuned, and expands to dense."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prunetune.config.fields import merge_mappings
from prunetune.pipeline.prepare import resolve_auto
from prunetune.pruning.masking import masked
from prunetune.pruning.sites import find_sites, lora_target_modules
from prunetune.pruning.units import Site, kept_params, prunable_params
from prunetune.train.loop import tune_and_prune
from prunetune.train.schedule import learning_rate
from support.loop import GENERATOR, KEEP, MemoryStore, config_of, job_of, load_into_dense, losses, weights_of
from support.models import tiny

ALL = {"train": {"weights": "all", "weights_rate": 3e-3}}
WHOLE_FAMILIES = ["llama", "qwen2", "phi3", "gpt2", "gpt_neox"]


@pytest.mark.parametrize("family", WHOLE_FAMILIES)
def test_weights_all_tunes_every_linear_of_the_cut_model(family: str) -> None:
    job = job_of(config_of(ALL | (GENERATOR if family == "llama" else {})), family=family)
    dense = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    plan = tune_and_prune(job)
    tuned = weights_of(job)
    assert not any("lora" in name for name, _ in job.model.named_parameters())
    assert set(tuned) == {f"{name}.weight" for name in lora_target_modules(tiny(family))} & set(job.model.state_dict())
    assert kept_params(job.sites, plan) <= KEEP * prunable_params(job.sites)
    others = {name: tensor for name, tensor in job.model.state_dict().items() if name not in tuned}
    assert all(tensor.shape != dense[name].shape or torch.equal(tensor, dense[name]) for name, tensor in others.items())
    rates = [record["lr"] for record in job.observer.steps]  # type: ignore[attr-defined]
    first = job.schedule.cuts[0].step  # adapters before it
    expected = [learning_rate(step, job.config.train, 3e-3 if step >= first else None) for step in range(10)]
    assert rates == expected


@pytest.mark.parametrize("method", ["progressive", "generator"])
@pytest.mark.parametrize("family", WHOLE_FAMILIES)
def test_merging_at_the_cut_changes_no_loss(family: str, method: str) -> None:
    changes = {"train": {"steps": 8}, "search": {"method": method, "settle": 0.475}}
    first, second = (
        job_of(config_of(merge_mappings(changes, {"train": {"weights": kind}})), family=family)
        for kind in ("all", "adapters")
    )
    for job in (first, second):
        tune_and_prune(job)
    at = first.schedule.cuts[0].step  # the first step after it has seen no update yet
    assert at == (7 if method == "generator" else 0)
    assert losses(first)[:at] == losses(second)[:at]
    assert losses(first)[at] == pytest.approx(losses(second)[at], rel=1e-5)


@pytest.mark.parametrize("family", WHOLE_FAMILIES)
def test_expanded_weights_under_gates_equal_the_cut_model(family: str) -> None:
    store = MemoryStore()
    job = job_of(config_of(ALL), family=family, store=store)
    plan = tune_and_prune(job)
    dense, state = tiny(family), store.latest()
    assert state is not None
    load_into_dense(dense, state, job.sites)
    tokens = torch.tensor([[1, 5, 6, 7, 3]])
    with torch.no_grad(), masked(dense, plan, sites=job.sites):
        expected = dense(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(job.model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_large_models_tune_adapters_unless_weights_is_all() -> None:
    sites = find_sites(tiny("llama"))
    large = tuple(replace(site, unit_params=10**9) for site in sites)

    def decided(weights: str, sites: tuple[Site, ...]) -> str:
        return resolve_auto(config_of({"train": {"weights": weights}}), sites).train.weights

    assert (decided("auto", sites), decided("auto", large)) == ("all", "adapters")
    assert decided("all", large) == "all"
    assert decided("adapters", sites) == "adapters"
