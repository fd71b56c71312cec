"""Costs of a plan equal independent counts on the cut model, and never fall as more units are kept."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache

from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.budget_limits import costs_for_budget
from prunetune.cost.deployment import FlopsCost, MemoryCost, WeightsCost, total_cost
from prunetune.cost.layer_shapes import model_shape
from prunetune.errors import ConfigError
from prunetune.export.gguf.architectures import select_architecture
from prunetune.export.gguf.tensors import build_tensors
from prunetune.export.source import ExportSource
from prunetune.pruning.cut import cut
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import DEFAULT_UNITS
from support.data import subwords
from support.export import WIDE, plan_of, run_folder
from support.models import ALL_FAMILIES, FAMILIES, kinds_of, random_plan, tiny, tokens

WORKLOAD = WorkloadConfig(prompt=10, generate=3, batch=2, dtype="float32")
DERIVED = {family: {"head_dim": 12} for family in ("gpt_neox", "opt", "bloom")}  # what these make of 48 over 4 heads


def cases(family: str, **changes: Any) -> Any:
    """(shape, plan, cut model) of random plans: over default units, and over every prunable kind of the family."""
    for seed, units in enumerate((DEFAULT_UNITS, kinds_of(family))):
        model = tiny(family, layers=2, **DERIVED.get(family, {}), **changes)
        sites = find_sites(model, units)
        plan = random_plan(model, seed=seed, units=units)
        yield model_shape(model, sites), plan, cut(copy.deepcopy(model), plan, sites=sites)


def params(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_parameters_bytes_and_flops_equal_those_of_the_cut_model(family: str) -> None:
    for shape, plan, small in cases(family):
        counts = plan.widths()
        assert shape.params(counts) == params(small)
        assert total_cost(WeightsCost(shape, WORKLOAD), counts) == 4 * params(small)
        if not shape.is_mixture:
            assert total_cost(FlopsCost(shape, WORKLOAD), counts) == flops(small)


def flops(model: Any) -> int:
    """FLOPs of one request by PyTorch's counter, which does not know the CPU's fused attention."""
    model.set_attn_implementation("eager")
    cache, ids = DynamicCache(config=model.config), tokens(batch=1, length=WORKLOAD.prompt)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for _ in range(WORKLOAD.generate - 1):
            out = model(out.logits[:, -1].argmax(-1, keepdim=True), past_key_values=cache, use_cache=True)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_count_once(tied: bool) -> None:
    for shape, plan, small in cases("llama", tie_word_embeddings=tied):
        assert total_cost(WeightsCost(shape, WORKLOAD), plan.widths()) == 4 * params(small)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_cost_equals_bytes_of_weights_and_cache(family: str) -> None:
    for shape, plan, small in cases(family):
        cache = StaticCache(small.config, max_cache_len=WORKLOAD.cached_tokens)
        with torch.no_grad():
            small(tokens(batch=WORKLOAD.batch, length=WORKLOAD.prompt), past_key_values=cache, use_cache=True)
        layers = [layer for layer in cache.layers if layer.is_initialized]
        cost = total_cost(MemoryCost(shape, WORKLOAD), plan.widths())
        assert cost == 4 * params(small) + sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def test_sliding_window_caches_at_most_its_length() -> None:
    model = tiny("gemma3_text", layers=3)
    shape = model_shape(model, find_sites(model))
    assert [layer.sliding_window for layer in shape.layers.values()] == [8, 8, 0]
    long, longer = (
        total_cost(MemoryCost(shape, dataclasses.replace(WORKLOAD, context=tokens)), shape.dense_counts())
        for tokens in (100, 200)
    )
    assert longer - long == 100 * 2 * 2 * 8 * WORKLOAD.batch * 4  # key and value, KV heads, rows: of the last layer


@pytest.mark.parametrize("weights", ["int8", "int4", "q8_0"])
def test_quantised_bytes_equal_those_of_the_linears(weights: Any) -> None:
    """The expected bytes are summed over the linears of the cut model."""
    workload = dataclasses.replace(WORKLOAD, weights=weights, dtype="bfloat16")

    def row(columns: int) -> float:
        if weights == "int8":
            return columns + 5  # a float32 and an int8
        if weights == "int4":
            return columns * 4.5 / 8 if columns % 64 == 0 else 2 * columns
        return columns * 34 / 32 if columns % 32 == 0 else 2 * columns

    for shape, plan, small in cases("qwen2", hidden_size=64, intermediate_size=192, head_dim=32):
        linears = {
            name: module
            for name, module in small.named_modules()
            if isinstance(module, torch.nn.Linear) and (weights == "q8_0" or name != "lm_head")
        }
        matrices = [module.weight for module in linears.values()]
        if weights == "q8_0":
            matrices.append(small.get_input_embeddings().weight)
        expected = sum(matrix.shape[0] * row(matrix.shape[1]) for matrix in matrices)
        others = params(small) - sum(matrix.numel() for matrix in matrices)
        assert total_cost(WeightsCost(shape, workload), plan.widths()) == expected + others * (
            4 if weights == "q8_0" else 2
        )


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_q8_0_bytes_equal_those_of_a_gguf_file(layout: str, tmp_path: Path) -> None:
    model = tiny("llama", **WIDE)
    plan = plan_of(model, 1, 64)
    folder, _ = run_folder(tmp_path / "run", subwords(), layout=layout, plan=plan)
    source = ExportSource.open(folder)
    written = sum(tensor.nbytes for tensor in build_tensors(source, select_architecture(source), "q8_0"))
    workload = dataclasses.replace(WORKLOAD, weights="q8_0")
    assert total_cost(WeightsCost(model_shape(model, find_sites(model)), workload), plan.widths()) == written


@pytest.mark.parametrize("kind", ["flops", "memory", "file"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_more_units_never_cost_less(kind: str, family: str) -> None:
    model = tiny(family)
    sites = find_sites(model)
    shape = model_shape(model, sites)
    (cost,) = costs_for_budget(kind, shape, WORKLOAD)
    counts = dict.fromkeys(shape.dense_counts(), 0)
    before = total_cost(cost, counts)
    for site in sites:
        for units in range(1, site.units + 1):
            counts[site.name] = units
            after = total_cost(cost, counts)
            assert after > before
            before = after


def test_mixtures_are_refused_by_costs_that_do_not_count_them() -> None:
    model = tiny("mixtral")
    shape = model_shape(model, find_sites(model))
    with pytest.raises(ConfigError, match=r"budget\.memory"):
        FlopsCost(shape, WORKLOAD)
    with pytest.raises(ConfigError, match="plain"):
        WeightsCost(shape, dataclasses.replace(WORKLOAD, weights="q8_0"))


@pytest.mark.parametrize("window", [0, 1, 7, 12, 40])
def test_attention_counts_the_tokens_that_each_step_sees(window: int) -> None:
    shape = model_shape(model := tiny(layers=1), find_sites(model, DEFAULT_UNITS))
    layers = {0: dataclasses.replace(shape.layers[0], sliding_window=window)}
    workload = WorkloadConfig(prompt=9, generate=12)
    cost = FlopsCost(dataclasses.replace(shape, layers=layers), workload)
    steps = [min(window or length, length) for length in range(10, 21)]
    assert cost._attention_pairs == {window: 81 + sum(steps)}


@pytest.mark.timeout(60)
def test_many_tokens_are_counted_at_once() -> None:
    sites = find_sites(model := tiny(layers=1), DEFAULT_UNITS)
    cost = FlopsCost(model_shape(model, sites), WorkloadConfig(generate=10**12))
    assert cost.layer_cost(0, {site.name: site.units for site in sites}) > 1e24
