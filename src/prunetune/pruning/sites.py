"""Finding the sites of a model: its KV groups, query heads, MLP channels, experts and their channels, blocks, layers.

A KV group is one key head, its value head and the query heads that read them. Removing it removes rows of q, k and v
and the columns of o that read those query heads: rotary pairs stay whole, and grouped-query attention stays grouped.
`prunetune.pruning.units` says what a site is and how sites nest.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from prunetune.errors import ConfigError
from prunetune.plan import Plan
from prunetune.pruning.families import architecture_info
from prunetune.pruning.layer_sites import LayerSites, count_base_params, layer_target_modules
from prunetune.pruning.units import DEFAULT_UNITS, KIND_BY_NAME, Site, UnitKind


def find_sites(model: nn.Module, units: Collection[str] = DEFAULT_UNITS) -> tuple[Site, ...]:
    """All sites of these kinds in a causal language model of `transformers`, in layer order, outer ones first.

    Works on the meta device. Raises `UnknownArchitecture` where neither the configuration's tensor-parallel plan nor
    `families` says which rows and columns belong together, and `ConfigError` for a kind that cannot be pruned in this
    model. Of the two default kinds, one that cannot be pruned is left out.
    """
    architecture = architecture_info(model)
    kinds = frozenset(KIND_BY_NAME[name] for name in units)
    for kind in kinds & set(architecture.unprunable):
        if kind.recipe_name not in DEFAULT_UNITS:
            reason = architecture.unprunable[kind]
            raise ConfigError(f"budget.units: {kind.recipe_name} cannot be pruned in this model: {reason}")
    sites: list[Site] = []
    seen_types: set[str] = set()
    for layer in range(len(architecture.layer_prefixes)):
        layer_type = architecture.layer_types[layer]
        sites += LayerSites(model, architecture, layer, kinds, layer_type not in seen_types).sites()
        seen_types.add(layer_type)
    if not sites:
        raise ConfigError(
            f"budget.units {', '.join(units)}: none of them is in this model; "
            "`prunetune sites MODEL` names those that are"
        )
    return tuple(sites)


def sites_from_plan(model: nn.Module, plan: Plan) -> tuple[Site, ...]:
    """The sites that a plan was made for, found by their names."""
    named = [name for name in KIND_BY_NAME if any(site.endswith(f":{name}") for site in plan.units)]
    unnamed = (DEFAULT_UNITS, DEFAULT_UNITS[:1], DEFAULT_UNITS[1:], ())  # names of these sites do not say their kind
    choices = [[*named, *units] for units in unnamed if named or units]
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
    return {kind: reason for kind, reason in architecture_info(model).unprunable.items() if kind.recipe_name in units}


def unprunable_params(model: nn.Module, units: Collection[str] = DEFAULT_UNITS) -> int:
    """Parameters of the decoder layers that no unit of these kinds owns; 0 if both default kinds can be pruned."""
    architecture = architecture_info(model)
    if set(units) == set(DEFAULT_UNITS) and not unprunable_kinds(model):
        return 0
    params = sum(count_base_params(model.get_submodule(prefix)) for prefix in architecture.layer_prefixes)
    return params - sum(site.params for site in find_sites(model, units))


def lora_target_modules(model: nn.Module) -> list[str]:
    """The linears that get adapters: those of attention and MLP that can be cut, whatever kinds a recipe prunes."""
    info = architecture_info(model)
    return [name for prefix in info.layer_prefixes for name in layer_target_modules(model, info, prefix)]
