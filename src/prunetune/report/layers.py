"""What a plan keeps, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from prunetune.plan import Plan

ATTENTION_WORD = "att"  # self_attn, attn, attention


@dataclass(frozen=True)
class Kept:
    """The units of one kind in one layer."""

    units: int
    kept: tuple[int, ...]

    @property
    def share(self) -> float:
        """Share of the units that stays."""
        return len(self.kept) / self.units if self.units else 0.0


@dataclass(frozen=True)
class Layer:
    """One decoder layer; a kind that the plan does not name is None."""

    index: int
    attention: Kept | None
    mlp: Kept | None


def layer_of(site: str) -> tuple[int, bool] | None:
    """The layer's number, and whether the site is attention; None for a name of another form."""
    match = re.match(r"(?:.*?\.)?(\d+)(?:\.(.*))?$", site)
    return (int(match[1]), ATTENTION_WORD in (match[2] or "")) if match else None


def layers_of(plan: Plan) -> tuple[Layer, ...]:
    """The plan's layers in order; a site is "<any>.<layer number>[.<block>]", others are left out."""
    found: dict[int, dict[bool, Kept]] = {}
    for site, kept in plan.kept.items():
        if ":" not in site and (place := layer_of(site)) is not None:  # others are of another kind, see `others_of`
            layer, is_attention = place
            found.setdefault(layer, {})[is_attention] = Kept(plan.units[site], kept)
    return tuple(Layer(index, found[index].get(True), found[index].get(False)) for index in sorted(found))


def others_of(plan: Plan) -> dict[str, dict[int, Kept]]:
    """{kind of unit: {layer: kept}} of sites that name their kind: "<any>.<layer number>[.<block>]:<kind>"."""
    found: dict[str, dict[int, Kept]] = {}
    for site, kept in plan.kept.items():
        place, _, kind = site.partition(":")
        if kind and (match := re.match(r"(?:.*?\.)?(\d+)(?:\.|$)", place)):
            found.setdefault(kind, {})[int(match[1])] = Kept(plan.units[site], kept)
    return found


def total(parts: Iterable[Kept | None]) -> tuple[int, int]:
    """Units kept and units there were, over the layers."""
    present = [part for part in parts if part is not None]
    return sum(len(part.kept) for part in present), sum(part.units for part in present)


def runs(indices: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0–2, 5"."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ", ".join(f"{first}–{last}" if last > first else f"{first}" for first, last in spans)
