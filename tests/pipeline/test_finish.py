"""Laws of the end of a run: a large model, merged weight by weight, is the one that is merged as a whole."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from prunetune.config.recipe import from_mapping
from prunetune.pipeline.finish import _open_streamed, _weight_merger, check_tokens
from prunetune.pipeline.prepare import RunContext
from prunetune.pruning.cut import cut, merge_adapters
from prunetune.pruning.sites import find_sites
from prunetune.train.adapters import add_adapters, trainable_parameters
from prunetune.train.checkpoints import TrainingState
from support.models import random_plan, tiny


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 stores its matrices transposed
@pytest.mark.parametrize("alpha", [0, 3])  # 0: twice the rank
def test_weights_merged_one_by_one_are_those_merged_at_once(family: str, alpha: int) -> None:
    model = tiny(family)
    dense, sites, plan = copy.deepcopy(model), find_sites(model), random_plan(model)
    config = from_mapping({"lora": {"rank": 4, "alpha": alpha}})
    add_adapters(model, sites, config.lora, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    adapters = {name: weight.detach().clone() for name, weight in trainable_parameters(model).items()}
    state = TrainingState(plan=plan, tensors={"adapters": adapters})
    context = cast("RunContext", SimpleNamespace(config=config, sites=sites))
    merge = _weight_merger(dense, context, state)
    merge_adapters(model)
    at_once = dict(model.named_parameters())
    changed = 0
    for name, weight in dense.named_parameters():
        merged = merge(name, weight.detach().clone())
        torch.testing.assert_close(merged, at_once[name].detach())
        changed += not torch.equal(merged, weight)
    assert changed == len(adapters) // 2


def test_adapters_of_a_cut_model_are_merged_into_the_units_that_it_keeps() -> None:
    model = tiny()
    dense, sites, plan = copy.deepcopy(model), find_sites(model), random_plan(model)
    config = from_mapping({"lora": {"rank": 4, "alpha": 3}})
    add_adapters(model, sites, config.lora, seed=0)
    pruned = cut(model, plan, sites=sites)
    for name, parameter in pruned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    adapters = {name: weight.detach().clone() for name, weight in trainable_parameters(pruned).items()}
    state = TrainingState(plan=plan, is_cut=True, tensors={"adapters": adapters})
    merge = _weight_merger(dense, cast("RunContext", SimpleNamespace(config=config, sites=sites)), state)
    for name, weight in dense.named_parameters():
        weight.data = merge(name, weight.detach().clone())
    merge_adapters(pruned)
    expected = dict(pruned.named_parameters())
    for name, merged in cut(dense, plan, sites=sites).named_parameters():
        torch.testing.assert_close(merged, expected[name])


@pytest.mark.parametrize(("family", "opens"), [("llama", True), ("mixtral", False)])  # mixtral: expert by expert
def test_model_is_cut_layer_by_layer_if_its_files_use_the_names_of_its_class(
    family: str, opens: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    context = SimpleNamespace(config=from_mapping({"model": str(tmp_path)}), sites=find_sites(model))
    state = TrainingState(plan=random_plan(model), tensors={"adapters": {}})
    streamed = _open_streamed(cast("RunContext", context), state)
    assert (streamed is not None) == opens
    assert ("cut as a whole" in caplog.text) != opens


def test_check_takes_four_rows_of_equal_length_up_to_64_tokens() -> None:
    def tokens_of(*lengths: int) -> Any:
        examples = [SimpleNamespace(token_ids=tuple(range(length))) for length in lengths]
        return check_tokens(cast("RunContext", SimpleNamespace(encoded={"test": SimpleNamespace(examples=examples)})))

    assert tokens_of(70, 9, 30).tolist() == [list(range(9))] * 3
    assert tokens_of(*[80] * 9).shape == (4, 64)
