"""Finding the sites of a model: its KV groups, query heads, MLP channels, experts and their channels, blocks, layers.

A KV group is one key head, its value head and the query heads that read them. Removing it removes rows of q, k and v
and the columns of o that read those query heads: rotary pairs stay whole, and grouped-query attention stays grouped.
`prunetune.pruning.units` says what a site is and how sites nest.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from prunetune.errors import ConfigError, UnknownArchitecture
from prunetune.plan import Plan
from prunetune.pruning.families import NO_ATTENTION, ArchitectureInfo, BlockLinears, MixtureOfExperts, architecture_info
from prunetune.pruning.hidden_channels import with_hidden_channels
from prunetune.pruning.linears import COLUMNS, ROWS, axis_size, get_base_linear
from prunetune.pruning.units import DEFAULT_UNITS, KIND_BY_NAME, LinearSlice, ParamSlice, Site, SiteWeights, UnitKind


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
            reason = f"{architecture.unprunable[kind]}; leave it out of budget.units"
            raise ConfigError(f"budget.units: {kind.recipe_name} cannot be pruned in this model: {reason}")
    sites: list[Site] = []
    seen_types: set[str] = set()
    for layer in range(len(architecture.layer_prefixes)):
        layer_type = architecture.layer_types[layer]
        sites += LayerSites(model, architecture, layer, kinds, layer_type not in seen_types).sites()
        seen_types.add(layer_type)
    if UnitKind.HIDDEN_CHANNEL in kinds:
        sites = [*with_hidden_channels(model, architecture.layer_prefixes, sites)]
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


def count_base_params(module: nn.Module) -> int:
    """Parameters without those of adapters."""
    return sum(weight.numel() for name, weight in module.named_parameters() if "lora_" not in name)


def layer_target_modules(model: nn.Module, architecture: ArchitectureInfo, prefix: str) -> list[str]:
    """The linears of one layer that get adapters."""
    present = dict(model.get_submodule(prefix).named_modules())
    names = [name for block in architecture.blocks.values() for name in (*block.producers, block.consumer)]
    return [f"{prefix}.{name}" for name in names if name in present]


# -- one layer ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSites:
    """Builds the sites of one layer."""

    model: nn.Module
    architecture: ArchitectureInfo
    layer: int
    kinds: frozenset[UnitKind]  # that the recipe asks for
    # The cache reads a sequence's length from the first layer of each attention type, so its attention is kept.
    first_of_type: bool

    @property
    def prefix(self) -> str:
        """The layer's module: "model.layers.3"."""
        return self.architecture.layer_prefixes[self.layer]

    def _is_removed(self, name: str) -> bool:
        """Whether an earlier run removed this module of the layer: what stands in its place has no weights."""
        module = dict(self.model.get_submodule(self.prefix).named_modules()).get(name)
        return module is not None and not any(True for _ in module.parameters())

    def sites(self) -> list[Site]:
        """All sites of the layer, outer ones first."""
        name = f"{self.prefix}:{UnitKind.LAYER}" if UnitKind.LAYER in self.kinds else ""
        children = [*self._attention_sites(name), *self._mlp_sites(name)]
        if not name:
            return children
        min_units = int(self.first_of_type)
        return [self._whole_block(name, UnitKind.LAYER, self.prefix, children, min_units=min_units), *children]

    def _block_name(self, module: str, kind: UnitKind) -> str:
        return f"{self.prefix}{'.' if module else ''}{module}:{kind}"

    def _whole_block(
        self, name: str, kind: UnitKind, module: str, children: Sequence[Site], *, parent: str = "", min_units: int
    ) -> Site:
        """A block, or the layer, as the only unit of a site; `module` is the one whose output is gated."""
        mlp_linears: tuple[str, ...] = ()
        if kind is UnitKind.MLP_BLOCK and not self._mixture() and (block := self._present(self.architecture.mlp)):
            mlp_linears = tuple(f"{self.prefix}.{name}" for name in (*block.producers, block.consumer))
        targets = layer_target_modules(self.model, self.architecture, self.prefix)
        linears = mlp_linears or tuple(target for target in targets if target.startswith(f"{module}."))
        params = sum(count_base_params(self.model.get_submodule(removed)) for removed in mlp_linears or (module,))
        child_params = sum(site.params for site in children)
        return Site(
            name=name,
            layer=self.layer,
            kind=kind,
            units=1,
            unit_params=params - child_params,
            min_units_per_group=min_units,
            weights=SiteWeights(block_linears=linears),
            gating="layer" if kind is UnitKind.LAYER else "output",
            gated_module=module,
            parent=parent,
            child_params=child_params,
        )

    def _site(self, name: str, kind: UnitKind, units: int, weights: SiteWeights, parent: str, **options: Any) -> Site:
        """A site of several units, with their parameters counted.

        Raises `UnknownArchitecture` where a linear has other rows than those of so many units.
        """
        params = sum(self.model.get_parameter(param.parameter).numel() // units for param in weights.params)
        for producer in weights.producers:
            linear = get_base_linear(self.model, producer.module)
            rows = axis_size(linear, ROWS)
            if rows != (producer.total_rows or units * producer.rows_per_unit):
                raise UnknownArchitecture(f"{producer.module}: {rows} rows are not of {units} units")
            params += producer.rows_per_unit * (axis_size(linear, COLUMNS) + (linear.bias is not None))
        if weights.consumer and not weights.consumer_is_childs:
            params += get_base_linear(self.model, weights.consumer.module).weight.numel() // units
        return Site(
            name=name, layer=self.layer, kind=kind, units=units, unit_params=params, weights=weights, parent=parent,
            **options,
        )  # fmt: skip

    def _present(self, block: BlockLinears | None) -> BlockLinears | None:
        """The block with those of its producers that this layer has; None where the layer lacks it."""
        modules = dict(self.model.get_submodule(self.prefix).named_modules())
        if block is None or block.consumer not in modules:
            return None
        return replace(block, producers=tuple(name for name in block.producers if name in modules))

    def _attention_sites(self, parent: str) -> list[Site]:
        attention, kind = self.architecture.attention_name, UnitKind.ATTENTION_BLOCK
        if self._is_removed(attention) or self.architecture.layer_types[self.layer].endswith(NO_ATTENTION):
            return []
        name = self._block_name(attention, kind) if kind in self.kinds else ""
        block = self._present(self.architecture.blocks.get(UnitKind.KV_GROUP))
        children = self._head_sites(block, name or parent) if block and any(k.is_head for k in self.kinds) else []
        if not name:
            return children
        module, min_units = f"{self.prefix}.{attention}", int(self.first_of_type)
        return [self._whole_block(name, kind, module, children, parent=parent, min_units=min_units), *children]

    def _head_sites(self, block: BlockLinears, parent: str) -> list[Site]:
        """KV groups, query heads, or query heads inside KV groups."""
        heads, consumer = self.architecture.layer_heads[self.layer], f"{self.prefix}.{block.consumer}"
        output = get_base_linear(self.model, consumer)
        value_dim, rest = divmod(axis_size(output, COLUMNS), heads.query_heads)
        # Keys and values from a latent vector (MLA) have heads of sizes of their own.
        is_latent = any(name.endswith("kv_b_proj") for name in block.producers)
        if heads.query_heads % heads.kv_heads or rest or (value_dim != heads.head_dim and not is_latent):
            raise UnknownArchitecture(
                f"{self.prefix}: {heads.query_heads} query heads of {heads.head_dim} do not divide over "
                f"{heads.kv_heads} key-value heads, or are not the {axis_size(output, COLUMNS)} columns of "
                f"{block.consumer}"
            )
        has_groups, has_queries = UnitKind.KV_GROUP in self.kinds, UnitKind.QUERY_HEAD in self.kinds
        group_rows, query_rows = self._head_rows(block, split_queries=has_queries)
        sinks = f"{self.prefix}.{self.architecture.family.attention_sinks}"
        has_sinks = bool(self.architecture.family.attention_sinks)
        name, sites = consumer.rpartition(".")[0], []
        if has_groups:
            # An output bias outlives the last group, which a layer without attention cannot express; and some models
            # do not run without it.
            blocks = {*self.kinds, *self.architecture.unprunable}
            min_groups = self.first_of_type or output.bias is not None or UnitKind.ATTENTION_BLOCK in blocks
            ratio = heads.queries_per_kv_head
            weights = SiteWeights(
                producers=group_rows,
                consumer=LinearSlice(consumer, (ratio * value_dim,)),
                consumer_is_childs=has_queries,
                params=(ParamSlice(sinks, 0, (ratio,)),) if has_sinks and not has_queries else (),
            )
            options = {"min_units_per_group": int(min_groups)}
            sites.append(self._site(name, UnitKind.KV_GROUP, heads.kv_heads, weights, parent, **options))
        if has_queries:
            weights = SiteWeights(
                producers=query_rows,
                consumer=LinearSlice(consumer, (value_dim,)),
                params=(ParamSlice(sinks, 0),) if has_sinks else (),
            )
            parent, name = name if has_groups else parent, f"{name}:{UnitKind.QUERY_HEAD}"
            options = {"parent_groups": heads.kv_heads}
            sites.append(self._site(name, UnitKind.QUERY_HEAD, heads.query_heads, weights, parent, **options))
        return _with_child_params(sites)

    def _head_rows(
        self, block: BlockLinears, *, split_queries: bool
    ) -> tuple[tuple[LinearSlice, ...], tuple[LinearSlice, ...]]:
        """The rows that KV groups own, and those that query heads own where these are units of their own."""
        heads = self.architecture.layer_heads[self.layer]
        dim = heads.head_dim
        group_queries = heads.queries_per_kv_head * dim
        group_rows, query_rows = [], []
        for name in block.producers:
            module = f"{self.prefix}.{name}"
            rows = axis_size(get_base_linear(self.model, module), ROWS)
            # Query, key, value in this order: Phi-3.
            fused = len(block.producers) == 1 and rows == heads.kv_heads * (group_queries + 2 * dim)
            if not split_queries:
                part_sizes = (group_queries, dim, dim) if fused else (rows // heads.kv_heads,)
                group_rows.append(LinearSlice(module, part_sizes))
            elif fused:
                query_rows.append(LinearSlice(module, (dim,), 0, rows))
                group_rows.append(LinearSlice(module, (dim, dim), heads.kv_heads * group_queries, rows))
            elif rows % (heads.kv_heads * group_queries) == 0:  # twice as many with a gate beside each query: Qwen 3.5
                query_rows.append(LinearSlice(module, (rows // heads.query_heads,)))
            else:
                group_rows.append(LinearSlice(module, (rows // heads.kv_heads,)))
        return tuple(group_rows), tuple(query_rows)

    def _mixture(self) -> MixtureOfExperts | None:
        """The family's experts, where this layer has them."""
        mixture = self.architecture.family.mixture
        layer = self.model.get_submodule(self.prefix)
        return mixture if mixture and mixture.experts in dict(layer.named_modules()) else None

    def _mlp_sites(self, parent: str) -> list[Site]:
        mixture, block, kind = self._mixture(), self._present(self.architecture.mlp), UnitKind.MLP_BLOCK
        if not mixture and not block:
            return []
        module = mixture.block if mixture else block.module if block else ""
        experts = self.architecture.family.mixture
        if (experts and self._is_removed(experts.block)) or (block and self._is_removed(block.consumer)):
            return []
        name = self._block_name(module, kind) if kind in self.kinds else ""
        children = []
        if mixture:
            children = self._expert_sites(mixture, name or parent)
        elif block and UnitKind.MLP_CHANNEL in self.kinds and UnitKind.MLP_CHANNEL in self.architecture.blocks:
            children = [self._channel_site(block, name or parent)]
        if not name:
            return children
        gated = f"{self.prefix}.{block.consumer if block and not mixture else module}"
        return [self._whole_block(name, kind, gated, children, parent=parent, min_units=0), *children]

    def _channel_site(self, block: BlockLinears, parent: str) -> Site:
        consumer = f"{self.prefix}.{block.consumer}"
        channels = axis_size(get_base_linear(self.model, consumer), COLUMNS)
        producers = []
        for name in block.producers:
            module = f"{self.prefix}.{name}"
            parts = axis_size(get_base_linear(self.model, module), ROWS) // channels  # 2: gate above up, as in Phi-3
            producers.append(LinearSlice(module, (1,) * parts))
        weights = SiteWeights(producers=tuple(producers), consumer=LinearSlice(consumer, (1,)))
        return self._site(consumer.rpartition(".")[0], UnitKind.MLP_CHANNEL, channels, weights, parent)

    def _expert_sites(self, mixture: MixtureOfExperts, parent: str) -> list[Site]:
        """Experts, channels of every expert, or channels inside experts."""
        module, router = f"{self.prefix}.{mixture.experts}", f"{self.prefix}.{mixture.router}"
        fused = dict(self.model.get_submodule(module).named_parameters())
        out, into = (2, 1) if mixture.transposed else (1, 2)  # axes of an expert's outputs and inputs
        experts, channels = fused["down_proj"].shape[0], fused["down_proj"].shape[into]
        gate_up = (2,) if mixture.interleaved else (1, 1)
        channel_axes = {"gate_up_proj": (out, gate_up), "gate_up_proj_bias": (1, gate_up), "down_proj": (into, (1,))}
        has_experts, has_channels = UnitKind.EXPERT in self.kinds, UnitKind.EXPERT_CHANNEL in self.kinds
        name, sites, options = self._block_name(mixture.block, UnitKind.EXPERT), [], dict[str, Any]()
        if has_experts:
            owned = [f"{router}.{param}" for param, _ in self.model.get_submodule(router).named_parameters()]
            owned += [f"{module}.{param}" for param in fused if not (has_channels and param in channel_axes)]
            weights = SiteWeights(params=tuple(ParamSlice(param, 0) for param in owned))
            options = {"min_units_per_group": self.architecture.experts_per_token}
            options |= {"gating": "router", "gated_module": router}
            sites.append(self._site(name, UnitKind.EXPERT, experts, weights, parent, **options))
        if has_channels:
            slices = [
                ParamSlice(f"{module}.{param}", axis, part_sizes, experts)
                for param, (axis, part_sizes) in channel_axes.items()
                if param in fused
            ]
            weights = SiteWeights(params=tuple(slices))
            parent, name = name if has_experts else parent, self._block_name(mixture.block, UnitKind.EXPERT_CHANNEL)
            options = {"parent_groups": experts, "gating": "expert columns", "gated_module": module}
            sites.append(self._site(name, UnitKind.EXPERT_CHANNEL, experts * channels, weights, parent, **options))
        return _with_child_params(sites)


def _with_child_params(sites: list[Site]) -> list[Site]:
    """Of an outer and an inner site, add to the outer one the inner parameters that leave with each of its units."""
    if len(sites) < 2:
        return sites
    outer, inner = sites
    return [replace(outer, child_params=inner.params // outer.units), inner]
