"""Laws of `budget.tensor_parallel`: every width is divisible by the devices, on budget and maximal, or refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from prunetune.errors import PlanError
from prunetune.pruning.units import LinearSlice, Site, SiteWeights, UnitKind, dense_plan, kept_params, prunable_params
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.select import min_feasible_keep, select

RATIO = 4  # query heads in a group


def build_sites(groups: int, channels: int, layers: int = 4) -> tuple[Site, ...]:
    """Sites of one geometry; the first layer keeps a group."""
    sites = []
    for layer in range(layers):
        cut = LinearSlice(f"layers.{layer}", (1,))
        weights = SiteWeights(producers=(cut,), consumer=cut)
        heads = Site(
            name=f"layers.{layer}.self_attn", layer=layer, kind=UnitKind.KV_GROUP, units=groups, unit_params=5000,
            min_units_per_group=int(layer == 0), weights=weights,
        )  # fmt: skip
        mlp = Site(
            name=f"layers.{layer}.mlp", layer=layer, kind=UnitKind.MLP_CHANNEL, units=channels, unit_params=96,
            weights=weights,
        )  # fmt: skip
        sites += [heads, mlp]
    return tuple(sites)


def scores_of(sites: tuple[Site, ...], seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {site.name: torch.randn(site.units, generator=rng) for site in sites}


def cases(devices: int, layout: str, align: int) -> Any:
    """Sites, constraints, keep and plan over random scores and feasible targets."""
    for groups, channels in ((8, 1024), (8, 1000), (4, 96)):
        sites, constraints = build_sites(groups, channels), PlanConstraints(layout, align, tensor_parallel=devices)
        low = min_feasible_keep(sites, constraints)
        for seed in range(20):
            keep = low + (1 - low) * float(torch.rand(1, generator=torch.Generator().manual_seed(seed)))
            yield sites, constraints, keep, select(scores_of(sites, seed), sites, keep, constraints)


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
@pytest.mark.parametrize(("devices", "align"), [(1, 32), (2, 32), (4, 32), (4, 6), (2, 1)])
def test_every_width_is_divisible_by_the_devices(devices: int, align: int, layout: str) -> None:
    for sites, _, keep, plan in cases(devices, layout, align):
        assert kept_params(sites, plan) <= keep * prunable_params(sites) * (1 + 1e-12)
        for site in sites:
            width = len(plan.kept[site.name])
            assert width % devices == 0
            assert site.kind == "mlp" or RATIO * width % devices == 0
            assert site.kind != "mlp" or width % align == 0 or width == site.units


@pytest.mark.parametrize(("devices", "align"), [(2, 32), (4, 32), (4, 6)])
def test_no_further_block_of_all_devices_fits(devices: int, align: int) -> None:
    blocks = {UnitKind.MLP_CHANNEL: math.lcm(align, devices), UnitKind.KV_GROUP: devices}
    for sites, _, keep, plan in cases(devices, "per-layer", align):
        params_left = keep * prunable_params(sites) - kept_params(sites, plan)
        for site in sites:
            block = min(blocks[site.kind], site.units - len(plan.kept[site.name]))
            assert not block or block * site.unit_params > params_left


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_one_device_gives_the_same_plan(layout: str) -> None:
    sites = build_sites(8, 1000)
    for seed in range(10):
        scores = scores_of(sites, seed)
        plain, on_one_device = PlanConstraints(layout, 32), PlanConstraints(layout, 32, tensor_parallel=1)
        assert select(scores, sites, 0.6, plain) == select(scores, sites, 0.6, on_one_device)


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_devices_that_do_not_divide_the_dense_model_are_refused(layout: str) -> None:
    sites = build_sites(3, 1536)
    with pytest.raises(PlanError, match=r"tensor_parallel 2 does not divide the 3 KV groups .*divisor of 3"):
        select(scores_of(sites, 0), sites, 0.6, PlanConstraints(layout, 32, tensor_parallel=2))
    assert select(scores_of(sites, 0), sites, 1.0, PlanConstraints(layout, 32, tensor_parallel=3)) == dense_plan(sites)


def test_keep_below_the_least_widths_of_all_devices_is_refused() -> None:
    sites = build_sites(8, 1024)
    on_one_device, on_eight_devices = (
        PlanConstraints("per-layer", 32),
        PlanConstraints("per-layer", 32, tensor_parallel=8),
    )
    assert min_feasible_keep(sites, on_one_device) < min_feasible_keep(sites, on_eight_devices)
    with pytest.raises(PlanError, match=r"budget\.keep .* is below what is feasible"):
        select(scores_of(sites, 0), sites, min_feasible_keep(sites, on_one_device), on_eight_devices)


@pytest.mark.parametrize("legal", [(1, 2, 4, 8), (1, 3, 5, 8)])
def test_uniform_group_count_is_legal_and_divisible(legal: tuple[int, ...]) -> None:
    sites = build_sites(8, 1024)
    constraints = PlanConstraints("uniform", 32, allows_groups=lambda groups: groups in legal, tensor_parallel=2)
    for seed in range(10):
        groups = {len(select(scores_of(sites, seed), sites, 0.8, constraints).kept[site.name]) for site in sites[::2]}
        assert groups <= {count for count in legal if count % 2 == 0}


def test_min_groups_above_the_dense_model_keeps_all() -> None:
    sites = build_sites(8, 1024)
    for layout in ("per-layer", "uniform"):
        plan = select(scores_of(sites, 0), sites, 0.9, PlanConstraints(layout, 32, min_groups=9))
        assert all(len(plan.kept[site.name]) == 8 for site in sites[::2])
