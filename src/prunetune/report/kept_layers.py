"""What a plan keeps, layer by layer."""

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
        """Share of the units that stays."""
        return len(self.kept) / self.units if self.units else 0.0


@dataclass(frozen=True)
class KeptLayer:
    """One decoder layer; a kind that the plan does not name is None."""

    index: int
    attention: LayerKeptUnits | None
    mlp: LayerKeptUnits | None


def parse_site_layer(site: str) -> tuple[int, bool] | None:
    """The layer's number, and whether the site is attention; None for a name of another form."""
    match = re.match(r"(?:.*?\.)?(\d+)(?:\.(.*))?$", site)
    return (int(match[1]), ATTENTION_WORD in (match[2] or "")) if match else None


def layers_from_plan(plan: Plan) -> tuple[KeptLayer, ...]:
    """The plan's layers in order; a site is "<any>.<layer number>[.<block>]", others are left out."""
    found: dict[int, dict[bool, LayerKeptUnits]] = {}
    for site, kept in plan.kept.items():
        if (
            ":" not in site and (place := parse_site_layer(site)) is not None
        ):  # others are of another kind, see `others_of`
            layer, is_attention = place
            found.setdefault(layer, {})[is_attention] = LayerKeptUnits(plan.units[site], kept)
    return tuple(KeptLayer(index, found[index].get(True), found[index].get(False)) for index in sorted(found))


def other_units_by_layer(plan: Plan) -> dict[str, dict[int, LayerKeptUnits]]:
    """{kind of unit: {layer: kept}} of sites that name their kind: "<any>.<layer number>[.<block>]:<kind>"."""
    found: dict[str, dict[int, LayerKeptUnits]] = {}
    for site, kept in plan.kept.items():
        place, _, kind = site.partition(":")
        if kind and (match := re.match(r"(?:.*?\.)?(\d+)(?:\.|$)", place)):
            found.setdefault(kind, {})[int(match[1])] = LayerKeptUnits(plan.units[site], kept)
    return found


def count_kept(parts: Iterable[LayerKeptUnits | None]) -> tuple[int, int]:
    """Units kept and units there were, over the layers."""
    present = [part for part in parts if part is not None]
    return sum(len(part.kept) for part in present), sum(part.units for part in present)


def format_ranges(indices: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0–2, 5"."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ", ".join(f"{first}–{last}" if last > first else f"{first}" for first, last in spans)
