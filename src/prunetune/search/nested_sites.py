"""Plans of sites that lie in one another: their price under given widths, and the units that these widths keep.

A width is the number of units that each open lane of a site keeps; a lane is open where the unit around it stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunetune.plan import Plan
from prunetune.pruning.units import Site, children_by_site, kept_mask


def argsort_descending(scores: Tensor) -> Tensor:
    """float32 [n] -> long [n]: where the highest score is, then the next; equal ones by index, NaN before all.

    As `argsort(descending=True, stable=True)` in a tenth of the time: torch sorts integers by radix, and the bits of a
    float are in order once those of negative ones are turned round.
    """
    one_zero = (scores + 0.0).nan_to_num(torch.nan, torch.inf, -torch.inf)  # there are two, and NaN of either sign
    bits = one_zero.view(torch.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (~ascending).argsort(stable=True)


SiteWidths = Mapping[str, int]  # site name -> units that a lane keeps


class NestedSites:
    """Sites with the sites inside them, and their units ranked by score in each lane; ties go by index.

    With `within`, what that plan does not keep ranks last, and `most` says how many there are before it.
    """

    # Where scores are given; units are counted through, site after site.
    scores: Tensor  # of all units
    units_by_score: Tensor  # all units, the one of the highest score first
    ranked_units: Mapping[str, Tensor]  # {site: [lanes, units of a lane]}: the same in each lane
    ranked_scores: Mapping[str, Tensor] = {}  # the scores of these, in double precision

    def __init__(
        self, sites: Sequence[Site], scores: Mapping[str, Tensor] | None = None, larger_plan: Plan | None = None
    ) -> None:
        self.sites = tuple(sites)
        self.sites_by_name = {site.name: site for site in sites}
        self.child_sites = children_by_site(sites)
        starts = itertools.accumulate((site.units for site in sites), initial=0)
        self.first_unit = dict(zip(self.sites_by_name, starts, strict=False))  # unit of a site, counted through
        self.max_widths = (
            {site.name: _widest_kept_group(site, larger_plan.kept[site.name]) for site in sites} if larger_plan else {}
        )
        if scores is not None:
            self.scores = torch.cat([scores[site.name].detach() for site in sites]).float().cpu()
            self.units_by_score = argsort_descending(self.scores)
            order = self._rank_per_parent(larger_plan)
            self.ranked_units, self.ranked_scores = (
                self._split(order),
                self._split(self.scores.index_select(0, order).double()),
            )

    def _rank_per_parent(self, larger_plan: Plan | None) -> Tensor:
        """Indices by rank in the first lane, then in the next; what `within` keeps before all others."""
        lengths = torch.tensor([site.units_per_group for site in self.sites for _ in range(site.parent_groups)])
        places = 2 * len(lengths)
        small = next(kind for kind in (torch.uint8, torch.int16, torch.int32) if places <= torch.iinfo(kind).max)
        place = torch.arange(0, places, 2, dtype=small).repeat_interleave(lengths)  # sorted by radix, byte by byte
        if larger_plan is not None:
            place += ~torch.cat([kept_mask(larger_plan.kept[site.name], site.units) for site in self.sites])
        return self.units_by_score.index_select(0, place.index_select(0, self.units_by_score).argsort(stable=True))

    def _split(self, values: Tensor) -> dict[str, Tensor]:
        """[units] -> {site: [lanes, units of a lane]}."""
        parts = torch.split(values, [site.units for site in self.sites])
        return {site.name: part.view(site.parent_groups, -1) for site, part in zip(self.sites, parts, strict=True)}

    def parent(self, site: Site) -> Site | None:
        """The site around this one."""
        return self.sites_by_name[site.parent] if site.parent else None

    def max_width(self, site: Site) -> int:
        """Most units that a lane may keep."""
        return self.max_widths.get(site.name, site.units_per_group)

    def mean_scores(self, site: Site) -> Tensor:
        """Scores by rank, the best first, as a mean over lanes: [units of a lane]."""
        lanes = self.ranked_scores[site.name]
        return lanes[0] if site.parent_groups == 1 else lanes.float().mean(0).double()

    def params_with_children(self, site: Site, widths: SiteWidths) -> int:
        """Parameters of one unit with what it keeps inside."""
        price = site.unit_params
        for inner in self.child_sites.get(site.name, ()):
            price += widths[inner.name] * (inner.parent_groups // site.units) * self.params_with_children(inner, widths)
        return price

    def open_parent_groups(self, site: Site, widths: SiteWidths) -> int:
        """Lanes whose surroundings stay."""
        outer = self.parent(site)
        if outer is None:
            return site.parent_groups
        return widths[outer.name] * self.open_parent_groups(outer, widths) * (site.parent_groups // outer.units)

    def total_params(self, widths: SiteWidths) -> int:
        """Parameters under these widths."""
        roots = (site for site in self.sites if not site.parent)
        return sum(widths[site.name] * site.parent_groups * self.params_with_children(site, widths) for site in roots)

    def kept_unit_counts(self, widths: SiteWidths, sites: Sequence[Site]) -> dict[str, int]:
        """Units that these sites keep in all."""
        return {site.name: widths[site.name] * self.open_parent_groups(site, widths) for site in sites}

    def best_units(self, widths: SiteWidths) -> dict[str, Tensor]:
        """The best units of every open lane: {site: bool [U]}, true where one stays."""
        best = torch.cat([self.ranked_units[site.name][:, : widths[site.name]].flatten() for site in self.sites])
        found = self._split(torch.zeros(len(self.units_by_score), dtype=torch.bool).index_fill_(0, best, True))
        for site in self.sites:  # outer ones first
            if outer := self.parent(site):
                found[site.name] &= (
                    found[outer.name].flatten().repeat_interleave(site.parent_groups // outer.units)[:, None]
                )
        return {name: stays.flatten() for name, stays in found.items()}

    def best_score(self, site: Site) -> float:
        """Score of the unit that comes first."""
        return float(self.mean_scores(site)[0])


def _widest_kept_group(site: Site, kept: Sequence[int]) -> int:
    return int(kept_mask(kept, site.units).view(site.parent_groups, -1).sum(1).max())


def plan_from_gates(gates: Mapping[str, Tensor]) -> Plan:
    """The units under open gates, bool or of 0 and 1."""
    kept = {name: tuple(gate.nonzero()[:, 0].tolist()) for name, gate in gates.items()}
    return Plan(kept, {name: len(gate) for name, gate in gates.items()})
