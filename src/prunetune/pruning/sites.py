"""Where whole units can go: KV groups, query heads, MLP channels, experts and their channels, blocks, layers.

A KV group is one key head, its value head and the query heads that read them. Removing it removes rows of q, k and v
and the columns of o that read those query heads: rotary pairs stay whole, and grouped-query attention stays grouped.
`model.units` says what a site is and how sites nest.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from prunetune.errors import ConfigError
from prunetune.plan import Plan
from prunetune.pruning.families import architecture_info
from prunetune.pruning.layer_sites import LayerSites, count_base_params
from prunetune.pruning.units import (
    DEFAULT_UNITS,
    KIND_BY_NAME,
    NAME_BY_KIND,
    LinearSlice,
    Site,
    UnitKind,
    dense_plan,
    kept_params,
)

__all__ = [
    "LinearSlice",
    "Site",
    "dense_plan",
    "find_sites",
    "kept_params",
    "lora_target_modules",
    "sites_from_plan",
    "unprunable_kinds",
    "unprunable_params",
]


def find_sites(model: nn.Module, units: Collection[str] = DEFAULT_UNITS) -> tuple[Site, ...]:
    """All sites of a `transformers` causal language model for these kinds of unit, in layer order; outer ones first.

    Works on the meta device. Raises `UnknownArchitecture` where neither the configuration's tensor-parallel plan nor
    `families` tells which rows and columns belong together, and `ConfigError` for a kind that the model cannot lose:
    the usual two are taken as far as they are there.
    """
    coupling = architecture_info(model)
    wanted = frozenset(KIND_BY_NAME[name] for name in units)
    for kind in wanted & set(coupling.unprunable):
        if NAME_BY_KIND[kind] not in DEFAULT_UNITS:
            raise ConfigError(
                f"budget.units: {NAME_BY_KIND[kind]} cannot be pruned in this model: {coupling.unprunable[kind]}"
            )
    sites: list[Site] = []
    seen_types: set[str] = set()
    for layer, prefix in enumerate(coupling.layer_prefixes):
        first_of_type = coupling.layer_type(layer) not in seen_types
        seen_types.add(coupling.layer_type(layer))
        sites += LayerSites(model, coupling, prefix, layer, wanted, first_of_type).sites()
    if not sites:
        raise ConfigError(
            f"budget.units {', '.join(units)}: none of them is in this model; "
            "`prunetune sites MODEL` names those that are"
        )
    return tuple(sites)


def sites_from_plan(model: nn.Module, plan: Plan) -> tuple[Site, ...]:
    """The sites that a plan is about: its names tell the kinds of unit."""
    others = [name for name in KIND_BY_NAME if any(site.endswith(f":{name}") for site in plan.units)]
    choices = [[*others, *some] for some in (DEFAULT_UNITS, DEFAULT_UNITS[:1], DEFAULT_UNITS[1:], ()) if others or some]
    for units in choices:
        try:
            sites = find_sites(model, units)
        except ConfigError:
            continue
        if {site.name for site in sites} == set(plan.units):
            return sites
    return find_sites(model, choices[0])


def unprunable_kinds(model: nn.Module, units: Collection[str] = DEFAULT_UNITS) -> dict[UnitKind, str]:
    """The kinds of these units that cannot be pruned in this architecture, with the reason."""
    return {kind: reason for kind, reason in architecture_info(model).unprunable.items() if NAME_BY_KIND[kind] in units}


def unprunable_params(model: nn.Module, units: Collection[str] = DEFAULT_UNITS) -> int:
    """Parameters of the decoder layers that no unit owns, where a kind of block stays whole; else 0."""
    coupling = architecture_info(model)
    if set(units) == set(DEFAULT_UNITS) and not unprunable_kinds(model):
        return 0
    everything = sum(count_base_params(model.get_submodule(prefix)) for prefix in coupling.layer_prefixes)
    return everything - sum(site.params for site in find_sites(model, units))


def lora_target_modules(model: nn.Module) -> list[str]:
    """The linears that adapters go on: of attention and MLP, whatever the units; a block that stays whole has none."""
    coupling = architecture_info(model)
    layers = (
        LayerSites(model, coupling, prefix, index, frozenset(), False)
        for index, prefix in enumerate(coupling.layer_prefixes)
    )
    return [name for layer in layers for name in layer.lora_target_modules()]
