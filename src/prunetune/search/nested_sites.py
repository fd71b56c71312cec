"""Nested sites: units ranked by score, parameters under given widths, and the units that these widths keep.

A unit may contain units of another site: a KV group its query heads, an expert its channels, a layer all its blocks. So
a site's units fall into `Site.parent_groups` groups of equal length, one or more for each unit of the parent site; a
site without a parent is one group. The *width* of a site is the number of units that each of its groups keeps. A group
is *open* if the unit that contains it is kept.

Shapes: N units of all sites, numbered through site after site; U units of one site, in G groups.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunetune.plan import Plan
from prunetune.pruning.units import Site, children_by_site, count_params, kept_mask

SiteWidths = Mapping[str, int]  # site name -> units that each open group keeps


class NestedSites:
    """Sites with their child sites and, where scores are given, their units ranked by score within each group.

    Equal scores rank by index. With a `larger_plan`, the units that it removes rank last, and `max_width` is the number
    of units that it keeps in a group.
    """

    # Only where scores are given:
    ranked_units: Mapping[str, Tensor]  # {site: long [G, U / G]}: unit numbers, the highest score of each group first
    ranked_scores: Mapping[str, Tensor] = {}  # {site: float64 [G, U / G]}: their scores

    def __init__(
        self, sites: Sequence[Site], scores: Mapping[str, Tensor] | None = None, larger_plan: Plan | None = None
    ) -> None:
        self.sites = tuple(sites)  # parents before their children
        self.sites_by_name = {site.name: site for site in sites}
        self.child_sites = children_by_site(sites)
        starts = itertools.accumulate((site.units for site in sites), initial=0)
        self.first_unit = dict(zip(self.sites_by_name, starts, strict=False))  # {site: number of its first unit}
        self.max_widths: dict[str, int] = {}
        if larger_plan is not None:
            for site in sites:
                kept = kept_mask(larger_plan.kept[site.name], site.units)
                self.max_widths[site.name] = int(kept.view(site.parent_groups, -1).sum(1).max())
        if scores is not None and self.sites:
            joined = torch.cat([scores[site.name].detach() for site in sites]).float().cpu()
            # Unit numbers, group after group: by descending score, first those that the larger plan keeps.
            lengths = torch.tensor([site.units_per_group for site in sites for _ in range(site.parent_groups)])
            # 2 g for units of group g, 2 g + 1 for those that the larger plan removes
            sort_keys = torch.arange(0, 2 * len(lengths), 2).repeat_interleave(lengths)
            if larger_plan is not None:
                sort_keys += ~torch.cat([kept_mask(larger_plan.kept[site.name], site.units) for site in sites])
            by_score = joined.argsort(descending=True, stable=True)
            ranked = by_score[sort_keys[by_score].argsort(stable=True)]
            self.ranked_units = self._split_by_site(ranked)
            self.ranked_scores = self._split_by_site(joined[ranked].double())

    def with_sites(self, sites: Sequence[Site]) -> "NestedSites":
        """The same ranking over these sites, which differ in parameters only."""
        other = copy.copy(self)
        other.sites, other.sites_by_name = tuple(sites), {site.name: site for site in sites}
        other.child_sites = children_by_site(sites)
        return other

    def _split_by_site(self, values: Tensor) -> dict[str, Tensor]:
        """[N] -> {site: [G, U / G]}."""
        by_site = torch.split(values, [site.units for site in self.sites])
        return {site.name: own.view(site.parent_groups, -1) for site, own in zip(self.sites, by_site, strict=True)}

    def parent(self, site: Site) -> Site | None:
        """The site whose units contain the groups of this one."""
        return self.sites_by_name[site.parent] if site.parent else None

    def max_width(self, site: Site) -> int:
        """The most units that a group of this site may keep."""
        return self.max_widths.get(site.name, site.units_per_group)

    def mean_scores(self, site: Site) -> Tensor:
        """Mean score over groups of the units of each rank, best rank first: float64 [U / G]."""
        scores = self.ranked_scores[site.name]
        return scores[0] if site.parent_groups == 1 else scores.float().mean(0).double()

    def best_score(self, site: Site) -> float:
        """Mean score over groups of their best units."""
        return float(self.mean_scores(site)[0])

    def params_with_children(self, site: Site, widths: SiteWidths) -> int:
        """Parameters of one unit and of all that it contains under these widths."""
        params = site.unit_params
        for child in self.child_sites.get(site.name, ()):
            groups_per_unit = child.parent_groups // site.units
            params += widths[child.name] * groups_per_unit * self.params_with_children(child, widths)
        return params

    def open_parent_groups(self, site: Site, widths: SiteWidths) -> int:
        """The number of groups of this site whose parent unit is kept under these widths."""
        parent = self.parent(site)
        if parent is None:
            return site.parent_groups
        return widths[parent.name] * self.open_parent_groups(parent, widths) * (site.parent_groups // parent.units)

    def total_params(self, widths: SiteWidths) -> int:
        """Prunable parameters of all sites under these widths."""
        return int(count_params(self.sites, self.kept_unit_counts(widths, self.sites)))

    def kept_unit_counts(self, widths: SiteWidths, sites: Sequence[Site]) -> dict[str, int]:
        """{site: units kept in all its groups} of these sites."""
        return {site.name: widths[site.name] * self.open_parent_groups(site, widths) for site in sites}

    def best_units(self, widths: SiteWidths) -> dict[str, Tensor]:
        """{site: bool [U]}: the best units of every open group, as many as these widths say."""
        if not self.sites:
            return {}
        best = torch.cat([self.ranked_units[site.name][:, : widths[site.name]].flatten() for site in self.sites])
        is_best = torch.zeros(sum(site.units for site in self.sites), dtype=torch.bool).index_fill_(0, best, True)
        kept = self._split_by_site(is_best)
        for site in self.sites:
            if parent := self.parent(site):
                groups_per_unit = site.parent_groups // parent.units
                kept[site.name] &= kept[parent.name].flatten().repeat_interleave(groups_per_unit)[:, None]
        return {name: mask.flatten() for name, mask in kept.items()}

    def best_plan(self, widths: SiteWidths) -> Plan:
        """The plan that keeps these units."""
        indices = {name: tuple(mask.nonzero()[:, 0].tolist()) for name, mask in self.best_units(widths).items()}
        return Plan(indices, {site.name: site.units for site in self.sites})
