"""The units that a plan keeps, by layer and kind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from prunetune.plan import Plan

ATTENTION_WORD = "att"  # self_attn, attn, attention


@dataclass(frozen=True)
class LayerKeptUnits:
    """The units of one kind in one layer."""

    units: int
    kept: tuple[int, ...]

    @property
    def share(self) -> float:
        """Share of the units that is kept."""
        return len(self.kept) / self.units if self.units else 0.0


@dataclass(frozen=True)
class KeptLayer:
    """One decoder layer; a kind that the plan does not name is None."""

    index: int
    attention: LayerKeptUnits | None
    mlp: LayerKeptUnits | None


def parse_site_layer(site: str) -> tuple[int, bool] | None:
    """(layer number, whether it is attention) of "<any>.<layer number>[.<block>]"; None for other names."""
    match = re.match(r"(?:.*?\.)?(\d+)(?:\.(.*))?$", site)
    return (int(match[1]), ATTENTION_WORD in (match[2] or "")) if match else None


def layers_from_plan(plan: Plan) -> tuple[KeptLayer, ...]:
    """The plan's layers in order; sites that `parse_site_layer` cannot read and `other_units_by_layer` are left out."""
    blocks: dict[int, dict[bool, LayerKeptUnits]] = {}
    for site, kept in plan.kept.items():
        parsed = parse_site_layer(site)
        if parsed is not None and ":" not in site:
            layer, is_attention = parsed
            blocks.setdefault(layer, {})[is_attention] = LayerKeptUnits(plan.units[site], kept)
    return tuple(KeptLayer(index, blocks[index].get(True), blocks[index].get(False)) for index in sorted(blocks))


def other_units_by_layer(plan: Plan) -> dict[str, dict[int, LayerKeptUnits]]:
    """{kind of unit: {layer: kept}} of sites that name their kind: "<any>.<layer number>[.<block>]:<kind>"."""
    by_kind: dict[str, dict[int, LayerKeptUnits]] = {}
    for site, kept in plan.kept.items():
        block, _, kind = site.partition(":")
        if kind and (match := re.match(r"(?:.*?\.)?(\d+)(?:\.|$)", block)):
            by_kind.setdefault(kind, {})[int(match[1])] = LayerKeptUnits(plan.units[site], kept)
    return by_kind


def count_kept(layers: Iterable[LayerKeptUnits | None]) -> tuple[int, int]:
    """(units kept, units of the dense model) over the layers."""
    present = [layer for layer in layers if layer is not None]
    return sum(len(layer.kept) for layer in present), sum(layer.units for layer in present)


def format_ranges(indices: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0–2, 5"."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ", ".join(f"{first}–{last}" if last > first else f"{first}" for first, last in spans)
