"""What budgets beside the share of parameters leave, while a plan grows block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prunetune.budget.costs import Cost, total
from prunetune.decide.nest import Nest
from prunetune.model.units import Site

TINY = 1e-9  # of a limit: sums of many layers are inexact


class Room:
    """Keeps the costs of every layer under some widths, and says what still fits under every limit."""

    def __init__(self, nest: Nest, caps: Sequence[tuple[Cost, float]]) -> None:
        self.nest, self.caps = nest, tuple(caps)
        self.by_layer: dict[int, list[Site]] = {}
        for site in nest.sites:
            self.by_layer.setdefault(site.layer, []).append(site)
        self.costs: list[dict[int, float]] = []
        self.spent: list[float] = []

    def open(self, widths: Mapping[str, int]) -> None:
        """Start from these widths."""
        counts = self.nest.counts(widths, self.nest.sites)
        self.costs = [{layer: cost.of_layer(layer, counts) for layer in cost.anatomy.layers} for cost, _ in self.caps]
        self.spent = [cost.fixed + sum(of.values()) for (cost, _), of in zip(self.caps, self.costs, strict=True)]

    def takes(self, site: Site, block: int, widths: Mapping[str, int]) -> bool:
        """Spend for so many more units of a site's lanes, where every limit allows it."""
        if not self.caps:
            return True
        counts = self.nest.counts({**widths, site.name: widths[site.name] + block}, self.by_layer[site.layer])
        new = [cost.of_layer(site.layer, counts) for cost, _ in self.caps]
        spent = [before - of[site.layer] + now for before, of, now in zip(self.spent, self.costs, new, strict=True)]
        if any(value > limit * (1 + TINY) for value, (_, limit) in zip(spent, self.caps, strict=True)):
            return False
        self.spent = spent
        for of, now in zip(self.costs, new, strict=True):
            of[site.layer] = now
        return True

    def holds(self, widths: Mapping[str, int]) -> bool:
        """Whether every limit allows these widths."""
        if not self.caps:
            return True
        counts = self.nest.counts(widths, self.nest.sites)
        return all(total(cost, counts) <= limit * (1 + TINY) for cost, limit in self.caps)
