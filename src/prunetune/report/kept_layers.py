"""The units that a plan keeps, by kind and layer."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from prunetune.plan import Plan

GROUPS, CHANNELS = "KV groups", "MLP channels"


@dataclass(frozen=True)
class LayerKeptUnits:
    """The units of one kind in one layer."""

    units: int
    kept: tuple[int, ...]

    @property
    def share(self) -> float:
        """Share of the units that is kept."""
        return len(self.kept) / self.units if self.units else 0.0


def parse_site(site: str) -> tuple[int, str] | None:
    """(layer number, kind of unit) of "<any>.<layer number>[.<block>][:<kind>]"; None for other names."""
    block, _, kind = site.partition(":")
    match = re.match(r"(?:.*?\.)?(\d+)(?:\.(.*))?$", block)
    # Attention: self_attn, attn, attention.
    return (int(match[1]), kind or (GROUPS if "att" in (match[2] or "") else CHANNELS)) if match else None


def kept_by_kind(plan: Plan) -> dict[str, dict[int, LayerKeptUnits]]:
    """{kind of unit: {layer: kept}} of the sites that name a layer; KV groups and MLP channels come first, if empty."""
    by_kind: dict[str, dict[int, LayerKeptUnits]] = {GROUPS: {}, CHANNELS: {}}
    for site, kept in plan.kept.items():
        if parsed := parse_site(site):
            layer, kind = parsed
            by_kind.setdefault(kind, {})[layer] = LayerKeptUnits(plan.units[site], kept)
    return by_kind


def count_kept(layers: Iterable[LayerKeptUnits]) -> tuple[int, int]:
    """(units kept, units of the dense model) over the layers."""
    layers = list(layers)
    return sum(len(layer.kept) for layer in layers), sum(layer.units for layer in layers)


def format_ranges(indices: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0–2, 5"."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ", ".join(f"{first}–{last}" if last > first else f"{first}" for first, last in spans)
