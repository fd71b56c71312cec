"""Laws: ranking within groups and kept indices equal plain sorting and lists."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prunetune.plan import Plan
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import KIND_BY_NAME, Site, dense_plan, kept_indices, without_removed_modules
from prunetune.search.nested_sites import NestedSites
from support.models import ALL_FAMILIES, kinds_of, random_plan, tiny

UNITS = ["layers", "kv-groups", "query-heads", "experts", "expert-channels"]


def drawn(sites: tuple[Site, ...], seed: int) -> dict[str, Tensor]:
    """Random scores, with ties where the seed is odd."""
    rng = torch.Generator().manual_seed(seed)
    scores = {site.name: torch.randn(site.units, generator=rng) for site in sites}
    return {name: values.round() if seed % 2 else values for name, values in scores.items()}


def test_equal_scores_rank_by_index_and_nan_before_all() -> None:
    sites = find_sites(tiny("llama"))
    scores = {site.name: torch.tensor([0.0, -0.0, torch.nan, 1.0]).repeat(site.units)[: site.units] for site in sites}
    for site, ranked in zip(sites, NestedSites(sites, scores).ranked_units.values(), strict=True):
        own = ranked[0] - ranked[0].min()
        assert own.tolist() == sorted(range(site.units), key=lambda unit: ({2: 0, 3: 1}.get(unit % 4, 2), unit))


@pytest.mark.parametrize("seed", range(4))
def test_each_group_is_ranked_separately(seed: int) -> None:
    sites = find_sites(tiny("qwen3_moe"), UNITS)
    nested_sites = NestedSites(sites, drawn(sites, seed))
    for site in sites:
        groups = drawn(sites, seed)[site.name].view(site.parent_groups, -1)
        order = groups.argsort(dim=1, descending=True, stable=True)
        starts = nested_sites.first_unit[site.name] + site.units_per_group * torch.arange(site.parent_groups)[:, None]
        assert torch.equal(nested_sites.ranked_units[site.name], starts + order)
        assert torch.equal(nested_sites.ranked_scores[site.name], groups.gather(1, order).double())


def kept_indices_by_lists(plan: Plan, sites: tuple[Site, ...]) -> dict[tuple[str, int], list[int]]:
    """`kept_indices` by lists: all rows or columns but those of pruned units."""
    pruned: dict[tuple[str, int], set[int]] = {}
    totals: dict[tuple[str, int], int] = {}
    for site in without_removed_modules(sites, plan):
        kept = plan.kept[site.name]
        if 0 < len(kept) < site.units:
            for cut, axis in site.linear_slices():
                key = (cut.module, axis)
                totals[key] = cut.total_rows or site.units * cut.rows_per_unit
                pruned_units = [unit for unit in range(site.units) if unit not in kept]
                pruned.setdefault(key, set()).update(cut.indices(pruned_units, site.units).tolist())
    return {key: [row for row in range(totals[key]) if row not in rows] for key, rows in pruned.items()}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_kept_indices_are_all_but_those_of_pruned_units(family: str) -> None:
    model = tiny(family)
    for units in ([*KIND_BY_NAME], ["kv-groups", "mlp-channels"], ["layers", "kv-groups", "query-heads"]):
        units = [unit for unit in units if unit in kinds_of(family)]
        sites, plan = find_sites(model, units), random_plan(model, units=units)
        indices = kept_indices(plan, sites)
        assert {key: kept_units.tolist() for key, kept_units in indices.items()} == kept_indices_by_lists(plan, sites)
        assert all(kept_units.dtype == torch.long for kept_units in indices.values())
        assert kept_indices(dense_plan(sites), sites) == {}
