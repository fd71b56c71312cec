"""Laws of the adapters' own forward pass: it gives what peft's gives, and so do its gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from model_helpers import tiny
from prunetune.config import LoraSettings
from prunetune.model.sites import find_sites, tuned_linears
from prunetune.train.adapters import adapters, add_adapters

FAMILIES = ("llama", "qwen2", "gpt2")


def adapted(family: str, **settings: Any) -> Any:
    model = tiny(family)
    add_adapters(model, find_sites(model), LoraSettings(rank=3, **settings), seed=0)
    for name, weight in adapters(model).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_peft(family: str) -> None:
    ours = adapted(family)
    theirs = copy.deepcopy(ours)
    for name in tuned_linears(tiny(family)):
        del theirs.get_submodule(name).forward  # the class's own again
    tokens = torch.tensor([[1, 5, 6, 7, 3], [4, 4, 2, 9, 8]])
    for model in (ours, theirs):
        model(tokens).logits.square().mean().backward()
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-6)
    for name, weight in adapters(ours).items():
        torch.testing.assert_close(weight.grad, theirs.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_a_copy_computes_with_its_own_weights() -> None:
    model = adapted("llama")
    tokens = torch.tensor([[1, 5, 6, 7, 3]])
    before, other = model(tokens).logits, copy.deepcopy(model)
    for weight in adapters(other).values():
        weight.data.zero_()
    assert torch.equal(model(tokens).logits, before)
    assert not torch.allclose(other(tokens).logits, before)


def test_dropout_stays_with_peft() -> None:
    model = adapted("llama", dropout=0.5)
    assert not any("forward" in vars(model.get_submodule(name)) for name in tuned_linears(tiny("llama")))
