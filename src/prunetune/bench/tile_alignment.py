"""Widths of a pruned model that are no multiple of the tile of matrix kernels, and so limit its speed."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from prunetune.plan import Plan
from prunetune.pruning.units import Site, UnitKind

TILE = 128  # columns that GPU matrix kernels compute at once, and groups of 4-bit formats
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
        """Share of the columns in its tiles that are beyond the width."""
        tiles = -(-self.width // TILE) * TILE
        return 1 - self.width / tiles

    def __str__(self) -> str:
        multiples = str(TILE) if self.alignment == TILE // 2 else f"{TILE // 2} or {TILE}"
        return f"{self.block} width of layer {self.layer} is {self.width}, no multiple of {multiples}"


def misaligned_widths(plan: Plan, sites: Iterable[Site]) -> list[MisalignedWidth]:
    """Pruned widths that are no multiple of `TILE`, worst first: by alignment, then by idle share.

    Widths are the columns of an MLP, of each expert, and of the input of attention's output projection. Widths of the
    dense model are left out.
    """
    misaligned = [width for site in sites for width in _pruned_widths(site, plan) if width.width % TILE]
    return sorted(misaligned, key=lambda width: (width.alignment, -width.idle_share, width.layer))


def _pruned_widths(site: Site, plan: Plan) -> list[MisalignedWidth]:
    kept = plan.kept[site.name]
    if site.kind in CHANNELS:
        group_widths = Counter(unit // site.units_per_group for unit in kept).values()
        widths = {width for width in group_widths if width < site.units_per_group}
        return [MisalignedWidth(site.layer, CHANNELS[site.kind], width) for width in widths]
    is_group = site.kind is UnitKind.KV_GROUP and not site.weights.consumer_is_childs
    if is_group and site.consumer and 0 < len(kept) < site.units:
        return [MisalignedWidth(site.layer, "attention", len(kept) * site.consumer.rows_per_unit)]
    return []
