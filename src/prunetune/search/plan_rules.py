"""What a legal plan looks like: alignment, floors, layers that keep everything."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prunetune.cost.limits import Limits
from prunetune.errors import PlanError
from prunetune.pruning.units import Site

GROUPED = 8  # grouped kernels for experts want rows of 16 bytes
CHANNELS = ("mlp", "expert-channels")


@dataclass(frozen=True)
class Shape:
    """What a legal plan looks like."""

    layout: str = "per-layer"
    align: int = 128  # MLP widths are multiples of this (or the dense width)
    min_groups: int = 0  # KV groups that every layer keeps
    # May all layers have this many? (uniform layout); where query heads go on their own, asked with those of a group.
    legal_groups: Callable[..., bool] = lambda groups, ratio=None: True
    min_share: float = 0.0  # of the units that every place keeps
    min_experts: int = 0  # that every layer keeps
    min_queries: int = 1  # query heads that every KV group keeps
    protected: frozenset[int] = frozenset()  # layers that keep everything
    limits: Limits | None = None  # budgets beside the share of parameters
    tensor_parallel: int = 1  # KV groups and MLP widths are multiples of this, so that so many devices share a layer


def default_align(sites: Sequence[Site]) -> int:
    """128 channels, the width that GPUs and 4-bit formats want; 32, the floor of both, for narrow models."""
    widest = max((site.length for site in sites if site.kind in CHANNELS), default=1)
    align = 128 if widest >= 4096 else max(1, min(32, widest // 4))
    if any(site.kind == "expert-channels" for site in sites):
        return max(GROUPED, align - align % GROUPED)
    return align


def step(site: Site, shape: Shape) -> int:
    """Units of a lane that come or go together."""
    if site.kind in CHANNELS:
        return math.lcm(shape.align, shape.tensor_parallel)
    return shape.tensor_parallel if site.kind == "attention" else 1


def refuse_devices(sites: Sequence[Site], shape: Shape) -> None:
    """A number of devices that the dense model itself does not divide over raises `PlanError`."""
    shared = [site for site in sites if site.kind in (*CHANNELS, "attention")]
    odd = next((site for site in shared if site.length % shape.tensor_parallel), None)
    if odd:
        units = "KV groups" if odd.kind == "attention" else "channels"
        fitting = math.gcd(*(site.length for site in shared))
        raise PlanError(
            f"budget.tensor_parallel {shape.tensor_parallel} does not divide the {odd.length} {units} of {odd.name}: "
            f"use a divisor of {fitting}"
        )


def floor_width(site: Site, shape: Shape) -> int:
    """Fewest units that a lane of a site keeps, where what is around it stays."""
    if site.layer in shape.protected:
        return site.length
    size = step(site, shape)
    lowest = {
        "mlp": size,
        "expert-channels": size,
        "attention": -(-max(site.floor, shape.min_groups) // size) * size,
        "query-heads": max(1, shape.min_queries),
        "experts": max(site.floor, shape.min_experts),
    }.get(site.kind, site.floor)
    if shape.min_share and not site.is_whole:
        lowest = max(lowest, size * -int(-shape.min_share * site.length // size))
    return min(lowest, site.length)
