"""From measured importance to starting logits, so that the search begins with what the pretrained weights say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunetune.cost.limits import BudgetLimits
from prunetune.pruning.sites import Site
from prunetune.search.nested_sites import NestedSites


def importance_to_logits(
    importance: Mapping[str, Tensor], sites: Sequence[Site], limits: BudgetLimits | None = None
) -> dict[str, Tensor]:
    """Normal scores of importance per parameter: {site: [U]}, mean about 0 and deviation about 1 over parameters.

    Ranks instead of values, because importances span many orders of magnitude and only their order is trusted. A unit
    counts as often as it has parameters, so that the budget's quantile of the logits is the budget. Under limits, their
    prices stand in for parameters.
    """
    names = [site.name for site in sites]
    spans = (
        limits.prices_with_children
        if limits and limits.prices_with_children
        else {site.name: site.total_unit_params for site in sites}
    )
    density = torch.cat([importance[site.name].double().cpu() / spans[site.name] for site in sites])
    prices = _unit_prices(sites, limits)
    order = torch.argsort(density, stable=True)
    below = torch.cumsum(prices[order], 0) - prices[order] / 2
    logits = torch.empty_like(density)
    below = below.clamp(0.5, float(prices.sum()) - 0.5)  # of units without weights of their own
    logits[order] = torch.special.ndtri(below / prices.sum())
    parts = torch.split(logits.float(), [site.units for site in sites])
    return dict(zip(names, parts, strict=True))


def _unit_prices(sites: Sequence[Site], limits: BudgetLimits | None) -> Tensor:
    """Of every unit, site after site."""
    each = limits.prices if limits and limits.prices else {site.name: float(site.unit_params) for site in sites}
    prices = torch.tensor([each[site.name] for site in sites], dtype=torch.float64)
    return prices.repeat_interleave(torch.tensor([site.units for site in sites]))


def score_threshold(nested_sites: NestedSites, keep: float, limits: BudgetLimits | None = None) -> float:
    """The score above which units hold the share `keep` of the prunable parameters, or what limits make of it."""
    keep = limits.price_share_at(keep) if limits else keep
    prices = _unit_prices(nested_sites.sites, limits)
    held = torch.cumsum(prices.index_select(0, nested_sites.units_by_score), 0) / prices.sum()
    return float(
        nested_sites.scores[nested_sites.units_by_score[torch.searchsorted(held, keep).clamp(max=len(held) - 1)]]
    )
