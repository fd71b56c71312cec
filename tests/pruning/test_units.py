"""Laws over every family and every kind of unit that it can lose: masked equals cut, and the price is what leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prunetune import Plan, cut, find_sites, masked
from prunetune.config.recipe import LoraSettings
from prunetune.errors import ConfigError, ModelError, PlanError
from prunetune.pruning.cut import cut_linears
from prunetune.pruning.masking import gates_from_plan
from prunetune.pruning.sites import dense_plan, kept_params, sites_from_plan, unprunable_kinds
from prunetune.pruning.units import KIND_BY_NAME
from prunetune.train.adapters import add_adapters, cut_adapter_tensors, expand_adapter_tensors, trainable_parameters
from support.models import ALL_FAMILIES, kinds_of, random_plan, relative, tiny, tokens, with_lora

TOLERANCE = 1e-5
LAYERS = 4  # enough for gaps in the stack
PAIRS = [(family, (kind,)) for family in ALL_FAMILIES for kind in kinds_of(family)]
CASES = [*PAIRS, *((family, kinds_of(family)) for family in ALL_FAMILIES)]  # each kind alone, and all at once
every_case = pytest.mark.parametrize(
    ("family", "units"), CASES, ids=[f"{family}-{units[0] if len(units) == 1 else 'all'}" for family, units in CASES]
)


def said(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("lora", [True, False])
@every_case
def test_masking_equals_cutting(family: str, units: tuple[str, ...], lora: bool) -> None:
    model = tiny(family, layers=LAYERS)
    before = sum(parameter.numel() for parameter in model.parameters())
    if lora:
        with_lora(model)
    plan, sites = random_plan(model, units=units, seed=1), find_sites(model, units)
    with masked(model, plan):
        expected = said(model)
    dense = said(model)
    small = cut(model, plan)
    assert relative(said(small), expected) <= TOLERANCE
    assert relative(dense, expected) > 0.01, "the plan must matter"
    left = sum(parameter.numel() for parameter in small.parameters())
    assert before - left == kept_params(sites, dense_plan(sites)) - kept_params(sites, plan)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("family", [family for family in ALL_FAMILIES if "layers" in kinds_of(family)])
def test_a_closed_layer_hands_on_what_it_got_in_every_pass(family: str) -> None:
    """A teacher compares hidden states, which transformers collects by hooks of its own from the first pass on."""
    model = tiny(family, layers=LAYERS)
    sites = find_sites(model, ("layers",))
    gates = {site.name: torch.tensor([float(site.layer != 1)]) for site in sites}
    for _ in range(2):
        with torch.no_grad(), masked(model, gates, sites=sites):
            states = model(tokens(), use_cache=False, output_hidden_states=True).hidden_states
        assert torch.equal(states[1], states[2])


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}])
def test_biases_and_ties(changes: dict[str, bool]) -> None:
    model = with_lora(tiny("llama", layers=LAYERS, **changes))
    plan = random_plan(model, units=kinds_of("llama"), seed=1)
    with masked(model, plan):
        expected = said(model)
    assert relative(said(cut(model, plan)), expected) <= TOLERANCE


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_adapters_stay_when_only_linears_are_cut_and_grow_back(family: str) -> None:
    """Masked, cut with adapters that stay, and merged: three ways to the same."""
    units = kinds_of(family)
    model = with_lora(tiny(family, layers=LAYERS))
    plan, sites = random_plan(model, units=units, seed=2), find_sites(model, units)
    before = {name: weight.detach().clone() for name, weight in trainable_parameters(model).items()}
    with masked(model, plan):
        expected = said(model)
    cut_linears(model, plan)
    assert relative(said(model), expected) <= TOLERANCE
    small = cut_adapter_tensors(before, plan, sites)
    assert set(small) == set(trainable_parameters(model))
    assert all(torch.equal(weight, small[name]) for name, weight in trainable_parameters(model).items())
    grown = expand_adapter_tensors(small, {name: weight.shape for name, weight in before.items()}, plan, sites)
    again = with_lora(tiny(family, layers=LAYERS))
    for name, weight in trainable_parameters(again).items():
        weight.data = grown[name]
    assert relative(said(cut(again, plan)), expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "units"),
    [
        ("llama", ("layers",)),
        ("gemma2", ("layers", "kv-groups")),
        ("qwen3", ("attention-blocks", "mlp-blocks")),
        ("phi3", ("kv-groups", "query-heads")),
        ("gpt_oss", ("layers", "query-heads", "experts")),
        ("bloom", ("layers",)),
        ("opt", ("attention-blocks", "layers")),
    ],
)
def test_a_cut_model_generates_with_its_cache_as_without(family: str, units: tuple[str, ...]) -> None:
    model = tiny(family, layers=6)
    cut(model, random_plan(model, units=units, seed=5))
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        found = [model.generate(tokens(length=10), use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*found)


def test_layers_leave_the_stack_and_the_configuration_follows() -> None:
    model = tiny("gemma2", layers=6)
    kinds = model.config.layer_types
    sites = find_sites(model, ["layers"])
    gone = {"model.layers.3:layers", "model.layers.4:layers"}
    plan = Plan({site.name: () if site.name in gone else (0,) for site in sites}, {site.name: 1 for site in sites})
    cut(model, plan)
    assert model.config.num_hidden_layers == len(model.model.layers) == 4
    assert model.config.layer_types == [kinds[index] for index in (0, 1, 2, 5)]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]


def test_plain_layers_of_a_mixture_are_counted_on() -> None:
    model = tiny("qwen3_moe", layers=6, mlp_only_layers=[1], decoder_sparse_step=2)  # experts in layers 3 and 5
    sites = find_sites(model, ["layers", "mlp-blocks", "experts"])
    assert {site.layer: site.kind for site in sites if site.kind == "experts"} == {3: "experts", 5: "experts"}
    plan = dense_plan(sites)
    plan = Plan(
        {
            name: () if name.startswith(("model.layers.2", "model.layers.3")) else kept
            for name, kept in plan.kept.items()
        },
        plan.units,
    )
    with masked(model, plan):
        expected = said(model)
    assert relative(said(cut(model, plan)), expected) <= TOLERANCE
    assert (model.config.mlp_only_layers, model.config.decoder_sparse_step) == ([0, 1, 2], 1)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_a_closed_expert_s_gate_hears_what_it_would_add(family: str) -> None:
    model = tiny(family, layers=2)
    sites = find_sites(model, ["experts"])
    plan = random_plan(model, units=["experts"])
    gates = {name: gate.requires_grad_() for name, gate in gates_from_plan(plan, sites).items()}
    with masked(model, plan):
        expected = said(model)
    with masked(model, gates, sites=sites):
        logits = model(tokens()).logits
        logits.square().sum().backward()
    assert relative(logits.detach(), expected) <= TOLERANCE, "the gradient costs no exactness"
    for site in sites:
        slopes = gates[site.name].grad
        assert slopes.isfinite().all()
        assert (slopes != 0).any()
        closed = [unit for unit in range(site.units) if unit not in plan.kept[site.name]]
        assert (slopes[closed] != 0).any()


def test_a_layer_s_gate_has_the_slope_of_its_difference() -> None:
    model = tiny("qwen3", layers=3).double()
    sites = find_sites(model, ["layers"])
    gates = {site.name: torch.full((1,), 0.5, dtype=torch.float64) for site in sites}
    name = sites[1].name

    def loss(value: float) -> torch.Tensor:
        with masked(model, {**gates, name: torch.tensor([value], dtype=torch.float64)}, sites=sites):
            return model(tokens()).logits.square().sum()

    leaf = gates[name].clone().requires_grad_()
    with masked(model, {**gates, name: leaf}, sites=sites):
        model(tokens()).logits.square().sum().backward()
    step = 1e-3  # norms are computed in float32
    with torch.no_grad():
        slope = float(loss(0.5 + step) - loss(0.5 - step)) / (2 * step)
    assert float(leaf.grad) == pytest.approx(slope, rel=1e-2)


def test_scaled_weights_are_put_back_even_after_an_error() -> None:
    model = tiny("mixtral", layers=2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def fail(*_: Any) -> None:
        raise RuntimeError("inside")

    plan = random_plan(model, units=["expert-channels"])
    with masked(model, plan):
        model.model.layers[0].mlp.experts.act_fn.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="inside"):
            said(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_plan_tells_its_kinds() -> None:
    model = tiny("qwen3_moe")
    for units in (["experts"], ["kv-groups", "layers"], ["query-heads"], kinds_of("qwen3_moe")):
        assert sites_from_plan(model, random_plan(model, units=units)) == find_sites(model, units)


def test_a_plan_that_no_shape_has_is_refused() -> None:
    model = tiny("llama")
    plan = random_plan(model, units=["kv-groups", "query-heads"])
    site = "model.layers.0.self_attn:query-heads"
    for kept, groups in (((0,), (0, 1)), ((0, 2), (0,))):
        broken = Plan({**plan.kept, site: kept, "model.layers.0.self_attn": groups}, plan.units)
        with pytest.raises(PlanError, match="each open one has to keep the same number, a closed one none"):
            cut(model, broken)


@pytest.mark.parametrize(
    ("family", "unit", "reason"),
    [
        ("llama", "experts", "no mixture"),
        ("gpt_neox", "query-heads", "hidden size divided by the heads"),
        ("bloom", "attention-blocks", "adds the residual itself"),
    ],
)
def test_a_kind_that_is_not_there_is_refused_with_its_reason(family: str, unit: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        find_sites(tiny(family), ["mlp-channels", unit])
    assert reason in unprunable_kinds(tiny(family), [unit])[KIND_BY_NAME[unit]]


def test_a_model_without_a_linear_to_tune_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunetune.train.adapters.lora_target_modules", lambda model: [])
    with pytest.raises(ModelError, match="no linear of this model can be tuned"):
        add_adapters(tiny("mixtral"), (), LoraSettings(), seed=0)


def test_what_a_configuration_rules_out() -> None:
    model = tiny("opt", do_layer_norm_before=False)
    assert "normalises after the residual" in unprunable_kinds(model, ["layers"])["layers"]
    model = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert "place in the stack" in unprunable_kinds(model, ["layers"])["layers"]
    assert "one query head" in unprunable_kinds(tiny("llama", ratio=1), ["query-heads"])["query-heads"]
    with pytest.raises(ConfigError, match="none of them is in this model"):
        find_sites(tiny("gpt_neox"), ["kv-groups"])
