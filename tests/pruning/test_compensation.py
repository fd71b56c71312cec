"""Kept columns take over the output of removed ones: least squares, in any dtype, for every family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunetune import find_sites
from prunetune.plan import Plan
from prunetune.pruning.compensation import compensate_consumers, damped, removal_errors
from prunetune.pruning.cut import cut
from prunetune.pruning.linears import as_out_in, get_base_linear
from prunetune.pruning.masking import masked
from prunetune.pruning.units import Site, dense_plan
from support.models import FAMILIES, random_plan, relative, tiny, tokens


def grams_of(model: Any, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """Gram matrices of the consumers' inputs on random tokens."""
    grams: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(_: Any, inputs: Any) -> None:
            rows = inputs[0].flatten(0, -2).float()
            grams[name] = rows.t() @ rows

        return hook

    linears = {site.consumer.module for site in sites if site.consumer}
    handles = [model.get_submodule(name).register_forward_pre_hook(record(name)) for name in linears]
    with torch.no_grad():
        model(tokens(batch=8, length=40))
    for handle in handles:
        handle.remove()
    return grams


def test_update_is_the_least_squares_solution() -> None:
    """Two columns x and y with known moments: E xx = 2, E xy = 1, so that y is best replaced by x / 2."""
    model = tiny("llama", layers=1)
    site = find_sites(model)[-1]
    linear = get_base_linear(model, site.consumer.module)
    columns = linear.weight.shape[1]
    gram = torch.eye(columns)
    gram[0, 0], gram[0, 1], gram[1, 0], gram[1, 1] = 2.0, 1.0, 1.0, 1.0
    plan = dense_plan([site])
    plan = Plan({site.name: tuple(unit for unit in range(columns) if unit != 1)}, plan.units)
    before = linear.weight.detach().clone()
    compensate_consumers(model, [site], plan, {site.consumer.module: gram}, damping=0.0)
    after = linear.weight.detach()
    torch.testing.assert_close(after[:, 0], before[:, 0] + before[:, 1] / 2)
    torch.testing.assert_close(after[:, 1:], before[:, 1:])


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_compensation_equals_regression_on_the_inputs(family: str) -> None:
    model = tiny(family).requires_grad_(False)
    sites, plan = find_sites(model), random_plan(model)
    site = sites[1]
    linear, rows = get_base_linear(model, site.consumer.module), []
    handle = linear.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].flatten(0, -2).double()))
    grams = grams_of(model, sites)
    handle.remove()
    weight, inputs = as_out_in(linear, linear.weight).double().clone(), torch.cat(rows)
    compensate_consumers(model, sites, plan, grams)
    kept = site.consumer.indices(plan.kept[site.name], site.units)
    ridge = (0.01 * inputs.square().sum(0).mean()).sqrt()
    design = torch.cat([inputs, ridge * torch.eye(inputs.shape[1])])
    solution = torch.linalg.lstsq(design[:, kept], design @ weight.t()).solution.t()
    torch.testing.assert_close(as_out_in(linear, linear.weight).double()[:, kept], solution, rtol=1e-3, atol=1e-4)
    with torch.no_grad(), masked(model, plan):
        gated = model(tokens()).logits
    assert relative(cut(model, plan)(tokens()).logits.detach(), gated) < 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_weights_keep_dtype_and_gradients_and_the_old_ones_stay(dtype: torch.dtype, tolerance: float) -> None:
    """Float32 weights that are trained inside a bfloat16 model, too."""
    model = tiny("llama").requires_grad_(False)
    sites, plan = find_sites(model), random_plan(model)
    grams = grams_of(model, sites)
    exact = copy.deepcopy(model)
    compensate_consumers(exact, sites, plan, grams)
    model.to(torch.bfloat16)
    name = sites[-1].consumer.module
    linear = model.get_submodule(name)
    linear.weight = nn.Parameter(exact.get_submodule(name).weight.detach().to(dtype), requires_grad=True)
    old, before = linear.weight, linear.weight.detach().clone()
    compensate_consumers(model, sites, plan, {name: grams[name]})
    assert (linear.weight.dtype, linear.weight.requires_grad, linear.weight.is_leaf) == (dtype, True, True)
    assert torch.equal(old.detach(), before)
    twice = exact
    compensate_consumers(twice, sites, plan, {name: grams[name]})
    assert relative(linear.weight.detach().float(), twice.get_submodule(name).weight) < tolerance
    assert all(p.dtype == torch.bfloat16 for n, p in model.named_parameters() if n != f"{name}.weight")


def test_linears_without_gram_or_without_kept_columns_stay_as_they_are() -> None:
    model = tiny("llama").requires_grad_(False)
    sites = find_sites(model)
    plan = random_plan(model)
    plan = Plan({**plan.kept, "model.layers.1.self_attn": ()}, plan.units)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    grams = grams_of(model, sites)
    compensate_consumers(model, sites, plan, {name: gram for name, gram in grams.items() if ".1." in name})
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {"model.layers.1.mlp.down_proj.weight"}


def test_query_heads_inside_groups_are_compensated_once() -> None:
    model = tiny("llama").requires_grad_(False)
    kinds = ("kv-groups", "query-heads", "mlp-channels")
    sites, plan = find_sites(model, kinds), random_plan(model, units=kinds)
    dense, grams = model(tokens(batch=8, length=40)).logits, grams_of(model, sites)
    plain = copy.deepcopy(model)
    compensate_consumers(model, sites, plan, grams)
    errors = [
        float((cut(one, plan, sites=sites)(tokens(batch=8, length=40)).logits - dense).square().mean())
        for one in (model, plain)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_errors_of_independent_columns_are_weight_times_input() -> None:
    """Nothing makes up for an independent column: the error is its squared weight times its squared input."""
    weight, second_moments = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 0.5]]), torch.tensor([3.0, 1.0, 4.0])
    errors = removal_errors(weight, torch.diag(second_moments), 3, damping=0.0)
    assert errors.tolist() == pytest.approx([3.0, 5.0, 2.0])
    wide = removal_errors(torch.cat([weight, weight], 1), torch.diag(second_moments.repeat(2)), 2, damping=0.0)
    assert wide.tolist() == pytest.approx([10.0, 10.0])


def test_column_that_others_replace_costs_nothing_once() -> None:
    """Of two equal columns one is free; the other then carries the error of both."""
    gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    errors = removal_errors(torch.tensor([[1.0, 1.0, 3.0]]), gram, 3, damping=1e-9)
    assert sorted(errors.tolist()) == pytest.approx([0.0, 4.0, 9.0], abs=1e-6)
    assert float(errors[2]) == pytest.approx(9.0)


def test_damping_is_a_share_of_the_mean_diagonal_and_inverts_zeros() -> None:
    assert damped(torch.diag(torch.tensor([1.0, 3.0])), 0.5).tolist() == [[2.0, 0.0], [0.0, 4.0]]
    assert torch.linalg.cholesky(damped(torch.zeros(2, 2))).isfinite().all()
