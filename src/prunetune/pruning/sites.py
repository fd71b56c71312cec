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
from prunetune.pruning.families import coupling_of
from prunetune.pruning.layer_sites import Layer, params_of
from prunetune.pruning.units import KINDS, NAMES, USUAL, Cut, Kind, Site, dense_plan, kept_params

__all__ = [
    "Cut",
    "Site",
    "dense_plan",
    "find_sites",
    "kept_params",
    "sites_of",
    "tuned_linears",
    "whole_blocks",
    "whole_params",
]


def find_sites(model: nn.Module, units: Collection[str] = USUAL) -> tuple[Site, ...]:
    """All sites of a `transformers` causal language model for these kinds of unit, in layer order; outer ones first.

    Works on the meta device. Raises `UnknownArchitecture` where neither the configuration's tensor-parallel plan nor
    `families` tells which rows and columns belong together, and `ConfigError` for a kind that the model cannot lose:
    the usual two are taken as far as they are there.
    """
    coupling = coupling_of(model)
    wanted = frozenset(KINDS[name] for name in units)
    for kind in wanted & set(coupling.whole):
        if NAMES[kind] not in USUAL:
            raise ConfigError(f"budget.units: {NAMES[kind]} cannot be pruned in this model: {coupling.whole[kind]}")
    sites: list[Site] = []
    seen_types: set[str] = set()
    for layer, prefix in enumerate(coupling.layer_prefixes):
        first_of_type = coupling.layer_type(layer) not in seen_types
        seen_types.add(coupling.layer_type(layer))
        sites += Layer(model, coupling, prefix, layer, wanted, first_of_type).sites()
    if not sites:
        raise ConfigError(
            f"budget.units {', '.join(units)}: none of them is in this model; "
            "`prunetune sites MODEL` names those that are"
        )
    return tuple(sites)


def sites_of(model: nn.Module, plan: Plan) -> tuple[Site, ...]:
    """The sites that a plan is about: its names tell the kinds of unit."""
    others = [name for name in KINDS if any(site.endswith(f":{name}") for site in plan.units)]
    choices = [[*others, *some] for some in (USUAL, USUAL[:1], USUAL[1:], ()) if others or some]
    for units in choices:
        try:
            sites = find_sites(model, units)
        except ConfigError:
            continue
        if {site.name for site in sites} == set(plan.units):
            return sites
    return find_sites(model, choices[0])


def whole_blocks(model: nn.Module, units: Collection[str] = USUAL) -> dict[Kind, str]:
    """The kinds of these units that cannot be pruned in this architecture, with the reason."""
    return {kind: reason for kind, reason in coupling_of(model).whole.items() if NAMES[kind] in units}


def whole_params(model: nn.Module, units: Collection[str] = USUAL) -> int:
    """Parameters of the decoder layers that no unit owns, where a kind of block stays whole; else 0."""
    coupling = coupling_of(model)
    if set(units) == set(USUAL) and not whole_blocks(model):
        return 0
    everything = sum(params_of(model.get_submodule(prefix)) for prefix in coupling.layer_prefixes)
    return everything - sum(site.params for site in find_sites(model, units))


def tuned_linears(model: nn.Module) -> list[str]:
    """The linears that adapters go on: of attention and MLP, whatever the units; a block that stays whole has none."""
    coupling = coupling_of(model)
    layers = (
        Layer(model, coupling, prefix, index, frozenset(), False)
        for index, prefix in enumerate(coupling.layer_prefixes)
    )
    return [name for layer in layers for name in layer.tuned_linears()]
