"""One width per kind for all layers: of the maximal shapes, the one that keeps the highest scores."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from prunetune.errors import PlanError
from prunetune.pruning.units import Site, UnitKind
from prunetune.search.nested_sites import NestedSites
from prunetune.search.plan_rules import PlanConstraints, block_size, min_width

FitsBudgets = Callable[[Mapping[str, int]], bool]  # whether widths by site are within all further budgets


@dataclass(frozen=True)
class UniformCounts:
    """Layers, and what each of them has of all but channels."""

    layers: int
    groups: int = 0
    queries: int = 0  # query heads of a KV group
    experts: int = 0

    def __le__(self, other: UniformCounts) -> bool:
        """Whether nothing of it is more."""
        return all(mine <= theirs for mine, theirs in zip(self.as_tuple(), other.as_tuple(), strict=True))

    def as_tuple(self) -> tuple[int, ...]:
        """As a tuple."""
        return (self.layers, self.groups, self.queries, self.experts)


class UniformPlanner:
    """The shapes that all layers may have, their prices, and what they are worth under given scores."""

    def __init__(self, nested_sites: NestedSites, constraints: PlanConstraints) -> None:
        self.nested_sites, self.constraints = nested_sites, constraints
        self.unprotected_constraints = replace(
            constraints, protected=frozenset()
        )  # a layer that stays may be as narrow as all
        self.layers = tuple(site for site in nested_sites.sites if site.kind is UnitKind.LAYER)
        whole = [site.name for site in self.layers if nested_sites.max_width(site)]
        self.count = len(whole) if self.layers else len({site.layer for site in nested_sites.sites})
        first = nested_sites.sites[0].layer
        self.sites_by_kind: dict[UnitKind, Site] = {
            site.kind: site for site in nested_sites.sites if site.layer == first
        }
        self._refuse()
        self.sums: dict[tuple[str, int, int, bool], float] = {}

    def _refuse(self) -> None:
        blocks = [
            kind.recipe_name for kind in (UnitKind.ATTENTION_BLOCK, UnitKind.MLP_BLOCK) if kind in self.sites_by_kind
        ]
        if blocks:
            raise PlanError(
                f"layout uniform has no word for layers without {' or '.join(blocks)}: use layout per-layer"
            )
        made = {(site.kind, site.units, site.unit_params, site.parent_groups) for site in self.nested_sites.sites}
        if len(made) > len({site.kind for site in self.nested_sites.sites}):
            raise PlanError("layout uniform needs equal layers, and this model's differ: use layout per-layer")

    def _range(self, kind: UnitKind, *, least: int = 1) -> range:
        site = self.sites_by_kind.get(kind)
        return (
            range(max(least, min_width(site, self.unprotected_constraints)), self._most(kind) + 1) if site else range(1)
        )

    def _most(self, kind: UnitKind) -> int:
        """Most units that a lane of any layer may keep."""
        return max(self.nested_sites.max_width(site) for site in self.nested_sites.sites if site.kind == kind)

    def legal_counts(self) -> Iterator[UniformCounts]:
        """All that are legal."""
        kept = sum(min_width(site, self.constraints) for site in self.layers)
        layers = range(max(1, kept), self.count + 1) if self.layers else range(self.count, self.count + 1)
        for number, experts in itertools.product(layers, self._range(UnitKind.EXPERT)):
            for groups, queries in itertools.product(self._range(UnitKind.KV_GROUP), self._range(UnitKind.QUERY_HEAD)):
                if self._is_legal(groups, queries):
                    yield UniformCounts(number, groups, queries, experts)

    def _is_legal(self, groups: int, queries: int) -> bool:
        if groups % self.constraints.tensor_parallel:
            return False
        if heads := self.sites_by_kind.get(UnitKind.QUERY_HEAD):
            return self.constraints.allows_groups(groups or heads.parent_groups, queries)
        return self.constraints.allows_groups(groups) if groups else True

    def channel_widths(self) -> list[int]:
        """Widths of an MLP or of an expert; 0 where these are no units."""
        site = next((site for kind, site in self.sites_by_kind.items() if kind.is_channel), None)
        if site is None:
            return [0]
        size, most = block_size(site, self.unprotected_constraints), self._most(site.kind)
        return [*range(min_width(site, self.unprotected_constraints), most, size), most]

    def widths_by_kind(self, counts: UniformCounts, channels: int) -> dict[UnitKind, int]:
        """Units that a lane keeps, by kind."""
        return {
            UnitKind.LAYER: 1,
            UnitKind.KV_GROUP: counts.groups,
            UnitKind.QUERY_HEAD: counts.queries,
            UnitKind.EXPERT: counts.experts,
            UnitKind.MLP_CHANNEL: channels,
            UnitKind.EXPERT_CHANNEL: channels,
        }

    def widths_by_site(self, counts: UniformCounts, channels: int) -> dict[str, int]:
        """The same by site: of layers, those that stay."""
        by_kind, left = self.widths_by_kind(counts, channels), self.kept_layers(counts.layers)
        return {
            site.name: int(site.layer in left) if site.kind is UnitKind.LAYER else by_kind[site.kind]
            for site in self.nested_sites.sites
        }

    def total_params(self, counts: UniformCounts, channels: int) -> int:
        """Parameters of so many such layers."""
        by_kind = self.widths_by_kind(counts, channels)
        widths = {site.name: by_kind[kind] for kind, site in self.sites_by_kind.items()}
        roots = (site for site in self.sites_by_kind.values() if not site.parent)
        return counts.layers * sum(
            widths[site.name] * site.parent_groups * self.nested_sites.params_with_children(site, widths)
            for site in roots
        )

    def maximal_fits(self, target: int, fits_budgets: FitsBudgets | None) -> dict[UniformCounts, tuple[int, int]]:
        """{counts: (price, channels)}: the widest channels that still fit; maximal ones only.

        Scores may be negative, and then a shape with room to spare would look worth more.
        """
        found = {}
        widths = self.channel_widths()
        for counts in self.legal_counts():
            low, slope = (
                self.total_params(counts, widths[0]),
                self.total_params(counts, widths[0] + 1) - self.total_params(counts, widths[0]),
            )
            fits = [width for width in widths if low + (width - widths[0]) * slope <= target]
            if fits_budgets is not None:
                fits = fits[: self._count_within_budgets(counts, fits, fits_budgets)]
            if fits:
                found[counts] = (low + (fits[-1] - widths[0]) * slope, fits[-1])
        return {counts: fit for counts, fit in found.items() if not self._is_dominated(counts, fit[1], found)}

    def _count_within_budgets(self, counts: UniformCounts, widths: Sequence[int], fits_budgets: FitsBudgets) -> int:
        """How many are within further budgets: wider ones cost no less, so that a bisection finds the last."""
        return bisect.bisect_left(widths, True, key=lambda width: not fits_budgets(self.widths_by_site(counts, width)))

    def _is_dominated(
        self, counts: UniformCounts, channels: int, found: Mapping[UniformCounts, tuple[int, int]]
    ) -> bool:
        """Whether a shape that is nowhere less and somewhere more fits too; widths fall as counts rise, so that the
        next shape in each direction tells of all behind it."""
        more = [replace(counts, layers=counts.layers + 1), replace(counts, experts=counts.experts + 1)]
        heads = itertools.product(self._range(UnitKind.KV_GROUP), self._range(UnitKind.QUERY_HEAD))
        more += [replace(counts, groups=groups, queries=queries) for groups, queries in heads]
        others = (other for other in more if other in found and other != counts and counts <= other)
        return any(found[other][1] >= channels for other in others)

    def kept_layers(self, number: int) -> set[int]:
        """Those that have to stay, then the best."""
        if not self.layers:
            return {site.layer for site in self.nested_sites.sites}
        ranked = sorted(
            self.layers,
            key=lambda site: (
                -min_width(site, self.constraints),
                -self.nested_sites.max_width(site),
                -self._best(site),
                site.layer,
            ),
        )
        return {site.layer for site in ranked[:number]}

    def _best(self, site: Site) -> float:
        return self.nested_sites.best_score(site) if self.nested_sites.ranked_scores else 0.0

    def weighted_score(self, counts: UniformCounts, channels: int) -> float:
        """Scores of all that stays, each times its parameters."""
        by_kind, left, value = self.widths_by_kind(counts, channels), self.kept_layers(counts.layers), 0.0
        for site in self.nested_sites.sites:
            if site.layer in left:
                outer = self.nested_sites.parent(site)
                around = by_kind[outer.kind] if outer else 1
                value += self._cached_score_sum(site, by_kind[site.kind], around) * site.unit_params
        return value

    def _cached_score_sum(self, site: Site, width: int, around: int) -> float:
        """Of the best scores in a site; none counts for more than its layer."""
        key = (site.name, width, around, bool(self.layers))
        if key not in self.sums:
            self.sums[key] = self._score_sum(site, width, around)
        return self.sums[key]

    def _score_sum(self, site: Site, width: int, around: int) -> float:
        outer = self.nested_sites.parent(site)
        ranked = self.nested_sites.ranked_scores[site.name]
        if outer and outer.kind is not UnitKind.LAYER:
            units = self.nested_sites.ranked_units[outer.name][0][:around] - self.nested_sites.first_unit[outer.name]
            ranked = ranked[site.open_parent_groups(units.tolist(), outer.units)]
        if self.layers:
            layer = next(one for one in self.layers if one.layer == site.layer)
            ranked = ranked.clamp(max=self.nested_sites.best_score(layer))
        top = ranked[:, :width]
        return float((top[0] if len(top) == 1 else top).sum()) if top.numel() else 0.0


def uniform_widths(
    nested_sites: NestedSites, target: int, constraints: PlanConstraints, fits_budgets: FitsBudgets | None
) -> dict[str, int]:
    """One width per kind for all layers: of the maximal shapes, the one that keeps the highest scores."""
    uniform = UniformPlanner(nested_sites, constraints)
    best = uniform.maximal_fits(target, fits_budgets)
    if not best:
        raise PlanError("no uniform shape meets all budgets at once: use layout per-layer, or raise one of them")

    def worth(counts: UniformCounts) -> tuple[float, int]:
        price, channels = best[counts]
        return uniform.weighted_score(counts, channels), price

    chosen = max(best, key=worth)
    return uniform.widths_by_site(chosen, best[chosen][1])


def min_uniform_widths(nested_sites: NestedSites, constraints: PlanConstraints) -> dict[str, int]:
    """Widths of the smallest shape."""
    uniform = UniformPlanner(nested_sites, constraints)
    lowest = uniform.channel_widths()[0]
    return uniform.widths_by_site(
        min(uniform.legal_counts(), key=lambda counts: uniform.total_params(counts, lowest)), lowest
    )
