"""Where whole units can go: KV groups with their query heads, and MLP channels.

A KV group is one key head, its value head and the query heads that read them. Removing it removes rows of q, k and v
and the columns of o that read those query heads: rotary pairs stay whole, and grouped-query attention stays grouped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunetune.errors import UnknownArchitecture
from prunetune.model.families import Coupling, Kind, coupling_of
from prunetune.plan import Plan


@dataclass(frozen=True)
class Cut:
    """One linear layer's share in the units of a site: which rows (producer) or columns (consumer) each of them owns.

    The rows fall into parts that lie end to end, one for each of query, key and value or of gate and up where these
    share a linear; in a part of p, unit u owns the p rows from u * p on.
    """

    module: str  # "model.layers.3.self_attn.q_proj"
    parts: tuple[int, ...]  # rows of a unit in each part

    @property
    def per_unit(self) -> int:
        """Rows that one unit owns."""
        return sum(self.parts)

    def indices(self, kept: Iterable[int], units: int) -> Tensor:
        """The rows that the kept of so many units own, in order: long [len(kept) * per_unit]."""
        chosen, start, found = torch.tensor(tuple(kept), dtype=torch.long), 0, []
        for size in self.parts:
            found.append((start + chosen[:, None] * size + torch.arange(size)).flatten())
            start += units * size
        return torch.cat(found)

    def spread(self, values: Tensor) -> Tensor:
        """One value per unit -> one per row. Query heads of a KV group lie side by side, so a group is one run."""
        parts = [values if size == 1 else values.repeat_interleave(size) for size in self.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def summed(self, rows: Tensor, units: int) -> Tensor:
        """[rows, ...] -> [U]: the sum over what each unit owns, in the dtype of `rows`."""
        rows = rows.flatten(1).sum(1) if rows.dim() > 1 else rows
        parts = [part.view(units, -1).sum(1) for part in torch.split(rows, [units * size for size in self.parts])]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class Site:
    """A place in one layer where whole units can go."""

    name: str  # "model.layers.3.self_attn": the module that holds the producers and the consumer
    layer: int
    kind: Kind
    units: int
    producers: tuple[Cut, ...]  # lose output rows
    consumer: Cut  # loses input columns
    unit_params: int  # weights and biases that leave with one unit
    floor: int = 1  # fewest units that may stay

    @property
    def params(self) -> int:
        """Prunable parameters of the dense site."""
        return self.units * self.unit_params


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """All sites of a `transformers` causal language model, in layer order; works on the meta device.

    Raises `UnknownArchitecture` where neither the configuration's tensor-parallel plan nor `families` tells which
    rows and columns belong together.
    """
    coupling = coupling_of(model)
    sites: list[Site] = []
    seen_types: set[str] = set()
    for layer, prefix in enumerate(coupling.layer_prefixes):
        first_of_type = coupling.layer_type(layer) not in seen_types
        seen_types.add(coupling.layer_type(layer))
        if "attention" in coupling.blocks:
            sites.append(_attention_site(model, coupling, prefix, layer, first_of_type=first_of_type))
        if "mlp" in coupling.blocks:
            sites.append(_mlp_site(model, coupling, prefix, layer))
    return tuple(sites)


def whole_blocks(model: nn.Module) -> dict[Kind, str]:
    """The kinds of block that cannot be pruned in this architecture, with the reason."""
    return dict(coupling_of(model).whole)


def whole_params(model: nn.Module) -> int:
    """Parameters of the decoder layers that no unit owns, where a kind of block stays whole; else 0."""
    coupling = coupling_of(model)
    if not coupling.whole:
        return 0
    layers = (model.get_submodule(prefix) for prefix in coupling.layer_prefixes)
    everything = sum(weight.numel() for layer in layers for weight in layer.parameters())
    return everything - sum(site.params for site in find_sites(model))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    module = getattr(module, "base_layer", module)  # under LoRA
    if not isinstance(module, nn.Linear):
        raise UnknownArchitecture(
            f"{name} is a {type(module).__name__}, and only nn.Linear can be cut: "
            "load the model unquantised, or prune a family listed in docs/add-an-architecture.md"
        )
    return module


def _attention_site(model: nn.Module, coupling: Coupling, prefix: str, layer: int, *, first_of_type: bool) -> Site:
    block, heads = coupling.blocks["attention"], coupling.heads
    groups, size, queries = heads.groups, heads.size, heads.ratio * heads.size
    consumer = f"{prefix}.{block.consumer}"
    if heads.queries % groups or _linear(model, consumer).in_features != heads.queries * size:
        raise UnknownArchitecture(
            f"{prefix}: {heads.queries} query heads of {size} do not divide over {groups} key-value heads, "
            f"or are not the {_linear(model, consumer).in_features} columns of {block.consumer}"
        )
    cuts = []
    for name in block.producers:
        rows = _linear(model, f"{prefix}.{name}").out_features
        fused = rows == groups * (queries + 2 * size)  # query, key, value in this order: Phi-3
        cuts.append(Cut(f"{prefix}.{name}", (queries, size, size) if fused else (rows // groups,)))
    # The cache tells a sequence's length from the first layer of each type, so that layer has to attend; and an
    # output bias outlives its last group, which a layer without attention cannot express.
    floor = 1 if first_of_type or _linear(model, consumer).bias is not None else 0
    return _site(model, layer, "attention", groups, cuts, Cut(consumer, (queries,)), floor)


def _mlp_site(model: nn.Module, coupling: Coupling, prefix: str, layer: int) -> Site:
    block = coupling.blocks["mlp"]
    consumer = f"{prefix}.{block.consumer}"
    units = _linear(model, consumer).in_features
    # Gate above up in one linear: Phi-3, GLM.
    sizes = [_linear(model, f"{prefix}.{name}").out_features // units for name in block.producers]
    cuts = [Cut(f"{prefix}.{name}", (1,) * size) for name, size in zip(block.producers, sizes, strict=True)]
    return _site(model, layer, "mlp", units, cuts, Cut(consumer, (1,)), 1)


def _site(
    model: nn.Module, layer: int, kind: Kind, units: int, producers: Sequence[Cut], consumer: Cut, floor: int
) -> Site:
    params = _linear(model, consumer.module).weight.numel() // units
    for cut in producers:
        makes = _linear(model, cut.module)
        if makes.out_features != units * cut.per_unit:
            raise UnknownArchitecture(f"{cut.module}: {makes.out_features} rows are not of {units} units")
        params += cut.per_unit * (makes.in_features + (makes.bias is not None))
    name = consumer.module.rpartition(".")[0]
    return Site(name, layer, kind, units, tuple(producers), consumer, params, floor)


def dense_plan(sites: Iterable[Site]) -> Plan:
    """The plan that keeps everything."""
    sites = tuple(sites)
    return Plan({site.name: tuple(range(site.units)) for site in sites}, {site.name: site.units for site in sites})


def kept_params(sites: Iterable[Site], plan: Plan) -> int:
    """Prunable parameters that stay under a plan."""
    return sum(site.unit_params * len(plan.kept[site.name]) for site in sites)
