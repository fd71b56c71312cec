"""Rules of a legal plan: multiples that widths have to be, least numbers of units, layers that keep everything."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prunetune.cost.budget_limits import BudgetLimits
from prunetune.errors import PlanError
from prunetune.pruning.units import Site, UnitKind, count_params, prunable_params

EXPERT_ROW_ALIGN = 8  # grouped kernels for experts want rows of 16 bytes


@dataclass(frozen=True)
class PlanConstraints:
    """The rules that every plan of a run keeps to. A width is the number of units that each group of a site keeps."""

    layout: str = "per-layer"  # or "uniform": one width per kind for all layers
    align: int = 128  # MLP widths are multiples of this, or the dense width
    min_groups: int = 0  # least KV groups of a layer
    # Whether a uniform model may have this many KV groups in all its layers. Where query heads are units of their own,
    # the second argument is the number of them in a group.
    allows_groups: Callable[..., bool] = lambda groups, ratio=None: True
    min_share: float = 0.0  # least share of the units of a site, but for whole blocks and layers
    min_experts: int = 0  # least experts of a layer
    min_queries: int = 1  # least query heads of a KV group
    protected: frozenset[int] = frozenset()  # layers that keep everything
    limits: BudgetLimits | None = None  # budgets other than a share of the parameters
    budget_of: str = "decoder"  # or "model": what `budget.keep` is a share of
    model_params: int = 0  # of the whole dense model, if the budget is of that
    original_params: int = 0  # the same with all tokens, if `budget.vocab` has pruned some; then the share is of these
    tensor_parallel: int = 1  # KV groups and MLP widths are multiples of this, so that as many devices share a layer

    def unit_price(self, site: Site) -> float:
        """What a unit and all that it contains take of the budget: parameters, or prices under limits."""
        if self.limits and self.limits.prices_with_children:
            return self.limits.prices_with_children[site.name]
        return site.total_unit_params + (site.outer_params if self.budget_of == "model" else 0)


def default_align(sites: Sequence[Site]) -> int:
    """128 channels, as GPUs and 4-bit formats want it; for narrow models at most 32, which both want at least."""
    widest = max((site.units_per_group for site in sites if site.kind.is_channel), default=1)
    align = 128 if widest >= 4096 else max(1, min(32, widest // 4))
    if any(site.kind is UnitKind.EXPERT_CHANNEL for site in sites):
        return max(EXPERT_ROW_ALIGN, align - align % EXPERT_ROW_ALIGN)
    return align


def block_size(site: Site, constraints: PlanConstraints) -> int:
    """Units of a group that are added or removed together."""
    if site.kind is UnitKind.HIDDEN_CHANNEL:  # of the dense width, as blocks of quantised weights lie along it
        return 128 if site.units >= 4096 else 64 if site.units >= 512 else 32 if site.units >= 256 else 8
    if site.kind.is_channel:
        return math.lcm(constraints.align, constraints.tensor_parallel)
    return constraints.tensor_parallel if site.kind.is_divided_by_tensor_parallel else 1


def budget_params(sites: Sequence[Site], counts: Mapping[str, int], constraints: PlanConstraints) -> int:
    """Parameters that `budget.keep` counts, under {site: units kept}: of decoder layers, or of the whole model."""
    params = int(count_params(sites, counts))
    if constraints.budget_of == "decoder":
        return params
    outer = sum((site.units - counts[site.name]) * site.outer_params for site in sites)
    return constraints.model_params - (prunable_params(sites) - params) - outer


def budget_share(sites: Sequence[Site], counts: Mapping[str, int], constraints: PlanConstraints) -> float:
    """The share that `budget.keep` limits, under {site: units kept}."""
    dense = {site.name: site.units for site in sites}
    whole = constraints.original_params or budget_params(sites, dense, constraints)
    return budget_params(sites, counts, constraints) / whole


def check_tensor_parallel(sites: Sequence[Site], constraints: PlanConstraints) -> None:
    """Raises `PlanError` if the widths of the dense model are no multiples of `tensor_parallel`."""
    devices = constraints.tensor_parallel
    split_sites = [site for site in sites if site.kind.is_divided_by_tensor_parallel]
    uneven = next((site for site in split_sites if site.units_per_group % devices), None)
    if uneven is not None:
        units = "KV groups" if uneven.kind is UnitKind.KV_GROUP else "channels"
        divisor = math.gcd(*(site.units_per_group for site in split_sites))
        raise PlanError(
            f"budget.tensor_parallel {devices} does not divide the {uneven.units_per_group} {units} of {uneven.name}: "
            f"use a divisor of {divisor}"
        )


def min_width(site: Site, constraints: PlanConstraints) -> int:
    """The fewest units that each open group of a site may keep."""
    if site.layer in constraints.protected:
        return site.units_per_group
    size = block_size(site, constraints)
    lowest = {
        UnitKind.MLP_CHANNEL: size,
        UnitKind.EXPERT_CHANNEL: size,
        UnitKind.HIDDEN_CHANNEL: size,
        UnitKind.KV_GROUP: size * math.ceil(max(site.min_units_per_group, constraints.min_groups) / size),
        UnitKind.QUERY_HEAD: max(1, constraints.min_queries),
        UnitKind.EXPERT: max(site.min_units_per_group, constraints.min_experts),
    }.get(site.kind, site.min_units_per_group)
    if constraints.min_share and not site.kind.is_whole_block:
        lowest = max(lowest, size * -int(-constraints.min_share * site.units_per_group // size))
    return min(lowest, site.units_per_group)
