"""Plans of sites that lie in one another: their price under given widths, and the units that these widths keep.

A width is the number of units that each open lane of a site keeps; a lane is open where the unit around it stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunetune.decide.order import best_first
from prunetune.model.units import Site, inner_sites, open_units
from prunetune.plan import Plan

Widths = Mapping[str, int]  # site name -> units that a lane keeps


class Nest:
    """Sites with the sites inside them, and their units ranked by score in each lane; ties go by index.

    With `within`, what that plan does not keep ranks last, and `most` says how many there are before it.
    """

    def __init__(
        self, sites: Sequence[Site], scores: Mapping[str, Tensor] | None = None, within: Plan | None = None
    ) -> None:
        self.sites = tuple(sites)
        self.named = {site.name: site for site in sites}
        self.inner = inner_sites(sites)
        scores = scores or {}
        self.scores = {
            name: scores[name].detach().float().cpu().view(site.lanes, -1)
            for name, site in self.named.items()
            if name in scores
        }
        self.order = orders(self.scores)
        if within is not None:
            self.order = {name: kept_first(order, within.kept[name]) for name, order in self.order.items()}
        self.limits = {site.name: _longest_lane(site, within.kept[site.name]) for site in sites} if within else {}

    def outer(self, site: Site) -> Site | None:
        """The site around this one."""
        return self.named[site.within] if site.within else None

    def most(self, site: Site) -> int:
        """Most units that a lane may keep."""
        return self.limits.get(site.name, site.length)

    def ranked(self, site: Site) -> Tensor:
        """Scores by rank, the best first, as a mean over lanes: [units of a lane]."""
        lanes = self.scores[site.name].gather(1, self.order[site.name])
        return lanes[0] if site.lanes == 1 else lanes.mean(0)

    def span(self, site: Site, widths: Widths) -> int:
        """Parameters of one unit with what it keeps inside."""
        return site.unit_params + sum(
            widths[inner.name] * (inner.lanes // site.units) * self.span(inner, widths)
            for inner in self.inner.get(site.name, ())
        )

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
        found: dict[str, Tensor] = {}
        for site in self.sites:  # outer ones first
            outer, order = self.outer(site), self.order[site.name]
            stays = torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, : widths[site.name]], True)
            if outer:
                stays &= found[outer.name].repeat_interleave(site.lanes // outer.units)[:, None]
            found[site.name] = stays.flatten()
        return found

    def best(self, site: Site) -> float:
        """Score of the unit that comes first."""
        return float(self.ranked(site)[0])


def orders(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{site: [lanes, units of a lane]} scores -> indices by rank in each lane, of all sites by one sort."""
    if not scores:
        return {}
    sizes = torch.tensor([values.shape[1] for values in scores.values() for _ in values])
    lane = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(sizes)
    order = best_first(torch.cat([values.flatten() for values in scores.values()]))
    order = order[lane[order].argsort(stable=True)] - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    parts = torch.split(order, [values.numel() for values in scores.values()])
    return {name: part.view(values.shape) for (name, values), part in zip(scores.items(), parts, strict=True)}


def kept_first(order: Tensor, kept: Sequence[int]) -> Tensor:
    """[lanes, units of a lane] indices by rank, those of kept units before all others; else as they were."""
    gone = ~open_units(kept, order.numel()).view(order.shape)
    return order.gather(1, gone.gather(1, order).long().argsort(dim=1, stable=True))


def _longest_lane(site: Site, kept: Sequence[int]) -> int:
    return int(open_units(kept, site.units).view(site.lanes, -1).sum(1).max())


def plan_of(gates: Mapping[str, Tensor]) -> Plan:
    """The units under open gates, bool or of 0 and 1."""
    kept = {name: tuple(gate.nonzero()[:, 0].tolist()) for name, gate in gates.items()}
    return Plan(kept, {name: len(gate) for name, gate in gates.items()})
