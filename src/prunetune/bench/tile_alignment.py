"""Which widths of a pruned model keep it from being faster: kernels work in tiles, and the last may be near empty."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prunetune.plan import Plan
from prunetune.pruning.units import Site, UnitKind

TILE = 128  # columns that matrix kernels of GPUs take at once, and groups of 4-bit formats
SHOWN = 5
CHANNELS = {UnitKind.MLP_CHANNEL: "MLP", UnitKind.EXPERT_CHANNEL: "experts"}


@dataclass(frozen=True)
class MisalignedWidth:
    """A width that is no multiple of `TILE`."""

    layer: int
    block: str  # "MLP", "attention", "experts"
    width: int

    @property
    def alignment(self) -> int:
        """The largest power of two, up to `TILE`, that divides it."""
        return math.gcd(self.width, TILE)

    @property
    def idle_share(self) -> float:
        """Share of the tiles that stays empty."""
        tiles = -(-self.width // TILE) * TILE
        return 1 - self.width / tiles

    def __str__(self) -> str:
        multiples = str(TILE) if self.alignment == TILE // 2 else f"{TILE // 2} or {TILE}"
        return f"{self.block} width of layer {self.layer} is {self.width}, no multiple of {multiples}"


def misaligned_widths(plan: Plan, sites: Iterable[Site]) -> list[MisalignedWidth]:
    """What the plan made uneven, the worst first: what only small powers of two divide, then what idles most.

    Widths are columns of MLPs, of each expert, and of what attention's output projection reads; a width that the dense
    model has, too, is not the plan's doing.
    """
    found = [one for site in sites for one in _pruned_widths(site, plan)]
    return sorted(
        (one for one in found if one.width % TILE), key=lambda one: (one.alignment, -one.idle_share, one.layer)
    )


def _pruned_widths(site: Site, plan: Plan) -> list[MisalignedWidth]:
    kept = plan.kept[site.name]
    if site.kind in CHANNELS:
        widths = {count for count in _widths_per_parent(site, kept) if count < site.units_per_group}
        return [MisalignedWidth(site.layer, CHANNELS[site.kind], width) for width in widths]
    is_group = site.kind is UnitKind.KV_GROUP and not site.weights.consumer_is_childs
    if is_group and site.consumer and 0 < len(kept) < site.units:
        return [MisalignedWidth(site.layer, "attention", len(kept) * site.consumer.rows_per_unit)]
    return []


def _widths_per_parent(site: Site, kept: Sequence[int]) -> Iterable[int]:
    return Counter(unit // site.units_per_group for unit in kept).values()
