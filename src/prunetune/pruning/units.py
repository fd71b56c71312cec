"""What a site is: the units at one place of one layer, the weights that each unit owns, and where its gate acts.

Sites nest. A layer holds its blocks, a block its KV groups or experts, a KV group its query heads, an expert its
channels; a recipe chooses the kinds. A unit's own parameters leave out what the sites inside it own, so a plan's
parameters are a plain sum over the units that it keeps.

One site stands across the others: the *hidden channels* (the entries of the residual stream), which every layer reads
and writes. A kept channel makes every kept unit larger by its `hidden_params`, and `count_params` counts that.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from prunetune.plan import Plan
from prunetune.pruning.linears import COLUMNS, ROWS, as_out_in, get_base_linear

# What a gate scales: a consumer's input columns, a block's output, a layer's change of its input, the router's softmax,
# the columns of every expert's second linear, or all that is written into the residual stream.
Gating = Literal["columns", "output", "layer", "router", "expert columns", "hidden"]
DEFAULT_UNITS = ("kv-groups", "mlp-channels")
ALL_LAYERS = -1  # the layer of the site of hidden channels, which is in none


class UnitKind(StrEnum):
    """The kinds of unit, outer ones first. The value is the kind's name in code, site names, tables and files."""

    LAYER = "layers"
    ATTENTION_BLOCK = "attention-blocks"
    KV_GROUP = "attention"
    QUERY_HEAD = "query-heads"
    MLP_BLOCK = "mlp-blocks"
    MLP_CHANNEL = "mlp"
    EXPERT = "experts"
    EXPERT_CHANNEL = "expert-channels"
    HIDDEN_CHANNEL = "hidden-channels"

    @property
    def recipe_name(self) -> str:
        """The kind's name in `budget.units`."""
        return {UnitKind.KV_GROUP: "kv-groups", UnitKind.MLP_CHANNEL: "mlp-channels"}.get(self, self.value)

    @property
    def label(self) -> str:
        """One unit's parameters in a sentence: "MLP parameters", "query head parameters"."""
        words = {UnitKind.KV_GROUP: "attention", UnitKind.MLP_CHANNEL: "MLP", UnitKind.MLP_BLOCK: "MLP block"}
        return words.get(self, self.value.removesuffix("s").replace("-", " "))

    @property
    def is_whole_block(self) -> bool:
        """Whether a site has one unit: a whole block, or the whole layer."""
        return self in (UnitKind.LAYER, UnitKind.ATTENTION_BLOCK, UnitKind.MLP_BLOCK)

    @property
    def removes_attention(self) -> bool:
        """Whether a whole block of this kind takes the layer's attention along."""
        return self in (UnitKind.LAYER, UnitKind.ATTENTION_BLOCK)

    @property
    def is_head(self) -> bool:
        """Whether units are attention heads: KV groups, or query heads inside them."""
        return self in (UnitKind.KV_GROUP, UnitKind.QUERY_HEAD)

    @property
    def is_attention(self) -> bool:
        """Whether units are of attention alone: its heads, or all of a layer's."""
        return self.is_head or self is UnitKind.ATTENTION_BLOCK

    @property
    def is_channel(self) -> bool:
        """Whether units are channels, whose number is aligned to `budget.align`: of an MLP, or of every expert."""
        return self in (UnitKind.MLP_CHANNEL, UnitKind.EXPERT_CHANNEL)

    @property
    def is_divided_by_tensor_parallel(self) -> bool:
        """Whether tensor parallelism spreads the units over devices, so that their number has to divide."""
        return self.is_channel or self is UnitKind.KV_GROUP

    @property
    def is_in_latency_table(self) -> bool:
        """Whether a latency table prices the kind."""
        return self.is_whole_block or self in (UnitKind.KV_GROUP, UnitKind.MLP_CHANNEL)


KIND_BY_NAME: Mapping[str, UnitKind] = {kind.recipe_name: kind for kind in UnitKind}


@dataclass(frozen=True)
class LinearSlice:
    """The rows (of a producer) or columns (of a consumer) of one linear that each unit of a site owns.

    The rows fall into parts that lie end to end, one for each of query, key and value or of gate and up where these
    share a linear. In a part of size p, unit u owns the p rows from u * p on.
    """

    module: str  # "model.layers.3.self_attn.q_proj"
    part_sizes: tuple[int, ...]  # rows of a unit in each part
    start: int = 0  # rows before the first part, which another site owns
    total_rows: int = 0  # of the whole linear, where another site owns some; 0: this site owns all

    @property
    def rows_per_unit(self) -> int:
        return sum(self.part_sizes)

    def indices(self, kept: Iterable[int], units: int) -> Tensor:
        """The rows that these units, of a site of so many `units`, own: long [len(kept) * rows_per_unit], by part."""
        kept_units, start, rows = torch.from_numpy(np.array(tuple(kept), dtype=np.int64)), self.start, []
        for size in self.part_sizes:
            rows.append((start + kept_units[:, None] * size + torch.arange(size)).flatten())
            start += units * size
        return torch.cat(rows)

    def expand_to_rows(self, values: Tensor) -> Tensor:
        """One value per unit, [U], to one per row of the linear; rows of another site get 1."""
        parts = [values if size == 1 else values.repeat_interleave(size) for size in self.part_sizes]
        owned = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not self.total_rows:
            return owned
        after = self.total_rows - self.start - len(owned)
        return torch.cat([owned.new_ones(self.start), owned, owned.new_ones(after)])

    def sum_per_unit(self, rows: Tensor, units: int) -> Tensor:
        """[rows, ...] -> [U]: the sum over what each unit owns, in the dtype of the input."""
        rows = rows.flatten(1).sum(1) if rows.dim() > 1 else rows
        if self.total_rows:
            rows = rows[self.start : self.start + units * self.rows_per_unit]
        parts = torch.split(rows, [units * size for size in self.part_sizes])
        sums = [part.view(units, -1).sum(1) for part in parts]
        return torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]


@dataclass(frozen=True)
class ParamSlice:
    """The entries of a parameter outside linears that each unit owns: attention sinks, a router, fused experts.

    With parent groups, the first axis is the groups', and each group loses entries of its own along `axis`.
    """

    parameter: str  # "model.layers.3.mlp.experts.down_proj"
    axis: int
    part_sizes: tuple[int, ...] = (1,)
    parent_groups: int = 1

    def indices(self, kept: Iterable[int], units: int) -> Tensor:
        """As `LinearSlice.indices`; both arguments count inside one parent group."""
        return LinearSlice(self.parameter, self.part_sizes).indices(kept, units)


@dataclass(frozen=True, kw_only=True)
class SiteWeights:
    """The weights that the units of a site own."""

    producers: tuple[LinearSlice, ...] = ()  # lose output rows
    consumer: LinearSlice | None = None  # loses input columns
    readers: tuple[LinearSlice, ...] = ()  # of hidden channels: all linears that lose input columns
    consumer_is_childs: bool = False  # the consumer's columns are owned by the units of the site inside this one
    params: tuple[ParamSlice, ...] = ()  # parameters that belong to no linear
    block_linears: tuple[str, ...] = ()  # linears of a whole block or layer, which leave with its only unit


@dataclass(frozen=True, kw_only=True)
class Site:
    """The units of one kind at one place of one layer: which they are, their size, their weights, how they nest."""

    name: str  # "model.layers.3.self_attn": the module with the producers and the consumer; ":kind" for other kinds
    layer: int
    kind: UnitKind

    units: int  # of the dense model
    # Weights and biases of decoder layers that leave with one unit, without those of the sites inside it, or of the
    # units of other sites that a hidden channel crosses.
    unit_params: int
    min_units_per_group: int = 1  # fewest units that each parent group may keep

    weights: SiteWeights
    gating: Gating = "columns"  # how a gate acts
    gated_module: str = ""  # the module that a gate acts on, where this is not the consumer

    parent: str = ""  # name of the site around this one; "" for an outermost site
    parent_groups: int = 1  # units fall into this many groups of equal length, side by side, that keep equal numbers
    # Weights and biases of the sites inside, or crossed, that leave with one unit of the dense model.
    child_params: int = 0
    hidden_params: int = 0  # of `unit_params`, those that leave with each hidden channel, if these are units
    outer_params: int = 0  # of a hidden channel: parameters of embedding, head and last norm that leave with it, too

    @property
    def producers(self) -> tuple[LinearSlice, ...]:
        return self.weights.producers

    @property
    def consumer(self) -> LinearSlice | None:
        """The slice that loses input columns; None for whole blocks and experts."""
        return self.weights.consumer

    @property
    def params(self) -> int:
        """Prunable parameters of the dense site, without those of the sites inside it."""
        return self.units * self.unit_params

    @property
    def total_unit_params(self) -> int:
        """Parameters that leave with one unit of the dense model, with those of the sites inside it."""
        return self.unit_params + self.child_params

    @property
    def units_per_group(self) -> int:
        return self.units // self.parent_groups

    @property
    def layer_prefix(self) -> str:
        """The layer's module: "model.layers.3"."""
        end = f".{self.layer}"
        return self.name[: f"{self.name}.".replace(":", ".").index(f"{end}.") + len(end)]

    def linear_slices(self) -> tuple[tuple[LinearSlice, int], ...]:
        """(slice, axis) of every linear that loses rows or columns with a unit."""
        weights = self.weights
        consumers = () if weights.consumer is None or weights.consumer_is_childs else (weights.consumer,)
        columns = ((reader, COLUMNS) for reader in (*consumers, *weights.readers))
        return (*((rows, ROWS) for rows in weights.producers), *columns)

    def linears(self) -> tuple[str, ...]:
        """Names of the linears that it cuts, or removes whole."""
        cut = [linear_slice.module for linear_slice, _ in self.linear_slices()]
        return tuple(dict.fromkeys([*cut, *self.weights.block_linears]))

    def open_parent_groups(self, kept_parents: Sequence[int] | None, parent_units: int) -> range | list[int]:
        """The parent groups inside kept units of the parent site; all groups where there is none (None)."""
        if kept_parents is None:
            return range(self.parent_groups)
        share = self.parent_groups // parent_units
        return [group for unit in kept_parents for group in range(unit * share, (unit + 1) * share)]


def dense_plan(sites: Iterable[Site]) -> Plan:
    """The plan that keeps every unit."""
    sites = tuple(sites)
    return Plan({site.name: tuple(range(site.units)) for site in sites}, {site.name: site.units for site in sites})


def hidden_site(sites: Iterable[Site]) -> Site | None:
    """The site of the hidden channels, if they are units."""
    return next((site for site in sites if site.kind is UnitKind.HIDDEN_CHANNEL), None)


def count_params(sites: Iterable[Site], counts: Mapping[str, Any]) -> Any:
    """Prunable parameters of decoder layers under {site: units kept}, which may be tensors: a scalar."""
    sites = tuple(sites)
    hidden = hidden_site(sites)
    removed = hidden.units - counts[hidden.name] if hidden else 0
    return sum(counts[site.name] * (site.unit_params - site.hidden_params * removed) for site in sites)


def kept_params(sites: Iterable[Site], plan: Plan) -> int:
    """Prunable parameters of decoder layers that a plan keeps."""
    return int(count_params(sites, plan.widths()))


def removed_params(sites: Iterable[Site], plan: Plan) -> int:
    """Parameters of the whole model that a plan removes."""
    sites = tuple(sites)
    outer = sum(site.outer_params * (site.units - len(plan.kept[site.name])) for site in sites)
    return prunable_params(sites) - kept_params(sites, plan) + outer


def kept_mask(kept: Sequence[int], units: int) -> Tensor:
    """Which units are kept: bool [U]. NumPy reads a long tuple of Python numbers in a fifth of PyTorch's time."""
    mask = np.zeros(units, dtype=bool)
    mask[np.array(kept, dtype=np.int64)] = True
    return torch.from_numpy(mask)


def kept_indices(plan: Plan, sites: Iterable[Site]) -> dict[tuple[str, int], Tensor]:
    """{(linear, axis): rows (axis 0) or columns (axis 1) that a plan keeps, ascending long}, of linears that lose some.

    Linears that are removed whole are left out, see `removed_linears`.
    """
    masks: dict[tuple[str, int], Tensor] = {}
    sites = tuple(sites)
    for site in without_removed_modules(sites, plan):
        kept = plan.kept[site.name]
        if not kept or len(kept) == site.units:
            continue
        units = kept_mask(kept, site.units)
        for linear_slice, axis in site.linear_slices():
            rows, key = linear_slice.expand_to_rows(units), (linear_slice.module, axis)
            masks[key] = masks[key] & rows if key in masks else rows
    return {key: mask.nonzero().flatten() for key, mask in masks.items()}


def without_removed_modules(sites: Sequence[Site], plan: Plan) -> tuple[Site, ...]:
    """The sites, that of hidden channels without the modules of blocks and layers that the plan removes whole.

    Norms of a removed layer stay: they run until the layer leaves the model's list.
    """
    hidden = hidden_site(sites)
    if hidden is None:
        return tuple(sites)
    linears, modules, layers = set[str](), list[str](), list[str]()
    for site in sites:
        if not plan.kept[site.name] and (site.kind.is_whole_block or site.kind is UnitKind.KV_GROUP):
            linears |= set(site.weights.block_linears)
            if site.kind is UnitKind.LAYER:
                layers.append(f"{site.layer_prefix}.")
            elif not site.weights.block_linears or site.gated_module not in site.weights.block_linears:
                modules.append(f"{site.gated_module or site.name}.")

    def is_left(name: str, *, is_norm: bool = False) -> bool:
        inside = [layer for layer in layers if name.startswith(layer)]
        if inside and not (is_norm and name.removeprefix(inside[0]).count(".") == 1):
            return False
        return name not in linears and not f"{name}.".startswith(tuple(modules))

    weights = replace(
        hidden.weights,
        producers=tuple(rows for rows in hidden.weights.producers if is_left(rows.module)),
        readers=tuple(columns for columns in hidden.weights.readers if is_left(columns.module)),
        params=tuple(param for param in hidden.weights.params if is_left(param.parameter, is_norm=True)),
    )
    return tuple(replace(site, weights=weights) if site is hidden else site for site in sites)


def removed_linears(plan: Plan, sites: Iterable[Site]) -> set[str]:
    """Linears that a plan removes whole."""
    return {name for site in sites if not plan.kept[site.name] for name in site.linears()}


def surviving_layers(plan: Plan, sites: Iterable[Site]) -> Iterator[int]:
    """Layers that a plan keeps, of those that have sites, ascending."""
    sites = tuple(sites)
    removed = {site.layer for site in sites if site.kind is UnitKind.LAYER and not plan.kept[site.name]}
    yield from sorted({site.layer for site in sites} - removed - {ALL_LAYERS})


def children_by_site(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """{site: the sites directly inside it}."""
    children: dict[str, list[Site]] = {}
    for site in sites:
        if site.parent:
            children.setdefault(site.parent, []).append(site)
    return children


def effective_gates(gates: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Tensor]:
    """Each gate times those of the sites around it: what is inside a closed unit is closed."""
    effective: dict[str, Tensor] = {}
    by_name = {site.name: site for site in sites}
    for site in sites:
        gate = gates[site.name]
        if site.parent:
            gate = gate * effective[site.parent].repeat_interleave(site.units // by_name[site.parent].units)
        effective[site.name] = gate
    return effective


def closed_fractions(gates: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Tensor]:
    """{site: [U]}: 1 - gate inside open blocks and layers, and 0 inside closed ones, which are not trained."""
    block_names = {site.name for site in sites if site.kind.is_whole_block}
    of_blocks = {name: gate if name in block_names else torch.ones_like(gate) for name, gate in gates.items()}
    blocks, units = effective_gates(of_blocks, sites), effective_gates(gates, sites)
    return {site.name: blocks[site.name] - units[site.name] for site in sites}


def effective_layout(layout: str, sites: Sequence[Site]) -> str:
    """The layout asked for, but "uniform" where only whole layers can be pruned: equal layers are left."""
    return "uniform" if all(site.kind is UnitKind.LAYER for site in sites) else layout


def prunable_params(sites: Iterable[Site]) -> int:
    """Prunable parameters of the dense model's decoder layers."""
    return sum(site.params for site in sites)


def kept_share(gates: Mapping[str, Tensor], sites: Iterable[Site], prices: Mapping[str, float] | None = None) -> Tensor:
    """Share of the prunable parameters, or of the units' prices, that gates keep: differentiable scalar in [0, 1]."""
    sites = tuple(sites)
    counts = {name: gate.sum() for name, gate in effective_gates(gates, sites).items()}
    if prices is None:
        return torch.as_tensor(count_params(sites, counts) / prunable_params(sites))
    kept = torch.stack([counts[site.name] * prices[site.name] for site in sites]).sum()
    return kept / sum(site.units * prices[site.name] for site in sites)


@dataclass(frozen=True)
class UnitWeight:
    """One parameter that the units of a site own, in part or whole."""

    parameter: nn.Parameter
    # Values of the parameter's shape -> their sum over the entries of each unit, float64 [U] on the CPU.
    sum_per_unit: Callable[[Tensor], Tensor]


def unit_weights(model: Any, site: Site) -> list[UnitWeight]:
    """Each producer's weight and bias, then the consumer's weight, then parameters that belong to no linear."""
    if site.kind.is_whole_block:
        linears = site.weights.block_linears
        modules = linears if site.gated_module in linears else (site.gated_module,)
        return [
            UnitWeight(parameter, lambda values: values.sum(dtype=torch.float64).cpu()[None])
            for name in modules
            for parameter in model.get_submodule(name).parameters()
        ]

    def of_linear(values: Tensor, linear_slice: LinearSlice, linear: Any, axis: int) -> Tensor:
        rows = as_out_in(linear, values) if axis == ROWS else as_out_in(linear, values).t()
        sums = rows.sum(1, dtype=torch.float64) if rows.dim() > 1 else rows.double()
        return linear_slice.sum_per_unit(sums.cpu(), site.units)

    def of_param(values: Tensor, param: ParamSlice) -> Tensor:
        groups, rows = values.double().cpu(), LinearSlice(param.parameter, param.part_sizes)
        groups, axis = (groups[None], param.axis + 1) if param.parent_groups == 1 else (groups, param.axis)
        units = site.units // param.parent_groups
        return torch.cat([rows.sum_per_unit(group, units) for group in groups.moveaxis(axis, 1)])

    weights = []
    for linear_slice, axis in site.linear_slices():
        linear = get_base_linear(model, linear_slice.module)
        sum_per_unit = partial(of_linear, linear_slice=linear_slice, linear=linear, axis=axis)
        biases = [linear.bias] if axis == ROWS and linear.bias is not None else []
        weights += [UnitWeight(parameter, sum_per_unit) for parameter in (linear.weight, *biases)]
    for param in site.weights.params:
        weights.append(UnitWeight(model.get_parameter(param.parameter), partial(of_param, param=param)))
    return weights
