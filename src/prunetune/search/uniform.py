"""The layout uniform: one width per kind for all layers, chosen by the scores it keeps.

A *shape* is the number of layers and the width of every kind of unit in each of them. A width is the number of units
that each open group of a site keeps: MLP channels, KV groups, query heads of a KV group, experts.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from prunetune.errors import PlanError
from prunetune.pruning.units import Site, UnitKind
from prunetune.search.nested_sites import NestedSites, SiteWidths
from prunetune.search.plan_rules import PlanConstraints, block_size, min_width

HEADS = (UnitKind.KV_GROUP, UnitKind.QUERY_HEAD)
FitsBudgets = Callable[[SiteWidths], bool]  # whether these widths are within all budgets but that of parameters


@dataclass(frozen=True)
class UniformCounts:
    """A shape without its channels: the number of layers, and the width of every other kind in each of them."""

    layers: int
    groups: int = 0
    queries: int = 0  # query heads of a KV group
    experts: int = 0


Fits = dict[UniformCounts, tuple[int, int]]  # counts -> (parameters, channels) of a shape within the budgets


class UniformPlanner:
    """The shapes that all layers of a model may have, their parameters, and the scores that each keeps.

    Raises `PlanError` if layers differ, or could lose one of their blocks.
    """

    def __init__(self, nested_sites: NestedSites, constraints: PlanConstraints) -> None:
        self.nested_sites, self.constraints = nested_sites, constraints
        # Protected layers are kept, but may be as narrow as all others.
        self.width_constraints = replace(constraints, protected=frozenset())
        self.layer_sites = tuple(site for site in nested_sites.sites if site.kind is UnitKind.LAYER)
        if self.layer_sites:
            self.num_layers = sum(nested_sites.max_width(site) > 0 for site in self.layer_sites)
        else:
            self.num_layers = len({site.layer for site in nested_sites.sites})
        first = nested_sites.sites[0].layer
        self.sites_by_kind = {site.kind: site for site in nested_sites.sites if site.layer == first}
        self.score_sums: dict[tuple[str, int, int], float] = {}  # by site, width, width of its parent
        self.lowest_score = min([0.0, *(float(own.min()) for own in nested_sites.ranked_scores.values())])
        block_kinds = (UnitKind.ATTENTION_BLOCK, UnitKind.MLP_BLOCK)
        if blocks := [kind.recipe_name for kind in block_kinds if kind in self.sites_by_kind]:
            raise PlanError(f"layout uniform cannot express layers without {' or '.join(blocks)}: use layout per-layer")
        sizes = {(site.kind, site.units, site.unit_params, site.parent_groups) for site in nested_sites.sites}
        if len(sizes) > len({site.kind for site in nested_sites.sites}):
            raise PlanError("layout uniform needs equal layers, and this model's differ: use layout per-layer")

    # -- legal shapes ----------------------------------------------------------------------------------------------

    def legal_counts(self) -> Iterator[UniformCounts]:
        """All legal numbers of layers, KV groups, query heads and experts."""
        min_layers = self.num_layers
        if self.layer_sites:
            min_layers = max(1, sum(min_width(site, self.constraints) for site in self.layer_sites))
        layer_range, kinds = range(min_layers, self.num_layers + 1), (UnitKind.EXPERT, *HEADS)
        for layers, experts, groups, queries in itertools.product(layer_range, *map(self._width_range, kinds)):
            if self._allows_heads(groups, queries):
                yield UniformCounts(layers, groups, queries, experts)

    def _width_range(self, kind: UnitKind) -> range:
        """Widths of a kind, from the least to the most; 0 alone where the kind is not pruned."""
        site = self.sites_by_kind.get(kind)
        if site is None:
            return range(1)
        return range(max(1, min_width(site, self.width_constraints)), self._max_width(kind) + 1)

    def _max_width(self, kind: UnitKind) -> int:
        """The most units that a group may keep in any layer."""
        return max(self.nested_sites.max_width(site) for site in self.nested_sites.sites if site.kind == kind)

    def _allows_heads(self, groups: int, queries: int) -> bool:
        if groups % self.constraints.tensor_parallel:
            return False
        if site := self.sites_by_kind.get(UnitKind.QUERY_HEAD):
            # Where KV groups are not pruned, all are kept.
            return self.constraints.allows_groups(groups or site.parent_groups, queries)
        return self.constraints.allows_groups(groups) if groups else True

    def channel_widths(self) -> list[int]:
        """Ascending widths of an MLP or of an expert; 0 alone where channels are not pruned."""
        site = next((site for kind, site in self.sites_by_kind.items() if kind.is_channel), None)
        if site is None:
            return [0]
        narrowest, widest = min_width(site, self.width_constraints), self._max_width(site.kind)
        return [*range(narrowest, widest, block_size(site, self.width_constraints)), widest]

    # -- widths and parameters of a shape --------------------------------------------------------------------------

    def widths_by_kind(self, counts: UniformCounts, channels: int) -> dict[UnitKind, int]:
        """The shape as widths of a layer that is kept: {kind: units of each open group}."""
        return {
            UnitKind.LAYER: 1,
            UnitKind.KV_GROUP: counts.groups,
            UnitKind.QUERY_HEAD: counts.queries,
            UnitKind.EXPERT: counts.experts,
            UnitKind.MLP_CHANNEL: channels,
            UnitKind.EXPERT_CHANNEL: channels,
        }

    def widths_by_site(self, counts: UniformCounts, channels: int) -> dict[str, int]:
        """The shape as widths of all sites, with the best layers kept: {site: units of each open group}."""
        by_kind, kept_layers = self.widths_by_kind(counts, channels), self.kept_layers(counts.layers)
        return {
            site.name: int(site.layer in kept_layers) if site.kind is UnitKind.LAYER else by_kind[site.kind]
            for site in self.nested_sites.sites
        }

    def kept_layers(self, number: int) -> set[int]:
        """So many layers: first those that must be kept, then those of highest score."""
        if not self.layer_sites:
            return {site.layer for site in self.nested_sites.sites}

        def rank(site: Site) -> tuple[float, ...]:
            score = self.nested_sites.best_score(site) if self.nested_sites.ranked_scores else 0.0
            return (-min_width(site, self.constraints), -self.nested_sites.max_width(site), -score, site.layer)

        return {site.layer for site in sorted(self.layer_sites, key=rank)[:number]}

    def total_params(self, counts: UniformCounts, channels: int) -> int:
        """Prunable parameters of a model of this shape."""
        by_kind = self.widths_by_kind(counts, channels)
        widths = {site.name: by_kind[kind] for kind, site in self.sites_by_kind.items()}
        layer_params = sum(
            widths[site.name] * site.parent_groups * self.nested_sites.params_with_children(site, widths)
            for site in self.sites_by_kind.values()
            if not site.parent
        )
        return counts.layers * layer_params

    # -- shapes within the budgets ---------------------------------------------------------------------------------

    def fits(self, target_params: int, fits_budgets: FitsBudgets | None) -> Fits:
        """The shapes within the budgets, each with the widest channels that fit."""
        fits: Fits = {}
        channel_widths = self.channel_widths()
        narrowest = channel_widths[0]
        for counts in self.legal_counts():
            least_params = self.total_params(counts, narrowest)
            channel_params = self.total_params(counts, narrowest + 1) - least_params
            params_by_width = {width: least_params + (width - narrowest) * channel_params for width in channel_widths}
            widths = [width for width in channel_widths if params_by_width[width] <= target_params]
            if fits_budgets is not None:
                widths = widths[: self._count_within_budgets(counts, widths, fits_budgets)]
            if widths:
                fits[counts] = (params_by_width[widths[-1]], widths[-1])
        return fits

    def _count_within_budgets(self, counts: UniformCounts, widths: Sequence[int], fits_budgets: FitsBudgets) -> int:
        """How many of these channel widths fit the budgets, by bisection: wider ones cost no less."""
        return bisect.bisect_left(widths, True, key=lambda width: not fits_budgets(self.widths_by_site(counts, width)))

    # -- scores of a shape -----------------------------------------------------------------------------------------

    def weighted_score(self, counts: UniformCounts, channels: int) -> float:
        """The sum over all kept units of score times parameters: a larger shape never has less, to the bit.

        So scores count from the lowest if that is negative, and are added one after the other.
        """
        by_kind, kept_layers, total = self.widths_by_kind(counts, channels), self.kept_layers(counts.layers), 0.0
        for site in self.nested_sites.sites:
            if site.layer in kept_layers:
                parent = self.nested_sites.parent(site)
                parent_width = by_kind[parent.kind] if parent else 1
                key = (site.name, by_kind[site.kind], parent_width)
                if key not in self.score_sums:
                    self.score_sums[key] = self._score_sum(site, by_kind[site.kind], parent_width)
                total += self.score_sums[key] * site.unit_params
        return total

    def _score_sum(self, site: Site, width: int, parent_width: int) -> float:
        """Sum of the best scores of a site's open groups; where layers are pruned, none exceeds its layer's."""
        nested_sites, parent = self.nested_sites, self.nested_sites.parent(site)
        scores = nested_sites.ranked_scores[site.name] - self.lowest_score  # [G, U / G]
        if parent and parent.kind is not UnitKind.LAYER:
            best_parents = nested_sites.ranked_units[parent.name][0][:parent_width]
            kept_parents = (best_parents - nested_sites.first_unit[parent.name]).tolist()
            scores = scores[site.open_parent_groups(kept_parents, parent.units)]
        if self.layer_sites:
            layer_site = next(layer_site for layer_site in self.layer_sites if layer_site.layer == site.layer)
            scores = scores.clamp(max=nested_sites.best_score(layer_site) - self.lowest_score)
        best = scores[:, :width]
        return float(best.cumsum(1)[:, -1].cumsum(0)[-1]) if best.numel() else 0.0


def uniform_widths(
    nested_sites: NestedSites, target_params: int, constraints: PlanConstraints, fits_budgets: FitsBudgets | None
) -> dict[str, int]:
    """Widths of the shape that keeps the highest scores: {site: units of each open group}.

    Raises `PlanError` if no shape is within all budgets.
    """
    planner = UniformPlanner(nested_sites, constraints)
    fits = planner.fits(target_params, fits_budgets)
    if not fits:
        raise PlanError("no uniform shape meets all budgets at once: use layout per-layer, or raise one of them")
    # By score, then by parameters.
    best = max(fits, key=lambda counts: (planner.weighted_score(counts, fits[counts][1]), fits[counts][0]))
    return planner.widths_by_site(best, fits[best][1])


def min_uniform_widths(nested_sites: NestedSites, constraints: PlanConstraints) -> dict[str, int]:
    """Widths of the smallest legal shape: {site: units of each open group}."""
    planner = UniformPlanner(nested_sites, constraints)
    narrowest = planner.channel_widths()[0]
    smallest = min(planner.legal_counts(), key=lambda counts: planner.total_params(counts, narrowest))
    return planner.widths_by_site(smallest, narrowest)
