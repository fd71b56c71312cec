"""Laws of the share of parameters that gates keep, and of the loss that pulls it to its target."""

from __future__ import annotations

import math

import pytest
import torch

from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import kept_share, prunable_params
from prunetune.search.searcher import keep_ratio_loss
from support.models import tiny


def test_loss_of_a_share_is_the_absolute_logarithm_of_its_ratio_to_the_target() -> None:
    for ratio in (0.25, 0.5, 0.9, 1.0, 1.1, 2.0, 3.0):
        loss = keep_ratio_loss(torch.tensor(0.3 * ratio, dtype=torch.float64), 0.3)
        assert float(loss) == pytest.approx(abs(math.log(ratio)), abs=1e-12)
    assert math.isfinite(keep_ratio_loss(torch.tensor(0.0), 0.3))


def test_kept_share_weighs_units_by_their_parameters_or_prices() -> None:
    sites = find_sites(tiny())
    gates = {site.name: torch.zeros(site.units) for site in sites}
    gates[sites[0].name][0] = 1.0
    share = sites[0].unit_params / sum(site.units * site.unit_params for site in sites)
    assert float(kept_share(gates, sites)) == pytest.approx(share)
    assert prunable_params(sites) == sum(site.units * site.unit_params for site in sites)
    prices = {site.name: 3.0 if site is sites[0] else 1.0 for site in sites}
    total = sum(site.units * prices[site.name] for site in sites)
    assert float(kept_share(gates, sites, prices)) == pytest.approx(3.0 / total)
