"""Which widths of a pruned model keep it from being faster: kernels work in tiles, and the last may be near empty."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prunetune.plan import Plan
from prunetune.pruning.units import Site

TILE = 128  # columns that matrix kernels of GPUs take at once, and groups of 4-bit formats
SHOWN = 5
CHANNELS = {"mlp": "MLP", "expert-channels": "experts"}


@dataclass(frozen=True)
class Uneven:
    """A width that is no multiple of `TILE`."""

    layer: int
    what: str  # "MLP", "attention", "experts"
    width: int

    @property
    def even(self) -> int:
        """The largest power of two, up to `TILE`, that divides it."""
        return math.gcd(self.width, TILE)

    @property
    def idle(self) -> float:
        """Share of the tiles that stays empty."""
        tiles = -(-self.width // TILE) * TILE
        return 1 - self.width / tiles

    def __str__(self) -> str:
        multiples = str(TILE) if self.even == TILE // 2 else f"{TILE // 2} or {TILE}"
        return f"{self.what} width of layer {self.layer} is {self.width}, no multiple of {multiples}"


def uneven(plan: Plan, sites: Iterable[Site]) -> list[Uneven]:
    """What the plan made uneven, the worst first: what only small powers of two divide, then what idles most.

    Widths are columns of MLPs, of each expert, and of what attention's output projection reads; a width that the dense
    model has, too, is not the plan's doing.
    """
    found = [one for site in sites for one in _of(site, plan)]
    return sorted((one for one in found if one.width % TILE), key=lambda one: (one.even, -one.idle, one.layer))


def _of(site: Site, plan: Plan) -> list[Uneven]:
    kept = plan.kept[site.name]
    if site.kind in CHANNELS:
        widths = {count for count in _lanes(site, kept) if count < site.length}
        return [Uneven(site.layer, CHANNELS[site.kind], width) for width in widths]
    if site.kind == "attention" and site.consumer and not site.lends_columns and 0 < len(kept) < site.units:
        return [Uneven(site.layer, "attention", len(kept) * site.consumer.per_unit)]
    return []


def _lanes(site: Site, kept: Sequence[int]) -> Iterable[int]:
    return Counter(unit // site.length for unit in kept).values()
