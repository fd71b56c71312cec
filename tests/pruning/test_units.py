"""Masked equals cut for every family and every kind of unit it can lose, and counted parameters are those removed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prunetune import Plan, cut, find_sites, masked
from prunetune.config.recipe import LoraSettings
from prunetune.errors import ConfigError, ModelError, PlanError
from prunetune.pruning.cut import cut_linears
from prunetune.pruning.masking import gates_from_plan
from prunetune.pruning.sites import sites_from_plan, unprunable_kinds
from prunetune.pruning.units import KIND_BY_NAME, UnitKind, dense_plan, removed_params
from prunetune.train.adapters import add_adapters, cut_tensors, expand_tensors, trainable_parameters
from support.models import ALL_FAMILIES, kinds_of, random_plan, relative, tiny, tokens, with_lora

TOLERANCE = 1e-5
LAYERS = 4  # enough for gaps in the stack
PAIRS = [(family, (kind,)) for family in ALL_FAMILIES for kind in kinds_of(family)]
CASES = [*PAIRS, *((family, kinds_of(family)) for family in ALL_FAMILIES)]  # each kind alone, and all at once
every_case = pytest.mark.parametrize(
    ("family", "units"), CASES, ids=[f"{family}-{units[0] if len(units) == 1 else 'all'}" for family, units in CASES]
)


def logits_of(model: Any) -> torch.Tensor:
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
        expected = logits_of(model)
    dense = logits_of(model)
    small = cut(model, plan)
    assert relative(logits_of(small), expected) <= TOLERANCE
    assert relative(dense, expected) > 0.01, "the plan must matter"
    left = sum(parameter.numel() for parameter in small.parameters())
    assert before - left == removed_params(sites, plan)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("family", [family for family in ALL_FAMILIES if "layers" in kinds_of(family)])
def test_closed_layer_returns_its_input_in_every_pass(family: str) -> None:
    """Hidden states, which a teacher compares, are collected by hooks of transformers from the first pass on."""
    model = tiny(family, layers=LAYERS)
    sites = find_sites(model, ("layers",))
    gates = {site.name: torch.tensor([float(site.layer != 1)]) for site in sites}
    for _ in range(2):
        with torch.no_grad(), masked(model, gates, sites=sites):
            states = model(tokens(), use_cache=False, output_hidden_states=True).hidden_states
        assert torch.equal(states[1], states[2])


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}])
def test_masking_equals_cutting_with_biases_and_tied_embeddings(changes: dict[str, bool]) -> None:
    model = with_lora(tiny("llama", layers=LAYERS, **changes))
    plan = random_plan(model, units=kinds_of("llama"), seed=1)
    with masked(model, plan):
        expected = logits_of(model)
    assert relative(logits_of(cut(model, plan)), expected) <= TOLERANCE


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_cut_linears_keeps_adapters_that_expand_again(family: str) -> None:
    """Masked, cut with adapters kept, and cut with adapters merged compute the same."""
    units = kinds_of(family)
    model = with_lora(tiny(family, layers=LAYERS))
    plan, sites = random_plan(model, units=units, seed=2), find_sites(model, units)
    before = {name: weight.detach().clone() for name, weight in trainable_parameters(model).items()}
    with masked(model, plan):
        expected = logits_of(model)
    cut_linears(model, plan)
    assert relative(logits_of(model), expected) <= TOLERANCE
    small = cut_tensors(model, before, plan, sites)
    assert set(small) == set(trainable_parameters(model))
    assert all(torch.equal(weight, small[name]) for name, weight in trainable_parameters(model).items())
    grown = expand_tensors(tiny(family, layers=LAYERS), small, plan, sites)
    again = with_lora(tiny(family, layers=LAYERS))
    for name, weight in grown.items():  # adapters of a removed block may be any
        again.get_parameter(name).data = weight
    assert relative(logits_of(cut(again, plan)), expected) <= TOLERANCE


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
def test_cut_model_generates_the_same_with_and_without_cache(family: str, units: tuple[str, ...]) -> None:
    model = tiny(family, layers=6)
    cut(model, random_plan(model, units=units, seed=5))
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        answers = [model.generate(tokens(length=10), use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*answers)


def test_removed_layers_leave_the_model_and_its_configuration() -> None:
    model = tiny("gemma2", layers=6)
    kinds = model.config.layer_types
    sites = find_sites(model, ["layers"])
    gone = {"model.layers.3:layers", "model.layers.4:layers"}
    plan = Plan({site.name: () if site.name in gone else (0,) for site in sites}, {site.name: 1 for site in sites})
    cut(model, plan)
    assert model.config.num_hidden_layers == len(model.model.layers) == 4
    assert model.config.layer_types == [kinds[index] for index in (0, 1, 2, 5)]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]


def test_removed_layers_renumber_plain_layers_of_a_mixture() -> None:
    model = tiny("qwen3_moe", layers=6, mlp_only_layers=[1], decoder_sparse_step=2)  # experts in layers 3 and 5
    sites = find_sites(model, ["layers", "mlp-blocks", "experts"])
    assert {site.layer: site.kind for site in sites if site.kind is UnitKind.EXPERT} == dict.fromkeys(
        (3, 5), UnitKind.EXPERT
    )
    plan = dense_plan(sites)
    plan = Plan(
        {
            name: () if name.startswith(("model.layers.2", "model.layers.3")) else kept
            for name, kept in plan.kept.items()
        },
        plan.units,
    )
    with masked(model, plan):
        expected = logits_of(model)
    assert relative(logits_of(cut(model, plan)), expected) <= TOLERANCE
    assert (model.config.mlp_only_layers, model.config.decoder_sparse_step) == ([0, 1, 2], 1)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_gate_of_a_closed_expert_gets_a_gradient(family: str) -> None:
    model = tiny(family, layers=2)
    sites = find_sites(model, ["experts"])
    plan = random_plan(model, units=["experts"])
    gates = {name: gate.requires_grad_() for name, gate in gates_from_plan(plan, sites).items()}
    with masked(model, plan):
        expected = logits_of(model)
    with masked(model, gates, sites=sites):
        logits = model(tokens()).logits
        logits.square().sum().backward()
    assert relative(logits.detach(), expected) <= TOLERANCE, "the gradient costs no exactness"
    for site in sites:
        gradient = gates[site.name].grad
        assert gradient.isfinite().all()
        assert (gradient != 0).any()
        closed = [unit for unit in range(site.units) if unit not in plan.kept[site.name]]
        assert (gradient[closed] != 0).any()


def test_gradient_of_a_layers_gate_equals_its_finite_difference() -> None:
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
        difference = float(loss(0.5 + step) - loss(0.5 - step)) / (2 * step)
    assert float(leaf.grad) == pytest.approx(difference, rel=1e-2)


def test_scaled_expert_weights_are_restored_after_an_error() -> None:
    model = tiny("mixtral", layers=2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def fail(*_: Any) -> None:
        raise RuntimeError("inside")

    plan = random_plan(model, units=["expert-channels"])
    with masked(model, plan):
        model.model.layers[0].mlp.experts.act_fn.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="inside"):
            logits_of(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_sites_from_plan_finds_the_kinds_of_a_plan() -> None:
    model = tiny("qwen3_moe")
    for units in (["experts"], ["kv-groups", "layers"], ["query-heads"], kinds_of("qwen3_moe")):
        assert sites_from_plan(model, random_plan(model, units=units)) == find_sites(model, units)


def test_plan_with_unequal_parent_groups_is_refused() -> None:
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
def test_find_sites_refuses_an_unprunable_kind_with_its_reason(family: str, unit: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        find_sites(tiny(family), ["mlp-channels", unit])
    assert reason in unprunable_kinds(tiny(family), [unit])[KIND_BY_NAME[unit]]


def test_add_adapters_refuses_a_model_without_target_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunetune.train.adapters.lora_target_modules", lambda model: [])
    with pytest.raises(ModelError, match="no linear of this model can be tuned"):
        add_adapters(tiny("mixtral"), (), LoraSettings(), seed=0)


def test_configuration_makes_kinds_unprunable() -> None:
    model = tiny("opt", do_layer_norm_before=False)
    assert "normalises after the residual" in unprunable_kinds(model, ["layers"])["layers"]
    model = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert "place in the stack" in unprunable_kinds(model, ["layers"])["layers"]
    assert "one query head" in unprunable_kinds(tiny("llama", ratio=1), ["query-heads"])["query-heads"]
    with pytest.raises(ConfigError, match="none of them is in this model"):
        find_sites(tiny("gpt_neox"), ["kv-groups"])
