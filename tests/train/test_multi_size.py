"""Laws of a smaller size of a run: it starts from the tuned weights of the larger one, cut further."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from prunetune.pruning.masking import masked
from prunetune.pruning.nf4 import has_nf4_linears, quantize_linears_to_nf4
from prunetune.train.adapters import add_adapters, load_into_dense, trains_all_weights
from prunetune.train.loop import tune_and_prune
from prunetune.train.losses import mean_loss
from support.loop import identical, losses, weights_of
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
    load_into_dense(dense, state, job.sites, job.config.train)
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
    state = larger("all", "llama")
    half = tiny("llama").to(torch.bfloat16)
    job = smaller(state, "all", "llama")
    add_adapters(half, job.sites, job.config.lora, seed=0)
    load_into_dense(half, state, job.sites, job.config.train)
    again = tiny("llama")
    load_into_dense(again, state, job.sites, job.config.train)
    assert trains_all_weights(job.config.train, job.sites)
    grown = {name: tensor for name, tensor in again.state_dict().items() if name in state.tensors["adapters"]}
    weights = {
        name: half.get_submodule(name.removesuffix(".weight")).get_parameter("base_layer.weight") for name in grown
    }
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert identical(grown, weights)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("wrapped", [True, False])
def test_tuned_weights_replace_four_bit_ones(wrapped: bool) -> None:
    """4-bit weights are dequantised anew at each read, so values written into them are lost."""
    state, whole, packed = larger("all", "llama"), tiny("llama"), tiny("llama")
    job = smaller(state, "all", "llama")
    quantize_linears_to_nf4(packed, job.sites, dtype=torch.float32, device=torch.device("cpu"))
    for model in (whole, packed):
        if wrapped:
            add_adapters(model, job.sites, job.config.lora, seed=0)
        load_into_dense(model, state, job.sites, job.config.train)
    assert not has_nf4_linears(packed)
    assert identical(dict(whole.named_parameters()), dict(packed.named_parameters()))
