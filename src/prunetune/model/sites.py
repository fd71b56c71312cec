"""Where whole units can go: KV groups with their query heads, and MLP channels.

A KV group is one key head, its value head and the query heads that read them. Removing it removes rows of q, k and v
and the columns of o that read those query heads: rotary pairs stay whole, and grouped-query attention stays grouped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from prunetune.errors import UnknownArchitecture
from prunetune.model.families import Coupling, coupling_of
from prunetune.plan import Plan

Kind = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Cut:
    """One linear layer's share in a unit: how many of its rows (producer) or columns (consumer) a unit owns."""

    module: str  # "model.layers.3.self_attn.q_proj"
    per_unit: int


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
        sites.append(_attention_site(model, coupling, prefix, layer, first_of_type=first_of_type))
        sites.append(_mlp_site(model, coupling, prefix, layer))
    return tuple(sites)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    module = getattr(module, "base_layer", module)  # under LoRA
    if not isinstance(module, nn.Linear):
        raise UnknownArchitecture(
            f"{name} is a {type(module).__name__}, and only nn.Linear can be cut: "
            "load the model unquantised, or prune a family listed in docs/concepts.md"
        )
    return module


def _attention_site(model: nn.Module, coupling: Coupling, prefix: str, layer: int, *, first_of_type: bool) -> Site:
    consumer = f"{prefix}.{coupling.attention.consumer}"
    heads = _linear(model, consumer).in_features // coupling.head_dim
    groups = _linear(model, f"{prefix}.{coupling.attention.key}").out_features // coupling.head_dim
    if groups == 0 or heads % groups:
        raise UnknownArchitecture(f"{prefix}: {heads} query heads do not divide over {groups} key-value heads")
    # The cache tells a sequence's length from the first layer of each type, so that layer has to attend; and an
    # output bias outlives its last group, which a layer without attention cannot express.
    floor = 1 if first_of_type or _linear(model, consumer).bias is not None else 0
    return _site(model, prefix, layer, "attention", groups, coupling.attention.producers, consumer, floor)


def _mlp_site(model: nn.Module, coupling: Coupling, prefix: str, layer: int) -> Site:
    consumer = f"{prefix}.{coupling.mlp.consumer}"
    units = _linear(model, consumer).in_features
    return _site(model, prefix, layer, "mlp", units, coupling.mlp.producers, consumer, 1)


def _site(
    model: nn.Module,
    prefix: str,
    layer: int,
    kind: Kind,
    units: int,
    producers: Iterable[str],
    consumer: str,
    floor: int,
) -> Site:
    reads = _linear(model, consumer)
    params = reads.weight.numel() // units
    cuts = []
    for producer in producers:
        makes = _linear(model, f"{prefix}.{producer}")
        rows = makes.out_features // units
        params += rows * (makes.in_features + (makes.bias is not None))
        cuts.append(Cut(f"{prefix}.{producer}", rows))
    name = consumer.rpartition(".")[0]
    return Site(name, layer, kind, units, tuple(cuts), Cut(consumer, reads.in_features // units), params, floor)


def dense_plan(sites: Iterable[Site]) -> Plan:
    """The plan that keeps everything."""
    sites = tuple(sites)
    return Plan({site.name: tuple(range(site.units)) for site in sites}, {site.name: site.units for site in sites})


def kept_params(sites: Iterable[Site], plan: Plan) -> int:
    """Prunable parameters that stay under a plan."""
    return sum(site.unit_params * len(plan.kept[site.name]) for site in sites)
