"""A base in 4 bits: cutting it is exact, and gradients and merged adapters equal those of its dequantised weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from prunetune import Plan
from prunetune.errors import MissingPackage
from prunetune.pruning import nf4
from prunetune.pruning.cut import cut, cut_linears, finalize_adapters, merge_adapters
from prunetune.pruning.linears import COLUMNS, ROWS
from prunetune.pruning.masking import masked
from prunetune.pruning.remaining_sites import remaining_sites
from prunetune.pruning.sites import find_sites, lora_target_modules
from prunetune.pruning.units import DEFAULT_UNITS
from prunetune.utils import optional
from support.models import random_plan, relative, tiny, tokens, with_lora
from support.nf4 import needs_nf4

CPU = torch.device("cpu")
FAMILIES = ("llama", "qwen2", "gemma3_text", "phi3", "gpt2")


def quantized(family: str = "llama", *, lora: bool = True, units: Any = None, **changes: Any) -> tuple[Any, Any]:
    """A tiny model in 4 bits, and its sites; adapters are random."""
    model = tiny(family, **changes)
    sites = find_sites(model, units) if units else find_sites(model)
    nf4.quantize_linears_to_nf4(model, sites, dtype=torch.float32, device=CPU)
    return (with_lora(model) if lora else model), sites


def linear_of(rows: int, columns: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=bias)


@needs_nf4
@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
@pytest.mark.parametrize(("rows", "columns"), [(128, 64), (5, 70), (65, 3)])
def test_nf4_linear_equals_a_linear_with_its_rounded_weights(rows: int, columns: int, axis: int) -> None:
    plain = linear_of(rows, columns)
    packed = nf4.NF4Linear.from_linear(plain, cut_axis=axis, dtype=torch.float32, device=CPU)
    assert packed.weight.shape == plain.weight.shape
    assert float((packed.weight - plain.weight).detach().norm() / plain.weight.detach().norm()) < 0.12
    again, inputs = packed.dequantize(), torch.randn(2, 7, columns, requires_grad=True)
    output, expected = packed(inputs), again(inputs)
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(output)
    torch.testing.assert_close(
        torch.autograd.grad((output * weights).sum(), inputs), torch.autograd.grad((expected * weights).sum(), inputs)
    )


@needs_nf4
@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
def test_keep_indices_changes_no_bit_of_kept_weights(axis: int) -> None:
    packed = nf4.NF4Linear.from_linear(linear_of(90, 130), cut_axis=axis, dtype=torch.float32, device=CPU)
    before, index = packed.weight, torch.tensor([0, 3, 4, 77])
    packed.keep_indices(index, axis)
    assert torch.equal(packed.weight, before.index_select(axis, index))
    assert (packed.out_features, packed.in_features) == tuple(packed.weight.shape)
    with pytest.raises(ValueError, match="only axis"):
        packed.keep_indices(index, 1 - axis)


@needs_nf4
def test_scales_stay_float32_when_the_model_changes_dtype() -> None:
    packed = nf4.NF4Linear.from_linear(linear_of(64, 64), cut_axis=ROWS, dtype=torch.float32, device=CPU)
    before = packed.weight
    nn.Sequential(packed).to(torch.bfloat16)
    assert torch.equal(packed.weight, before)
    with pytest.raises((KeyError, AttributeError)):
        packed.weight = nn.Parameter(before)


@needs_nf4
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_of_a_quantised_model_is_exact(family: str) -> None:
    model, sites = quantized(family)
    plan = random_plan(tiny(family), seed=3)
    with masked(model, plan, sites=sites), torch.no_grad():
        expected = model(tokens()).logits
    cut_linears(model, plan, sites=sites)
    assert nf4.has_nf4_linears(model)
    with torch.no_grad():
        assert relative(model(tokens()).logits, expected) < 1e-5
    merge_adapters(model)
    assert not nf4.has_nf4_linears(model)
    with torch.no_grad():
        assert relative(model(tokens()).logits, expected) < 1e-5


@needs_nf4
@pytest.mark.parametrize("units", [DEFAULT_UNITS, ("kv-groups", "query-heads", "mlp-channels")])
@pytest.mark.parametrize("family", FAMILIES[:3])
def test_second_cut_of_a_quantised_model_is_exact(family: str, units: tuple[str, ...]) -> None:
    model, sites = quantized(family, units=units)
    first = random_plan(tiny(family), seed=3, keep=0.7, units=units)
    cut_linears(model, first, sites=sites)
    left = remaining_sites(sites, first)
    second = Plan(  # the first half of every group
        {
            site.name: tuple(
                unit for unit in range(site.units) if unit % site.units_per_group < -(-site.units_per_group // 2)
            )
            for site in left
        },
        {site.name: site.units for site in left},
    )
    if "query-heads" in units:  # groups keep their heads, or leave with them
        second = Plan({**second.kept, **{s.name: tuple(range(s.units)) for s in left if s.kind.is_head}}, second.units)
    with masked(model, second, sites=left), torch.no_grad():
        expected = model(tokens()).logits
    cut_linears(model, second, sites=left)
    assert nf4.has_nf4_linears(model)
    with torch.no_grad():
        assert relative(model(tokens()).logits, expected) < 1e-5


@needs_nf4
@pytest.mark.parametrize("units", [("query-heads", "mlp-channels"), ("layers", "kv-groups"), ("mlp-blocks",)])
def test_cut_of_a_quantised_model_is_exact_for_other_kinds_of_unit(units: tuple[str, ...]) -> None:
    model, sites = quantized("llama", units=units)
    plan = random_plan(tiny("llama"), seed=1, units=units)
    with masked(model, plan, sites=sites), torch.no_grad():
        expected = model(tokens()).logits
    cut(model, plan, sites=sites)
    with torch.no_grad():
        assert relative(model(tokens()).logits, expected) < 1e-5


@needs_nf4
def test_rounded_weights_equal_the_quantised_ones() -> None:
    plain, (model, sites) = tiny("gpt2"), quantized("gpt2", lora=False)
    for name, axis in nf4.cut_axes(plain, sites).items():
        linear = plain.get_submodule(name)
        rounded = nf4.round_to_nf4(linear, linear.weight, cut_axis=axis, dtype=torch.float32, device=CPU)
        linear.weight.data = rounded
    with torch.no_grad():
        assert relative(plain(tokens()).logits, model(tokens()).logits) < 1e-5
    before = tiny("gpt2").state_dict()
    assert any(not torch.equal(weight, before[name]) for name, weight in plain.state_dict().items())


@needs_nf4
@pytest.mark.parametrize("adapters", ["gated", "free"])
def test_gradients_equal_those_of_the_dequantised_model(adapters: Any) -> None:
    """The gradients of a base in 4 bits are those of its rounded weights in float32."""
    gradients = []
    for dequantized in (False, True):
        model, sites = quantized("qwen2")
        if dequantized:
            for name in lora_target_modules(model):
                model.get_submodule(name).base_layer = model.get_submodule(name).base_layer.dequantize()
        leaves = {site.name: torch.full((site.units,), 0.7, requires_grad=True) for site in sites}
        with masked(model, leaves, adapters=adapters, sites=sites):
            model(tokens()).logits.square().mean().backward()
        lora = [weight.grad for name, weight in model.named_parameters() if "lora_" in name]
        gradients.append([*lora, *(leaf.grad for leaf in leaves.values())])
    for gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


@needs_nf4
def test_finalize_adapters_keeps_adapters_on_a_quantised_base() -> None:
    model, _ = quantized("llama")
    with torch.no_grad():
        expected = model(tokens()).logits
        finalize_adapters(model)
        assert nf4.has_nf4_linears(model)
        assert torch.equal(model(tokens()).logits, expected)
        plain = with_lora(tiny("llama"))
        expected = plain(tokens()).logits
        finalize_adapters(plain)
        assert relative(plain(tokens()).logits, expected) < 1e-5
    assert not any("lora_" in name for name, _ in plain.named_parameters())


def test_missing_bitsandbytes_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "find_spec", lambda _: None)
    with pytest.raises(MissingPackage, match=r"needs bitsandbytes; run: pip install 'bitsandbytes>="):
        nf4.require_nf4()
