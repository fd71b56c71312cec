"""Helpers of tests of search: nested sites, scores, constraints, and parametrisations over families and layouts."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import Site
from prunetune.search.plan_rules import PlanConstraints
from support.models import kinds_of, tiny

ALIGN = 8  # channels of a block
UNIFORM_UNITS = ("layers", "kv-groups", "query-heads", "mlp-channels", "experts", "expert-channels")


@cache
def sites_of(family: str, uniform: bool) -> tuple[Site, ...]:
    """Of all kinds but hidden channels, whose number is chosen around all other decisions."""
    kinds = [kind for kind in kinds_of(family) if kind != "hidden-channels"]
    units = [kind for kind in kinds if not uniform or kind in UNIFORM_UNITS]
    return find_sites(tiny(family, layers=5, groups=3, ratio=3, hidden_size=72), units)


def random_scores(sites: tuple[Site, ...], seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {site.name: torch.randn(site.units, generator=rng) for site in sites}


def constraints_for(layout: str, **bounds: Any) -> PlanConstraints:
    return PlanConstraints(layout, ALIGN, **bounds)


FAMILIES = ("qwen3", "mixtral", "gpt_oss", "gpt2")
every_family = pytest.mark.parametrize("family", FAMILIES)
both_layouts = pytest.mark.parametrize("layout", ["per-layer", "uniform"])
