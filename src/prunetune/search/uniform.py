"""One width per kind for all layers: of the maximal shapes, the one that keeps the highest scores."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from prunetune.errors import PlanError
from prunetune.pruning.units import NAMES, Kind, Site
from prunetune.search.nested_sites import Nest
from prunetune.search.plan_rules import CHANNELS, Shape, floor_width, step

Holds = Callable[[Mapping[str, int]], bool]  # whether widths by site are within all further budgets


@dataclass(frozen=True)
class Counts:
    """Layers, and what each of them has of all but channels."""

    layers: int
    groups: int = 0
    queries: int = 0  # query heads of a KV group
    experts: int = 0

    def __le__(self, other: Counts) -> bool:
        """Whether nothing of it is more."""
        return all(mine <= theirs for mine, theirs in zip(self.key(), other.key(), strict=True))

    def key(self) -> tuple[int, ...]:
        """As a tuple."""
        return (self.layers, self.groups, self.queries, self.experts)


class Uniform:
    """The shapes that all layers may have, their prices, and what they are worth under given scores."""

    def __init__(self, nest: Nest, shape: Shape) -> None:
        self.nest, self.shape = nest, shape
        self.free = replace(shape, protected=frozenset())  # a layer that stays may be as narrow as all
        self.layers = tuple(site for site in nest.sites if site.kind == "layers")
        whole = [site.name for site in self.layers if nest.most(site)]
        self.count = len(whole) if self.layers else len({site.layer for site in nest.sites})
        first = nest.sites[0].layer
        self.template: dict[Kind, Site] = {site.kind: site for site in nest.sites if site.layer == first}
        self._refuse()
        self.sums: dict[tuple[str, int, int, bool], float] = {}

    def _refuse(self) -> None:
        blocks = [NAMES[kind] for kind in ("attention-blocks", "mlp-blocks") if kind in self.template]
        if blocks:
            raise PlanError(
                f"layout uniform has no word for layers without {' or '.join(blocks)}: use layout per-layer"
            )
        made = {(site.kind, site.units, site.unit_params, site.lanes) for site in self.nest.sites}
        if len(made) > len({site.kind for site in self.nest.sites}):
            raise PlanError("layout uniform needs equal layers, and this model's differ: use layout per-layer")

    def _range(self, kind: Kind, *, least: int = 1) -> range:
        site = self.template.get(kind)
        return range(max(least, floor_width(site, self.free)), self._most(kind) + 1) if site else range(1)

    def _most(self, kind: Kind) -> int:
        """Most units that a lane of any layer may keep."""
        return max(self.nest.most(site) for site in self.nest.sites if site.kind == kind)

    def counts(self) -> Iterator[Counts]:
        """All that are legal."""
        kept = sum(floor_width(site, self.shape) for site in self.layers)
        layers = range(max(1, kept), self.count + 1) if self.layers else range(self.count, self.count + 1)
        for number, experts in itertools.product(layers, self._range("experts")):
            for groups, queries in itertools.product(self._range("attention"), self._range("query-heads")):
                if self._is_legal(groups, queries):
                    yield Counts(number, groups, queries, experts)

    def _is_legal(self, groups: int, queries: int) -> bool:
        if groups % self.shape.tensor_parallel:
            return False
        if "query-heads" in self.template:
            return self.shape.legal_groups(groups or self.template["query-heads"].lanes, queries)
        return self.shape.legal_groups(groups) if groups else True

    def channels(self) -> list[int]:
        """Widths of an MLP or of an expert; 0 where these are no units."""
        site = next((self.template[kind] for kind in CHANNELS if kind in self.template), None)
        if site is None:
            return [0]
        size, most = step(site, self.free), self._most(site.kind)
        return [*range(floor_width(site, self.free), most, size), most]

    def widths(self, counts: Counts, channels: int) -> dict[Kind, int]:
        """Units that a lane keeps, by kind."""
        return {
            "layers": 1, "attention": counts.groups, "query-heads": counts.queries, "experts": counts.experts,
            "mlp": channels, "expert-channels": channels,
        }  # fmt: skip

    def by_site(self, counts: Counts, channels: int) -> dict[str, int]:
        """The same by site: of layers, those that stay."""
        by_kind, left = self.widths(counts, channels), self.kept_layers(counts.layers)
        return {
            site.name: int(site.layer in left) if site.kind == "layers" else by_kind[site.kind]
            for site in self.nest.sites
        }

    def price(self, counts: Counts, channels: int) -> int:
        """Parameters of so many such layers."""
        by_kind = self.widths(counts, channels)
        widths = {site.name: by_kind[kind] for kind, site in self.template.items()}
        roots = (site for site in self.template.values() if not site.within)
        return counts.layers * sum(widths[site.name] * site.lanes * self.nest.span(site, widths) for site in roots)

    def fitting(self, target: int, holds: Holds | None) -> dict[Counts, tuple[int, int]]:
        """{counts: (price, channels)}: the widest channels that still fit; maximal ones only.

        Scores may be negative, and then a shape with room to spare would look worth more.
        """
        found = {}
        widths = self.channels()
        for counts in self.counts():
            low, slope = (
                self.price(counts, widths[0]),
                self.price(counts, widths[0] + 1) - self.price(counts, widths[0]),
            )
            fits = [width for width in widths if low + (width - widths[0]) * slope <= target]
            if holds is not None:
                fits = fits[: self._holding(counts, fits, holds)]
            if fits:
                found[counts] = (low + (fits[-1] - widths[0]) * slope, fits[-1])
        return {counts: fit for counts, fit in found.items() if not self._is_below(counts, fit[1], found)}

    def _holding(self, counts: Counts, widths: Sequence[int], holds: Holds) -> int:
        """How many are within further budgets: wider ones cost no less, so that a bisection finds the last."""
        return bisect.bisect_left(widths, True, key=lambda width: not holds(self.by_site(counts, width)))

    def _is_below(self, counts: Counts, channels: int, found: Mapping[Counts, tuple[int, int]]) -> bool:
        """Whether a shape that is nowhere less and somewhere more fits too; widths fall as counts rise, so that the
        next shape in each direction tells of all behind it."""
        more = [replace(counts, layers=counts.layers + 1), replace(counts, experts=counts.experts + 1)]
        heads = itertools.product(self._range("attention"), self._range("query-heads"))
        more += [replace(counts, groups=groups, queries=queries) for groups, queries in heads]
        others = (other for other in more if other in found and other != counts and counts <= other)
        return any(found[other][1] >= channels for other in others)

    def kept_layers(self, number: int) -> set[int]:
        """Those that have to stay, then the best."""
        if not self.layers:
            return {site.layer for site in self.nest.sites}
        ranked = sorted(
            self.layers,
            key=lambda site: (-floor_width(site, self.shape), -self.nest.most(site), -self._best(site), site.layer),
        )
        return {site.layer for site in ranked[:number]}

    def _best(self, site: Site) -> float:
        return self.nest.best(site) if self.nest.ranked else 0.0

    def worth(self, counts: Counts, channels: int) -> float:
        """Scores of all that stays, each times its parameters."""
        by_kind, left, value = self.widths(counts, channels), self.kept_layers(counts.layers), 0.0
        for site in self.nest.sites:
            if site.layer in left:
                outer = self.nest.outer(site)
                around = by_kind[outer.kind] if outer else 1
                value += self._sum(site, by_kind[site.kind], around) * site.unit_params
        return value

    def _sum(self, site: Site, width: int, around: int) -> float:
        """Of the best scores in a site; none counts for more than its layer."""
        key = (site.name, width, around, bool(self.layers))
        if key not in self.sums:
            self.sums[key] = self._summed(site, width, around)
        return self.sums[key]

    def _summed(self, site: Site, width: int, around: int) -> float:
        outer = self.nest.outer(site)
        ranked = self.nest.ranked[site.name]
        if outer and outer.kind != "layers":
            units = self.nest.lanes[outer.name][0][:around] - self.nest.first[outer.name]
            ranked = ranked[site.owned_lanes(units.tolist(), outer.units)]
        if self.layers:
            layer = next(one for one in self.layers if one.layer == site.layer)
            ranked = ranked.clamp(max=self.nest.best(layer))
        top = ranked[:, :width]
        return float((top[0] if len(top) == 1 else top).sum()) if top.numel() else 0.0


def uniform_widths(nest: Nest, target: int, shape: Shape, holds: Holds | None) -> dict[str, int]:
    """One width per kind for all layers: of the maximal shapes, the one that keeps the highest scores."""
    uniform = Uniform(nest, shape)
    best = uniform.fitting(target, holds)
    if not best:
        raise PlanError("no uniform shape meets all budgets at once: use layout per-layer, or raise one of them")

    def worth(counts: Counts) -> tuple[float, int]:
        price, channels = best[counts]
        return uniform.worth(counts, channels), price

    chosen = max(best, key=worth)
    return uniform.by_site(chosen, best[chosen][1])


def uniform_floor(nest: Nest, shape: Shape) -> dict[str, int]:
    """Widths of the smallest shape."""
    uniform = Uniform(nest, shape)
    lowest = uniform.channels()[0]
    return uniform.by_site(min(uniform.counts(), key=lambda counts: uniform.price(counts, lowest)), lowest)
