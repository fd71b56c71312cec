"""Initial logits of the search from measured importance, and the score threshold that keeps a given share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunetune.cost.budget_limits import BudgetLimits
from prunetune.pruning.units import Site
from prunetune.search.nested_sites import NestedSites


def importance_to_logits(
    importance: Mapping[str, Tensor], sites: Sequence[Site], limits: BudgetLimits | None = None
) -> dict[str, Tensor]:
    """Normal scores of importance per parameter: {site: [U]}, mean about 0 and deviation about 1 over parameters.

    Ranks instead of values, because importances span many orders of magnitude and only their order is trusted. A unit
    counts as often as it has parameters, so that the budget's quantile of the logits is the budget. Under limits, the
    prices of units take the place of parameters.
    """
    params = {site.name: site.total_unit_params for site in sites}
    prices_with_children = (limits and limits.prices_with_children) or params
    density = torch.cat([importance[site.name].double().cpu() / prices_with_children[site.name] for site in sites])
    prices = _unit_prices(sites, limits)
    order = torch.argsort(density, stable=True)
    middles = torch.cumsum(prices[order], 0) - prices[order] / 2  # price of the units below, and half of this one
    middles = middles.clamp(0.5, float(prices.sum()) - 0.5)  # units without parameters of their own: finite logits
    logits = torch.empty_like(density)
    logits[order] = torch.special.ndtri(middles / prices.sum())
    by_site = torch.split(logits.float(), [site.units for site in sites])
    return dict(zip((site.name for site in sites), by_site, strict=True))


def score_threshold(nested_sites: NestedSites, keep: float, limits: BudgetLimits | None = None) -> float:
    """The score above which units hold the share `keep` of the prunable parameters.

    Under limits, the share of all prices that belongs to this keep.
    """
    share = limits.price_share_at(keep) if limits else keep
    prices = _unit_prices(nested_sites.sites, limits)
    order = nested_sites.units_by_score
    price_shares = torch.cumsum(prices.index_select(0, order), 0) / prices.sum()
    position = torch.searchsorted(price_shares, share).clamp(max=len(order) - 1)
    return float(nested_sites.scores[order[position]])


def _unit_prices(sites: Sequence[Site], limits: BudgetLimits | None) -> Tensor:
    """Price of every unit without what it contains, site after site: float64 [N]."""
    by_site = (limits and limits.prices) or {site.name: float(site.unit_params) for site in sites}
    prices = torch.tensor([by_site[site.name] for site in sites], dtype=torch.float64)
    return prices.repeat_interleave(torch.tensor([site.units for site in sites]))
