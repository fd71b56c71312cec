"""Masked equals cut, for every family, ratio of heads, bias and tied embedding, with and without adapters."""

from __future__ import annotations

import pytest
import torch

from prunetune import Plan, cut, find_sites, masked
from prunetune.errors import PlanError, UnknownArchitecture
from prunetune.pruning.cut import cut_linears
from prunetune.pruning.masking import gates_from_plan
from prunetune.pruning.sites import unprunable_kinds
from prunetune.pruning.units import dense_plan, kept_params
from prunetune.train.adapters import (
    adapter_norms,
    cut_tensors,
    expand_tensors,
    trainable_parameters,
)
from support.models import ALL_FAMILIES, random_plan, relative, tiny, tokens, with_lora

TOLERANCE = 1e-5


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_masking_equals_cutting(family: str, tied: bool, lora: bool) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    if lora:
        with_lora(model)
    plan = random_plan(model)
    with torch.no_grad():
        with masked(model, plan):
            expected = model(tokens()).logits
        dense = model(tokens()).logits
        logits = cut(model, plan)(tokens()).logits
    assert relative(logits, expected) <= TOLERANCE
    assert relative(dense, expected) > 0.01, "the plan must matter"


def test_norms_over_several_heads_make_attention_unprunable() -> None:
    assert set(unprunable_kinds(tiny("cohere", use_qk_norm=True))) == {"attention"}
    assert not unprunable_kinds(tiny("cohere"))
    assert {site.kind for site in find_sites(tiny("olmo2"))} == {"mlp"}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_cut_adapters_expand_to_the_dense_shape_again(family: str) -> None:
    model = with_lora(tiny(family))
    sites, plan = find_sites(model), random_plan(model)
    before = {name: weight.detach().clone() for name, weight in trainable_parameters(model).items()}
    small = cut_tensors(model, before, plan, sites)
    cut_linears(model, plan)
    assert set(small) == set(trainable_parameters(model))
    assert all(torch.equal(weight, small[name]) for name, weight in trainable_parameters(model).items())
    grown = expand_tensors(tiny(family), small, plan, sites)
    again = cut_tensors(model, grown, plan, sites)
    assert all(torch.equal(again[name], weight) for name, weight in small.items())


@pytest.mark.parametrize("family", ["llama", "phi3", "glm4"])
def test_adapter_norms_add_up_a_units_rows_and_columns(family: str) -> None:
    model = with_lora(tiny(family))
    for site in find_sites(model):
        norms = adapter_norms(model, site).detach()
        for unit in (0, site.units - 1):
            total = 0.0
            for producer in site.producers:
                rows = producer.indices([unit], site.units)
                total += float(
                    model.get_submodule(producer.module).lora_B["default"].weight.data[rows].norm(dim=1).sum()
                )
            columns = site.consumer.indices([unit], site.units)
            weight = model.get_submodule(site.consumer.module).lora_A["default"].weight.data
            total += float(weight[:, columns].norm(dim=0).sum())
            assert float(norms[unit]) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(("groups", "ratio"), [(6, 1), (3, 2), (2, 3), (3, 4), (2, 8)])
def test_masking_equals_cutting_for_every_grouping_of_query_heads(groups: int, ratio: int) -> None:
    model = with_lora(tiny("qwen3", groups=groups, ratio=ratio))
    plan = random_plan(model, seed=groups)
    with torch.no_grad():
        with masked(model, plan):
            expected = model(tokens()).logits
        logits = cut(model, plan)(tokens()).logits
    assert relative(logits, expected) <= TOLERANCE


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}])
def test_masking_equals_cutting_with_biases(changes: dict[str, bool]) -> None:
    model = with_lora(tiny("llama", **changes))
    plan = random_plan(model)
    with torch.no_grad():
        with masked(model, plan):
            expected = model(tokens()).logits
        logits = cut(model, plan)(tokens()).logits
    assert relative(logits, expected) <= TOLERANCE


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_removed_parameters_are_those_counted(family: str) -> None:
    model = tiny(family)
    plan = random_plan(model)
    sites = find_sites(model)
    before = sum(p.numel() for p in model.parameters())
    after = sum(p.numel() for p in cut(model, plan).parameters())
    # q/k norms of a layer without attention leave too, though they are no unit's.
    norms = sum(
        sum(p.numel() for name, p in tiny(family).get_submodule(site.name).named_parameters() if "norm" in name)
        for site in sites
        if not plan.kept[site.name]
    )
    assert before - after == kept_params(sites, dense_plan(sites)) - kept_params(sites, plan) + norms


def test_layer_without_attention_generates_with_its_cache() -> None:
    model = tiny("llama")
    plan = random_plan(model)
    bare = "model.layers.1.self_attn"
    plan = Plan({**plan.kept, bare: ()}, plan.units)
    with torch.no_grad(), masked(model, plan):
        expected = model(tokens()).logits
    cut(model, plan)
    with torch.no_grad():
        assert relative(model(tokens()).logits, expected) <= TOLERANCE
        cached = model(tokens()[:, :-1], use_cache=True).past_key_values
        last = model(tokens()[:, -1:], past_key_values=cached).logits
    assert relative(last, expected[:, -1:]) <= TOLERANCE


def test_cut_linears_keeps_adapters() -> None:
    model = with_lora(tiny("mistral"))
    plan = random_plan(model)
    with torch.no_grad():
        with masked(model, plan):
            expected = model(tokens()).logits
        cut_linears(model, plan)
        assert any("lora_A" in name for name, _ in model.named_parameters())
        assert relative(model(tokens()).logits, expected) <= TOLERANCE


def test_only_free_adapters_get_gradients_of_a_removed_unit() -> None:
    model = with_lora(tiny("llama"))
    plan = random_plan(model)
    off = next(unit for unit in range(96) if unit not in plan.kept["model.layers.0.mlp"])
    weight = model.get_submodule("model.layers.0.mlp.up_proj").lora_B["default"].weight
    for kind, has_gradient in (("free", True), ("gated", False)):
        model.zero_grad()
        with masked(model, plan, adapters=kind):
            model(tokens()).logits.square().sum().backward()
        assert bool(weight.grad[off].abs().sum() > 0) is has_gradient


def test_free_and_gated_adapters_agree_where_adapters_are_zero() -> None:
    model = with_lora(tiny("qwen2"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    plan = random_plan(model)
    with torch.no_grad():
        with masked(model, plan, adapters="gated"):
            gated = model(tokens()).logits
        with masked(model, plan, adapters="free"):
            free = model(tokens()).logits
    assert relative(free, gated) <= TOLERANCE


def test_masked_removes_its_hooks_after_an_error() -> None:
    model = tiny("llama")
    before = model(tokens()).logits
    with pytest.raises(RuntimeError, match="inside"), masked(model, random_plan(model)):
        raise RuntimeError("inside")
    assert torch.equal(model(tokens()).logits, before)


def test_cut_refuses_a_plan_of_another_model_before_it_changes_anything() -> None:
    model = tiny("llama")
    other = random_plan(tiny("llama", intermediate_size=64))
    before = sum(p.numel() for p in model.parameters())
    with pytest.raises(PlanError, match="64 units at"):
        cut(model, other)
    assert sum(p.numel() for p in model.parameters()) == before
    with pytest.raises(PlanError, match="has no units"):
        gates_from_plan(Plan({}, {}), find_sites(model))


def test_find_sites_refuses_an_unknown_architecture_by_name() -> None:
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 20}
    model = GPTBigCodeForCausalLM(GPTBigCodeConfig(**sizes, bos_token_id=0, eos_token_id=0))
    with pytest.raises(UnknownArchitecture, match=r"'gpt_bigcode' has no entry in families\.py, and nothing of it"):
        find_sites(model)


def test_find_sites_works_on_the_meta_device() -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        meta_model = AutoModelForCausalLM.from_config(tiny("llama").config)
    assert find_sites(meta_model) == find_sites(tiny("llama"))
