"""The share of prunable parameters that gates keep, and the loss that pulls it to its target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from prunetune.pruning.units import Site, effective_gates


def prunable_params(sites: Iterable[Site]) -> int:
    """Prunable parameters of the dense model."""
    return sum(site.params for site in sites)


def kept_share(gates: Mapping[str, Tensor], sites: Iterable[Site], prices: Mapping[str, float] | None = None) -> Tensor:
    """Share of the prunable parameters, or of the units' prices, that gates keep: differentiable scalar in [0, 1]."""
    sites = tuple(sites)
    gates = effective_gates(gates, sites)
    unit_prices = {site.name: site.unit_params if prices is None else prices[site.name] for site in sites}
    kept = torch.stack([gates[site.name].sum() * unit_prices[site.name] for site in sites]).sum()
    return kept / sum(site.units * unit_prices[site.name] for site in sites)


def keep_ratio_loss(share: Tensor, target: float) -> Tensor:
    """|log(share / target)| (ATP, authors' code): zero on target; twice the target costs as much as half of it."""
    return torch.log(share.clamp_min(1e-6) / target).abs()
