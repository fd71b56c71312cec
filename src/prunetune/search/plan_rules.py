"""What a legal plan looks like: alignment, floors, layers that keep everything."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prunetune.cost.limits import BudgetLimits
from prunetune.errors import PlanError
from prunetune.pruning.units import Site, UnitKind

EXPERT_ROW_ALIGN = 8  # grouped kernels for experts want rows of 16 bytes


@dataclass(frozen=True)
class PlanConstraints:
    """What a legal plan looks like."""

    layout: str = "per-layer"
    align: int = 128  # MLP widths are multiples of this (or the dense width)
    min_groups: int = 0  # KV groups that every layer keeps
    # May all layers have this many? (uniform layout); where query heads go on their own, asked with those of a group.
    allows_groups: Callable[..., bool] = lambda groups, ratio=None: True
    min_share: float = 0.0  # of the units that every place keeps
    min_experts: int = 0  # that every layer keeps
    min_queries: int = 1  # query heads that every KV group keeps
    protected: frozenset[int] = frozenset()  # layers that keep everything
    limits: BudgetLimits | None = None  # budgets beside the share of parameters
    tensor_parallel: int = 1  # KV groups and MLP widths are multiples of this, so that so many devices share a layer


def default_align(sites: Sequence[Site]) -> int:
    """128 channels, the width that GPUs and 4-bit formats want; 32, the floor of both, for narrow models."""
    widest = max((site.units_per_group for site in sites if site.kind.is_channel), default=1)
    align = 128 if widest >= 4096 else max(1, min(32, widest // 4))
    if any(site.kind is UnitKind.EXPERT_CHANNEL for site in sites):
        return max(EXPERT_ROW_ALIGN, align - align % EXPERT_ROW_ALIGN)
    return align


def block_size(site: Site, constraints: PlanConstraints) -> int:
    """Units of a lane that come or go together."""
    if site.kind.is_channel:
        return math.lcm(constraints.align, constraints.tensor_parallel)
    return constraints.tensor_parallel if site.kind.is_divided_by_tensor_parallel else 1


def check_tensor_parallel(sites: Sequence[Site], constraints: PlanConstraints) -> None:
    """A number of devices that the dense model itself does not divide over raises `PlanError`."""
    shared = [site for site in sites if site.kind.is_divided_by_tensor_parallel]
    odd = next((site for site in shared if site.units_per_group % constraints.tensor_parallel), None)
    if odd:
        units = "channels" if odd.kind.is_channel else "KV groups"
        fitting = math.gcd(*(site.units_per_group for site in shared))
        raise PlanError(
            f"budget.tensor_parallel {constraints.tensor_parallel} does not divide the {odd.units_per_group} {units} of {odd.name}: "
            f"use a divisor of {fitting}"
        )


def min_width(site: Site, constraints: PlanConstraints) -> int:
    """Fewest units that a lane of a site keeps, where what is around it stays."""
    if site.layer in constraints.protected:
        return site.units_per_group
    size = block_size(site, constraints)
    lowest = {
        UnitKind.MLP_CHANNEL: size,
        UnitKind.EXPERT_CHANNEL: size,
        UnitKind.KV_GROUP: -(-max(site.min_units_per_group, constraints.min_groups) // size) * size,
        UnitKind.QUERY_HEAD: max(1, constraints.min_queries),
        UnitKind.EXPERT: max(site.min_units_per_group, constraints.min_experts),
    }.get(site.kind, site.min_units_per_group)
    if constraints.min_share and not site.kind.is_whole_block:
        lowest = max(lowest, size * -int(-constraints.min_share * site.units_per_group // size))
    return min(lowest, site.units_per_group)
