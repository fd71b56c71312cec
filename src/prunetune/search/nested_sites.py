"""Plans of sites that lie in one another: their price under given widths, and the units that these widths keep.

A width is the number of units that each open lane of a site keeps; a lane is open where the unit around it stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunetune.plan import Plan
from prunetune.pruning.units import Site, inner_sites, open_units


def best_first(scores: Tensor) -> Tensor:
    """float32 [n] -> long [n]: where the highest score is, then the next; equal ones by index, NaN before all.

    As `argsort(descending=True, stable=True)` in a tenth of the time: torch sorts integers by radix, and the bits of a
    float are in order once those of negative ones are turned round.
    """
    one_zero = (scores + 0.0).nan_to_num(torch.nan, torch.inf, -torch.inf)  # there are two, and NaN of either sign
    bits = one_zero.view(torch.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (~ascending).argsort(stable=True)


Widths = Mapping[str, int]  # site name -> units that a lane keeps


class Nest:
    """Sites with the sites inside them, and their units ranked by score in each lane; ties go by index.

    With `within`, what that plan does not keep ranks last, and `most` says how many there are before it.
    """

    # Where scores are given; units are counted through, site after site.
    scores: Tensor  # of all units
    order: Tensor  # all units, the one of the highest score first
    lanes: Mapping[str, Tensor]  # {site: [lanes, units of a lane]}: the same in each lane
    ranked: Mapping[str, Tensor] = {}  # the scores of these, in double precision

    def __init__(
        self, sites: Sequence[Site], scores: Mapping[str, Tensor] | None = None, within: Plan | None = None
    ) -> None:
        self.sites = tuple(sites)
        self.named = {site.name: site for site in sites}
        self.inner = inner_sites(sites)
        starts = itertools.accumulate((site.units for site in sites), initial=0)
        self.first = dict(zip(self.named, starts, strict=False))  # unit of a site, counted through
        self.limits = {site.name: _longest_lane(site, within.kept[site.name]) for site in sites} if within else {}
        if scores is not None:
            self.scores = torch.cat([scores[site.name].detach() for site in sites]).float().cpu()
            self.order = best_first(self.scores)
            order = self._lane_by_lane(within)
            self.lanes, self.ranked = self._split(order), self._split(self.scores.index_select(0, order).double())

    def _lane_by_lane(self, within: Plan | None) -> Tensor:
        """Indices by rank in the first lane, then in the next; what `within` keeps before all others."""
        lengths = torch.tensor([site.length for site in self.sites for _ in range(site.lanes)])
        places = 2 * len(lengths)
        small = next(kind for kind in (torch.uint8, torch.int16, torch.int32) if places <= torch.iinfo(kind).max)
        place = torch.arange(0, places, 2, dtype=small).repeat_interleave(lengths)  # sorted by radix, byte by byte
        if within is not None:
            place += ~torch.cat([open_units(within.kept[site.name], site.units) for site in self.sites])
        return self.order.index_select(0, place.index_select(0, self.order).argsort(stable=True))

    def _split(self, values: Tensor) -> dict[str, Tensor]:
        """[units] -> {site: [lanes, units of a lane]}."""
        parts = torch.split(values, [site.units for site in self.sites])
        return {site.name: part.view(site.lanes, -1) for site, part in zip(self.sites, parts, strict=True)}

    def outer(self, site: Site) -> Site | None:
        """The site around this one."""
        return self.named[site.within] if site.within else None

    def most(self, site: Site) -> int:
        """Most units that a lane may keep."""
        return self.limits.get(site.name, site.length)

    def mean(self, site: Site) -> Tensor:
        """Scores by rank, the best first, as a mean over lanes: [units of a lane]."""
        lanes = self.ranked[site.name]
        return lanes[0] if site.lanes == 1 else lanes.float().mean(0).double()

    def span(self, site: Site, widths: Widths) -> int:
        """Parameters of one unit with what it keeps inside."""
        price = site.unit_params
        for inner in self.inner.get(site.name, ()):
            price += widths[inner.name] * (inner.lanes // site.units) * self.span(inner, widths)
        return price

    def open_lanes(self, site: Site, widths: Widths) -> int:
        """Lanes whose surroundings stay."""
        outer = self.outer(site)
        if outer is None:
            return site.lanes
        return widths[outer.name] * self.open_lanes(outer, widths) * (site.lanes // outer.units)

    def price(self, widths: Widths) -> int:
        """Parameters under these widths."""
        roots = (site for site in self.sites if not site.within)
        return sum(widths[site.name] * site.lanes * self.span(site, widths) for site in roots)

    def counts(self, widths: Widths, sites: Sequence[Site]) -> dict[str, int]:
        """Units that these sites keep in all."""
        return {site.name: widths[site.name] * self.open_lanes(site, widths) for site in sites}

    def best_units(self, widths: Widths) -> dict[str, Tensor]:
        """The best units of every open lane: {site: bool [U]}, true where one stays."""
        best = torch.cat([self.lanes[site.name][:, : widths[site.name]].flatten() for site in self.sites])
        found = self._split(torch.zeros(len(self.order), dtype=torch.bool).index_fill_(0, best, True))
        for site in self.sites:  # outer ones first
            if outer := self.outer(site):
                found[site.name] &= found[outer.name].flatten().repeat_interleave(site.lanes // outer.units)[:, None]
        return {name: stays.flatten() for name, stays in found.items()}

    def best(self, site: Site) -> float:
        """Score of the unit that comes first."""
        return float(self.mean(site)[0])


def _longest_lane(site: Site, kept: Sequence[int]) -> int:
    return int(open_units(kept, site.units).view(site.lanes, -1).sum(1).max())


def plan_of(gates: Mapping[str, Tensor]) -> Plan:
    """The units under open gates, bool or of 0 and 1."""
    kept = {name: tuple(gate.nonzero()[:, 0].tolist()) for name, gate in gates.items()}
    return Plan(kept, {name: len(gate) for name, gate in gates.items()})
