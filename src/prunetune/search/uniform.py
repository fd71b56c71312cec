"""The layout uniform: one width per kind for all layers, chosen by the scores it keeps.

A *shape* is the number of layers and the width of every kind of unit in each of them. A width is the number of units
that each open group of a site keeps: MLP channels, KV groups, query heads of a KV group, experts.
"""

import bisect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from prunetune.errors import PlanError
from prunetune.pruning.units import Site, UnitKind
from prunetune.search.nested_sites import NestedSites, SiteWidths
from prunetune.search.plan_rules import PlanConstraints, block_size, min_width

Shape = dict[UnitKind, int]  # kind -> width, 0 where it is not pruned; of UnitKind.LAYER the number of layers
FitsBudgets = Callable[[SiteWidths], bool]  # whether these widths are within all budgets but that of parameters


class UniformPlanner:
    """The shapes that all layers of a model may have, their parameters, and the scores that each keeps.

    Raises `PlanError` if layers differ, or could lose one of their blocks.
    """

    def __init__(self, nested_sites: NestedSites, constraints: PlanConstraints) -> None:
        self.nested_sites, self.constraints = nested_sites, constraints
        # Protected layers are kept, but may be as narrow as all others.
        self.width_constraints = replace(constraints, protected=frozenset())
        self.layer_sites = {site.layer: site for site in nested_sites.sites if site.kind is UnitKind.LAYER}
        self.sites_by_kind = {site.kind: site for site in reversed(nested_sites.sites)}  # the first of each
        by_layer: dict[int, list[Site]] = {}
        for site in nested_sites.sites:
            by_layer.setdefault(site.layer, []).append(site)
        makes = {tuple(site.kind for site in own): own for own in by_layer.values()}  # a hybrid's layers are of several
        numbers = Counter(tuple(site.kind for site in own) for own in by_layer.values())
        self.layers_by_make = [(NestedSites(own), numbers[kinds]) for kinds, own in makes.items()]
        self.score_sums: dict[tuple[str, int, int], float] = {}  # by site, width, width of its parent
        self.lowest_score = min([0.0, *(float(own.min()) for own in nested_sites.ranked_scores.values())])
        block_kinds = (UnitKind.ATTENTION_BLOCK, UnitKind.MLP_BLOCK)
        if blocks := [kind.recipe_name for kind in block_kinds if kind in self.sites_by_kind]:
            raise PlanError(f"layout uniform cannot express layers without {' or '.join(blocks)}: use layout per-layer")
        sizes = {(site.kind, site.units, site.unit_params, site.parent_groups) for site in nested_sites.sites}
        if len(sizes) > len(self.sites_by_kind) or (self.layer_sites and len(makes) > 1):
            raise PlanError("layout uniform needs equal layers, and this model's differ: use layout per-layer")

    # -- legal shapes ----------------------------------------------------------------------------------------------

    def legal_shapes(self) -> Iterator[Shape]:
        """All legal numbers of layers, KV groups, query heads and experts, each with the narrowest channels."""
        kinds = (UnitKind.LAYER, UnitKind.EXPERT, UnitKind.KV_GROUP, UnitKind.QUERY_HEAD)
        narrowest, constraints = self.channel_widths()[0], self.constraints
        for widths in itertools.product(*map(self._width_range, kinds)):
            shape = with_channels(dict(zip(kinds, widths, strict=True)), narrowest)
            groups, heads = shape[UnitKind.KV_GROUP], self.sites_by_kind.get(UnitKind.QUERY_HEAD)
            if heads:  # where KV groups are not pruned, all are kept
                allowed = constraints.allows_groups(groups or heads.parent_groups, shape[UnitKind.QUERY_HEAD])
            else:
                allowed = not groups or constraints.allows_groups(groups)
            if allowed and groups % constraints.tensor_parallel == 0:
                yield shape

    def _width_range(self, kind: UnitKind) -> range:
        """Widths of a kind, from the least to the most; 0 alone where the kind is not pruned."""
        if kind is UnitKind.LAYER:
            most = sum(self.nested_sites.max_width(site) > 0 for site in self.layer_sites.values())
            least = max(1, sum(min_width(site, self.constraints) for site in self.layer_sites.values()))
            number = len({site.layer for site in self.nested_sites.sites})
            return range(least, most + 1) if self.layer_sites else range(number, number + 1)
        if kind not in self.sites_by_kind:
            return range(1)
        return range(max(1, min_width(self.sites_by_kind[kind], self.width_constraints)), self._max_width(kind) + 1)

    def _max_width(self, kind: UnitKind) -> int:
        """The most units that a group may keep in any layer."""
        return max(self.nested_sites.max_width(site) for site in self.nested_sites.sites if site.kind == kind)

    def channel_widths(self) -> list[int]:
        """Ascending widths of an MLP or of an expert; 0 alone where channels are not pruned."""
        site = next((site for kind, site in self.sites_by_kind.items() if kind.is_channel), None)
        if site is None:
            return [0]
        narrowest, widest = min_width(site, self.width_constraints), self._max_width(site.kind)
        return [*range(narrowest, widest, block_size(site, self.width_constraints)), widest]

    def shapes_within(self, target_params: int, fits_budgets: FitsBudgets | None) -> Iterator[Shape]:
        """The shapes within the budgets, each with the widest channels that fit: wider ones cost no less."""
        for narrowest in self.legal_shapes():
            shapes = [with_channels(narrowest, width) for width in self.channel_widths()]
            count = bisect.bisect_right(shapes, target_params, key=self.total_params)
            if fits_budgets is not None:
                count = bisect.bisect_left(
                    shapes, True, hi=count, key=lambda shape: not fits_budgets(self.widths_by_site(shape))
                )
            if count:
                yield shapes[count - 1]

    # -- widths, parameters and scores of a shape ------------------------------------------------------------------

    def widths_by_site(self, shape: Shape) -> dict[str, int]:
        """The shape as widths of all sites, with the best layers kept: {site: units of each open group}."""
        kept_layers = self.kept_layers(shape[UnitKind.LAYER])
        return {
            site.name: int(site.layer in kept_layers) if site.kind is UnitKind.LAYER else shape[site.kind]
            for site in self.nested_sites.sites
        }

    def kept_layers(self, number: int) -> set[int]:
        """So many layers: first those that must be kept, then those of highest score."""
        if not self.layer_sites:
            return {site.layer for site in self.nested_sites.sites}

        def rank(site: Site) -> tuple[float, ...]:
            score = self.nested_sites.best_score(site) if self.nested_sites.ranked_scores else 0.0
            return (-min_width(site, self.constraints), -self.nested_sites.max_width(site), -score, site.layer)

        return {site.layer for site in sorted(self.layer_sites.values(), key=rank)[:number]}

    def total_params(self, shape: Shape) -> int:
        """Prunable parameters of a model of this shape."""
        total = 0
        for layer, number in self.layers_by_make:
            widths = {site.name: 1 if site.kind is UnitKind.LAYER else shape[site.kind] for site in layer.sites}
            total += (shape[UnitKind.LAYER] if self.layer_sites else number) * layer.total_params(widths)
        return total

    def weighted_score(self, shape: Shape) -> float:
        """The sum over all kept units of score times parameters: a larger shape never has less, to the bit.

        So scores count from the lowest if that is negative, and are added one after the other.
        """
        kept_layers, total = self.kept_layers(shape[UnitKind.LAYER]), 0.0
        widths = shape | {UnitKind.LAYER: 1}
        for site in self.nested_sites.sites:
            if site.layer in kept_layers:
                parent = self.nested_sites.parent(site)
                key = (site.name, widths[site.kind], widths[parent.kind] if parent else 1)
                if key not in self.score_sums:
                    # Of the best of all open groups; where layers are pruned, none exceeds its layer's.
                    scores = self.nested_sites.ranked_scores[site.name] - self.lowest_score  # [G, U / G]
                    if parent and parent.kind is not UnitKind.LAYER:
                        best_parents = self.nested_sites.ranked_units[parent.name][0][: key[2]]
                        kept_parents = (best_parents - self.nested_sites.first_unit[parent.name]).tolist()
                        scores = scores[site.open_parent_groups(kept_parents, parent.units)]
                    if self.layer_sites:
                        layer_score = self.nested_sites.best_score(self.layer_sites[site.layer])
                        scores = scores.clamp(max=layer_score - self.lowest_score)
                    best = scores[:, : key[1]]
                    self.score_sums[key] = float(best.cumsum(1)[:, -1].cumsum(0)[-1]) if best.numel() else 0.0
                total += self.score_sums[key] * site.unit_params
        return total


def with_channels(shape: Shape, width: int) -> Shape:
    """The shape with channels of this width, in MLPs and experts."""
    return shape | {UnitKind.MLP_CHANNEL: width, UnitKind.EXPERT_CHANNEL: width}
