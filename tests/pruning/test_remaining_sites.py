"""A model cut several times: masked equals cut at every cut, and all cuts together equal one."""

from __future__ import annotations

import pytest
import torch

from prunetune import Plan, masked
from prunetune.pruning.cut import cut_linears
from prunetune.pruning.remaining_sites import in_dense_numbering, plan_within, remaining_sites
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import Site, UnitKind, dense_plan, kept_params
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.select import select
from prunetune.train.adapters import cut_tensors, trainable_parameters
from support.models import ALL_FAMILIES, kinds_of, relative, tiny, tokens, with_lora

TOLERANCE = 1e-5
KEEPS = (0.75, 0.5)


def nested_plans(sites: tuple[Site, ...], layout: str = "per-layer", seed: int = 0) -> list[Plan]:
    rng = torch.Generator().manual_seed(seed)
    plans: list[Plan] = []
    for keep in KEEPS:
        scores = {site.name: torch.rand(site.units, generator=rng) for site in sites}
        constraints = PlanConstraints(layout, 4)
        plans.append(select(scores, sites, keep, constraints, larger_plan=plans[-1] if plans else None))
    return plans


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_masking_a_cut_model_equals_cutting_it_again(family: str, lora: bool) -> None:
    model = tiny(family)
    if lora:
        with_lora(model)
    sites = find_sites(model, kinds_of(family))
    first, second = nested_plans(sites)
    cut_linears(model, first, sites=sites)
    left, relative_plan = remaining_sites(sites, first), plan_within(second, first)
    with torch.no_grad():
        before = model(tokens()).logits
        with masked(model, relative_plan, sites=left):
            expected = model(tokens()).logits
        cut_linears(model, relative_plan, sites=left)
        logits = model(tokens()).logits
    assert relative(logits, expected) <= TOLERANCE
    assert relative(before, expected) > 0.01, "the second plan must matter"


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_two_cuts_equal_one_to_the_bit(family: str) -> None:
    once, twice = with_lora(tiny(family)), with_lora(tiny(family))
    sites = find_sites(once, kinds_of(family))
    first, second = nested_plans(sites)
    cut_linears(once, second, sites=sites)
    cut_linears(twice, first, sites=sites)
    cut_linears(twice, plan_within(second, first), sites=remaining_sites(sites, first))
    states = once.state_dict(), twice.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    with torch.no_grad():
        assert torch.equal(once(tokens()).logits, twice(tokens()).logits)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_moments_cut_twice_have_the_shapes_of_the_model(family: str) -> None:
    model = with_lora(tiny(family))
    sites = find_sites(model, kinds_of(family))
    first, second = nested_plans(sites)
    moments = {name: weight.detach().clone() for name, weight in trainable_parameters(model).items()}
    for plan, left in ((first, sites), (plan_within(second, first), remaining_sites(sites, first))):
        cut_linears(model, plan, sites=left)
        moments = cut_tensors(model, moments, plan, left)
        named = trainable_parameters(model)
        assert moments.keys() == named.keys()
        assert all(torch.equal(moments[name], weight) for name, weight in named.items())


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_remaining_sites_count_what_the_plan_keeps(family: str) -> None:
    model = tiny(family)
    sites = find_sites(model, kinds_of(family))
    first, second = nested_plans(sites)
    left, inner = remaining_sites(sites, first), plan_within(second, first)
    assert sum(site.params for site in left) == kept_params(sites, first)
    assert kept_params(left, inner) == kept_params(sites, second)
    roots = [site for site in left if not site.parent and site.kind is not UnitKind.HIDDEN_CHANNEL]
    hidden = [site.units * site.unit_params for site in left if site.kind is UnitKind.HIDDEN_CHANNEL]
    assert sum(hidden) + sum(site.units * site.total_unit_params for site in roots) == kept_params(sites, first)
    assert plan_within(first, first) == dense_plan(left)
    values = {site.name: torch.arange(1.0, site.units + 1) for site in left}
    dense = in_dense_numbering(values, sites, first)
    for site in sites:
        kept = list(first.kept[site.name])
        assert dense[site.name][kept].tolist() == list(range(1, len(kept) + 1))
        assert int((dense[site.name] == 0).sum()) == site.units - len(kept)
