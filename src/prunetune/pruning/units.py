"""What a site is: the units in one place of one layer, the lines of weights that each owns, and where its gate acts.

Sites nest. A layer holds its blocks, a block its KV groups or experts, a KV group its query heads, an expert its
channels; each kind is there only where it was asked for. A unit's own price leaves out what inner sites own, so the
price of a plan is a plain sum over the units it keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prunetune.plan import Plan
from prunetune.pruning.linears import COLUMNS, ROWS

UnitKind = Literal[
    "attention", "mlp", "query-heads", "experts", "expert-channels", "attention-blocks", "mlp-blocks", "layers"
]
Gating = Literal["columns", "output", "layer", "router", "expert columns"]

# What recipes call the kinds of unit, from the outermost to the innermost.
KIND_BY_NAME: Mapping[str, UnitKind] = {
    "layers": "layers",
    "attention-blocks": "attention-blocks",
    "kv-groups": "attention",
    "query-heads": "query-heads",
    "mlp-blocks": "mlp-blocks",
    "mlp-channels": "mlp",
    "experts": "experts",
    "expert-channels": "expert-channels",
}
NAME_BY_KIND: Mapping[UnitKind, str] = {kind: name for name, kind in KIND_BY_NAME.items()}
DEFAULT_UNITS = ("kv-groups", "mlp-channels")


@dataclass(frozen=True)
class LinearSlice:
    """One linear layer's share in the units of a site: which rows (producer) or columns (consumer) each of them owns.

    The rows fall into parts that lie end to end, one for each of query, key and value or of gate and up where these
    share a linear; in a part of p, unit u owns the p rows from u * p on.
    """

    module: str  # "model.layers.3.self_attn.q_proj"
    part_sizes: tuple[int, ...]  # rows of a unit in each part
    start: int = 0  # rows before the first part, which are another site's
    total_rows: int = 0  # of the whole linear, where others are not the site's; 0: all are

    @property
    def rows_per_unit(self) -> int:
        """Rows that one unit owns."""
        return sum(self.part_sizes)

    def indices(self, kept: Iterable[int], units: int) -> Tensor:
        """The rows that the kept of so many units own, in order: long [len(kept) * per_unit]."""
        chosen, start, found = torch.from_numpy(np.array(tuple(kept), dtype=np.int64)), self.start, []
        for size in self.part_sizes:
            found.append((start + chosen[:, None] * size + torch.arange(size)).flatten())
            start += units * size
        return torch.cat(found)

    def expand_to_rows(self, values: Tensor) -> Tensor:
        """One value per unit -> one per row. Query heads of a KV group lie side by side, so a group is one run."""
        parts = [values if size == 1 else values.repeat_interleave(size) for size in self.part_sizes]
        owned = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not self.total_rows:
            return owned
        after = self.total_rows - self.start - len(owned)
        return torch.cat([owned.new_ones(self.start), owned, owned.new_ones(after)])

    def sum_per_unit(self, rows: Tensor, units: int) -> Tensor:
        """[rows, ...] -> [U]: the sum over what each unit owns, in the dtype of `rows`."""
        rows = rows.flatten(1).sum(1) if rows.dim() > 1 else rows
        if self.total_rows:
            rows = rows[self.start : self.start + units * self.rows_per_unit]
        parts = [part.view(units, -1).sum(1) for part in torch.split(rows, [units * size for size in self.part_sizes])]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class ParamSlice:
    """The same of a parameter that is no linear's: attention sinks, a router, the fused weights of experts.

    With lanes, the first axis is theirs and each lane loses lines of its own along `axis`.
    """

    parameter: str  # "model.layers.3.mlp.experts.down_proj"
    axis: int
    part_sizes: tuple[int, ...] = (1,)
    parent_groups: int = 1

    def indices(self, kept: Iterable[int], units: int) -> Tensor:
        """As of `Cut`; `units` of one lane."""
        return LinearSlice(self.parameter, self.part_sizes).indices(kept, units)


@dataclass(frozen=True)
class Site:
    """A place in one layer where whole units can go."""

    name: str  # "model.layers.3.self_attn": the module that holds the producers and the consumer; ":kind" of others
    layer: int
    kind: UnitKind
    units: int
    producers: tuple[LinearSlice, ...]  # lose output rows
    consumer: LinearSlice | None  # loses input columns
    unit_params: int  # weights and biases that leave with one unit, without what inner sites own
    min_units_per_group: int = 1  # fewest units of a lane that may stay
    gating: Gating = "columns"
    gated_module: str = ""  # that the gate acts on, where this is not the consumer
    columns_owned_by_child: bool = False  # the consumer's columns leave with the units of an inner site
    param_slices: tuple[ParamSlice, ...] = ()
    block_linears: tuple[str, ...] = ()  # linears that leave with the only unit of a whole block or layer
    parent_groups: int = 1  # of equal length, lane after lane; each keeps the same number of units
    parent: str = ""  # the site around this one, whose units own the lanes
    params_with_children: int = (
        0  # parameters that leave with a unit of the dense model, with what inner sites own; 0: unit_params
    )

    @property
    def params(self) -> int:
        """Prunable parameters of the dense site."""
        return self.units * self.unit_params

    @property
    def total_unit_params(self) -> int:
        """Parameters that leave with one unit of the dense model."""
        return self.params_with_children or self.unit_params

    @property
    def units_per_group(self) -> int:
        """Units of a lane."""
        return self.units // self.parent_groups

    @property
    def layer_prefix(self) -> str:
        """The layer: "model.layers.3"."""
        mark = f".{self.layer}"
        return self.name[: f"{self.name}.".replace(":", ".").index(f"{mark}.") + len(mark)]

    @property
    def is_whole_block(self) -> bool:
        """Whether its only unit is a whole block or layer."""
        return self.kind in ("layers", "attention-blocks", "mlp-blocks")

    @property
    def has_linear_slices(self) -> bool:
        """Whether its units are lines of linears, which adapters follow."""
        return bool(self.linear_slices())

    def linear_slices(self) -> tuple[tuple[LinearSlice, int], ...]:
        """The lines of linears that leave with its units, with their axis."""
        columns = () if self.consumer is None or self.columns_owned_by_child else ((self.consumer, COLUMNS),)
        return (*((cut, ROWS) for cut in self.producers), *columns)

    def linears(self) -> tuple[str, ...]:
        """The linears that it holds or cuts."""
        return tuple(dict.fromkeys([*(cut.module for cut, _ in self.linear_slices()), *self.block_linears]))

    def open_parent_groups(self, kept: Sequence[int] | None, units: int) -> range | list[int]:
        """The lanes that the kept of the outer site's units own; all, where there is no outer site."""
        if kept is None:
            return range(self.parent_groups)
        share = self.parent_groups // units
        return [lane for unit in kept for lane in range(unit * share, (unit + 1) * share)]


def dense_plan(sites: Iterable[Site]) -> Plan:
    """The plan that keeps everything."""
    sites = tuple(sites)
    return Plan({site.name: tuple(range(site.units)) for site in sites}, {site.name: site.units for site in sites})


def kept_params(sites: Iterable[Site], plan: Plan) -> int:
    """Prunable parameters that stay under a plan."""
    return sum(site.unit_params * len(plan.kept[site.name]) for site in sites)


def kept_mask(kept: Sequence[int], units: int) -> Tensor:
    """Which of so many units are kept: bool [U]. By NumPy, which reads many Python numbers in a fifth of the time."""
    found = np.zeros(units, dtype=bool)
    found[np.array(kept, dtype=np.int64)] = True
    return torch.from_numpy(found)


def kept_indices(plan: Plan, sites: Iterable[Site]) -> dict[tuple[str, int], Tensor]:
    """Rows (axis 0) and columns (axis 1) that stay, {(linear, axis): ascending long}, of linears that lose some.

    Linears of which nothing stays are left out: they go as a whole.
    """
    masks: dict[tuple[str, int], Tensor] = {}
    for site in sites:
        kept = plan.kept[site.name]
        if not kept or len(kept) == site.units:
            continue
        stays = kept_mask(kept, site.units)
        for cut, axis in site.linear_slices():
            lines, key = cut.expand_to_rows(stays), (cut.module, axis)
            masks[key] = masks[key] & lines if key in masks else lines
    return {key: mask.nonzero().flatten() for key, mask in masks.items()}


def removed_linears(plan: Plan, sites: Iterable[Site]) -> set[str]:
    """Linears of which nothing stays."""
    return {name for site in sites if not plan.kept[site.name] for name in site.linears()}


def surviving_layers(plan: Plan, sites: Iterable[Site]) -> Iterator[int]:
    """Layers that stay in the stack, of those that sites name."""
    sites = tuple(sites)
    gone = {site.layer for site in sites if site.kind == "layers" and not plan.kept[site.name]}
    yield from sorted({site.layer for site in sites} - gone)


def children_by_site(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """{site: the sites right inside it}."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        if site.parent:
            found.setdefault(site.parent, []).append(site)
    return found


def effective_gates(gates: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Tensor]:
    """Each gate times those around it: what is in a closed unit is closed."""
    found: dict[str, Tensor] = {}
    named = {site.name: site for site in sites}
    for site in sites:
        gate = gates[site.name]
        if site.parent:
            around = found[site.parent]
            gate = gate * around.repeat_interleave(site.units // named[site.parent].units)
        found[site.name] = gate
    return found


def closed_fractions(gates: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Tensor]:
    """{site: [U]}: 1 - gate of what is in open blocks and layers; what is in a closed one rests with it: 0."""
    whole = {
        site.name: gates[site.name] if site.is_whole_block else torch.ones_like(gates[site.name]) for site in sites
    }
    blocks, units = effective_gates(whole, sites), effective_gates(gates, sites)
    return {site.name: blocks[site.name] - units[site.name] for site in sites}


def effective_layout(layout: str, sites: Sequence[Site]) -> str:
    """A model that lost whole layers and nothing else is uniform, whatever was asked for."""
    return "uniform" if all(site.kind == "layers" for site in sites) else layout
