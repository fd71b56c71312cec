"""Laws of a smaller size of a run: it starts from the tuned weights of the larger one, cut further."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from prunetune.pruning.masking import masked
from prunetune.train.adapters import add_adapters
from prunetune.train.loop import tune_and_prune
from prunetune.train.losses import mean_loss
from support.loop import load_into_dense, losses, weights_of
from support.models import tiny
from support.multi_size import larger, smaller

both = pytest.mark.parametrize("weights", ["all", "adapters"])
families = pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])


@both
@families
def test_first_step_of_a_smaller_size_has_the_tuned_weights_cut_further(weights: str, family: str) -> None:
    state = larger(weights, family)
    job = smaller(state, weights, family)
    plan = tune_and_prune(job)
    assert plan != state.plan
    dense = tiny(family)
    if weights == "adapters":
        add_adapters(dense, job.sites, job.config.lora, seed=9)
    load_into_dense(dense, state, job.sites)
    with masked(dense, plan, sites=job.sites):
        expected = mean_loss(dense, job.train_stream.batch_at(0), job.pad_id, job.config.train.micro_tokens)
    assert losses(job)[0] == pytest.approx(expected, rel=1e-5)
    assert [record["phase"] for record in job.observer.steps] == ["tune"] * 3  # type: ignore[attr-defined]


@both
def test_smaller_size_without_steps_is_a_slice_of_the_larger(weights: str) -> None:
    """At a learning rate near zero, each weight is that of the larger size at the kept rows and columns."""
    state = larger(weights, "llama")
    still: dict[str, Any] = {"learning_rate": 1e-30, "weights_rate": 1e-30}
    job = smaller(state, weights, "llama", cuts=3, **still)
    plan = tune_and_prune(job)
    assert state.plan is not None
    adapters = state.tensors["adapters"]
    for name, weight in weights_of(job).items():
        index = [
            [
                index_in_larger
                for index_in_larger, unit in enumerate(state.plan.kept[site.name])
                if unit in set(plan.kept[site.name])
            ]
            for site in job.sites
            if name.startswith(f"{site.name}.") and "down_proj" in name and "lora_B" not in name
        ]
        if index:
            assert torch.equal(weight, adapters[name][:, index[0]])


def test_smaller_size_starts_from_float32_weights() -> None:
    """Also where the base is in 16 bits, in which small updates would be lost."""
    still: dict[str, Any] = {"learning_rate": 1e-30, "weights_rate": 1e-30}
    job = smaller(larger("all", "llama"), "all", "llama", **still)
    tune_and_prune(replace(job, model=job.model.to(torch.bfloat16)))
    for weight in weights_of(job).values():
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, weight.bfloat16().float())
