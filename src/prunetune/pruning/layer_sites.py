"""The sites of one layer: which lines of which weights its units own, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from prunetune.errors import UnknownArchitecture
from prunetune.pruning.families import ArchitectureInfo, BlockLinears
from prunetune.pruning.linears import COLUMNS, ROWS, axis_size, get_base_linear
from prunetune.pruning.units import Gating, LinearSlice, ParamSlice, Site, UnitKind


def _has(layer: nn.Module, name: str) -> bool:
    try:
        layer.get_submodule(name)
    except AttributeError:
        return False
    return True


def count_base_params(module: nn.Module) -> int:
    """Without adapters."""
    return sum(weight.numel() for name, weight in module.named_parameters() if "lora_" not in name)


@dataclass(frozen=True)
class LayerSites:
    """One layer, and the kinds of unit that it may lose."""

    model: nn.Module
    architecture: ArchitectureInfo
    prefix: str
    layer: int
    kinds: frozenset[UnitKind]
    first_of_type: bool

    def sites(self) -> list[Site]:
        """Outer ones first."""
        around = self._name("", "layers") if "layers" in self.kinds else ""
        inner = [*self._attention(around), *self._mlp(around)]
        if not around:
            return inner
        whole = self._whole("layers", "", around, inner, module=self.prefix, gating="layer", keep=self.first_of_type)
        return [whole, *inner]

    def lora_target_modules(self) -> list[str]:
        """The linears that adapters go on."""
        blocks = self.architecture.blocks.values()
        names = (name for block in blocks for name in (*block.producers, block.consumer))
        return [f"{self.prefix}.{name}" for name in names if _has(self.model.get_submodule(self.prefix), name)]

    def _name(self, module: str, kind: UnitKind) -> str:
        return f"{self.prefix}{'.' if module else ''}{module}:{kind}"

    def _whole(
        self, kind: UnitKind, within: str, name: str, inner: Sequence[Site], *, module: str, gating: Gating, keep: bool
    ) -> Site:
        """A block or the layer as the only unit of a site."""
        parts = self._linears_of_mlp() if gating == "output" and kind == "mlp-blocks" else ()
        weights = sum(count_base_params(self.model.get_submodule(part)) for part in parts or (module,))
        inside = parts or tuple(name for name in self.lora_target_modules() if name.startswith(f"{module}."))
        own = weights - sum(site.params for site in inner)
        return Site(
            name, self.layer, kind, 1, (), None, own, int(keep), gating, module, block_linears=inside, parent=within,
            params_with_children=weights,
        )  # fmt: skip

    # -- attention ---------------------------------------------------------------------------------------------------

    def _attention(self, around: str) -> list[Site]:
        module, inner = f"{self.prefix}.{self.architecture.attention_name}", []
        block = (
            self._name(self.architecture.attention_name, "attention-blocks") if "attention-blocks" in self.kinds else ""
        )
        if "attention" in self.architecture.blocks and self.kinds & {"attention", "query-heads"}:
            inner = self._groups_and_heads(self.architecture.blocks["attention"], block or around)
        if not block:
            return inner
        keep = self.first_of_type
        return [
            self._whole("attention-blocks", around, block, inner, module=module, gating="output", keep=keep), *inner
        ]  # fmt: skip

    def _groups_and_heads(self, block: BlockLinears, within: str) -> list[Site]:
        heads, consumer = self.architecture.heads, f"{self.prefix}.{block.consumer}"
        output = get_base_linear(self.model, consumer)
        queries = heads.queries_per_kv_head * heads.head_dim
        if heads.query_heads % heads.kv_heads or axis_size(output, COLUMNS) != heads.query_heads * heads.head_dim:
            raise UnknownArchitecture(
                f"{self.prefix}: {heads.query_heads} query heads of {heads.head_dim} do not divide over {heads.kv_heads} "
                f"key-value heads, or are not the {axis_size(output, COLUMNS)} columns of {block.consumer}"
            )
        apart = "query-heads" in self.kinds
        of_groups, of_heads = self._projections(block, apart=apart)
        sinks = (
            f"{self.prefix}.{self.architecture.family.attention_sinks}"
            if self.architecture.family.attention_sinks
            else ""
        )
        name, sites = consumer.rpartition(".")[0], []
        if "attention" in self.kinds:
            # The cache tells a sequence's length from the first layer of each type, so that layer has to attend; and an
            # output bias outlives its last group, which a layer without attention cannot express.
            keep = self.first_of_type or output.bias is not None or "attention-blocks" in self.kinds
            slices = (ParamSlice(sinks, 0, (heads.queries_per_kv_head,)),) if sinks and not apart else ()
            group = _Units(
                name, "attention", heads.kv_heads, of_groups, LinearSlice(consumer, (queries,)), slices, within
            )
            sites.append(self._site(group, min_units_per_group=int(keep), columns_owned_by_child=apart))
        if apart:
            slices = (ParamSlice(sinks, 0),) if sinks else ()
            head = _Units(
                f"{name}:query-heads", "query-heads", heads.query_heads, of_heads, LinearSlice(consumer, (heads.head_dim,)), slices,
                sites[0].name if sites else within,
            )  # fmt: skip
            sites.append(self._site(head, parent_groups=heads.kv_heads))
        return _with_children_params(sites)

    def _projections(self, block: BlockLinears, *, apart: bool) -> tuple[list[LinearSlice], list[LinearSlice]]:
        """Cuts by KV group, and by query head where these are units of their own."""
        heads = self.architecture.heads
        groups, one, queries = heads.kv_heads, heads.head_dim, heads.queries_per_kv_head * heads.head_dim
        of_groups, of_heads = [], []
        for name in block.producers:
            module = f"{self.prefix}.{name}"
            rows = axis_size(get_base_linear(self.model, module), ROWS)
            fused = rows == groups * (queries + 2 * one)  # query, key, value in this order: Phi-3
            if not apart:
                of_groups.append(LinearSlice(module, (queries, one, one) if fused else (rows // groups,)))
            elif fused:
                of_heads.append(LinearSlice(module, (one,), 0, rows))
                of_groups.append(LinearSlice(module, (one, one), groups * queries, rows))
            else:
                (of_heads if rows == groups * queries else of_groups).append(
                    LinearSlice(module, (one,) if rows == groups * queries else (rows // groups,))
                )
        return of_groups, of_heads

    # -- MLP and experts ---------------------------------------------------------------------------------------------

    def _has_experts(self) -> bool:
        mixture = self.architecture.family.mixture
        return mixture is not None and _has(self.model.get_submodule(self.prefix), mixture.experts)

    def _linears_of_mlp(self) -> tuple[str, ...]:
        """Of a plain MLP; a mixture goes as one module."""
        block = self.architecture.mlp
        if block is None or self._has_experts():
            return ()
        return tuple(f"{self.prefix}.{name}" for name in (*block.producers, block.consumer))

    def _mlp(self, around: str) -> list[Site]:
        mixture, block = self.architecture.family.mixture, self.architecture.mlp
        place = mixture.block if mixture and self._has_experts() else block.module if block else ""
        whole = self._name(place, "mlp-blocks") if "mlp-blocks" in self.kinds else ""
        if self._has_experts():
            inner = self._experts(whole or around)
        elif block and "mlp" in self.kinds & set(self.architecture.blocks):
            inner = [self._channels(block, whole or around)]
        else:
            inner = []
        if not whole:
            return inner
        module = f"{self.prefix}.{block.consumer if block and not self._has_experts() else place}"
        return [self._whole("mlp-blocks", around, whole, inner, module=module, gating="output", keep=False), *inner]

    def _channels(self, block: BlockLinears, within: str) -> Site:
        consumer = f"{self.prefix}.{block.consumer}"
        units = axis_size(get_base_linear(self.model, consumer), COLUMNS)
        # Gate above up in one linear: Phi-3, GLM.
        modules = [f"{self.prefix}.{name}" for name in block.producers]
        cuts = [
            LinearSlice(name, (1,) * (axis_size(get_base_linear(self.model, name), ROWS) // units)) for name in modules
        ]
        name = consumer.rpartition(".")[0]
        return self._site(_Units(name, "mlp", units, cuts, LinearSlice(consumer, (1,)), (), within))

    def _experts(self, within: str) -> list[Site]:
        mixture = self.architecture.family.mixture
        assert mixture is not None
        place, router = f"{self.prefix}.{mixture.experts}", f"{self.prefix}.{mixture.router}"
        there = dict(self.model.get_submodule(place).named_parameters())
        count, channels = there["down_proj"].shape[0], there["down_proj"].shape[1 if mixture.transposed else 2]
        pair = (2,) if mixture.interleaved else (1, 1)
        out, into = (2, 1) if mixture.transposed else (1, 2)  # axes of what an expert's linear gives and takes
        lines = {"gate_up_proj": (out, pair), "gate_up_proj_bias": (1, pair), "down_proj": (into, (1,))}
        apart = "expert-channels" in self.kinds
        sites = []
        if "experts" in self.kinds:
            rows = [f"{router}.{name}" for name, _ in self.model.get_submodule(router).named_parameters()]
            rows += [f"{place}.{name}" for name in there if not (apart and name in lines)]
            slices = tuple(ParamSlice(name, 0) for name in rows)
            name = self._name(mixture.block, "experts")
            unit = _Units(name, "experts", count, [], None, slices, within)
            sites.append(
                self._site(
                    unit, min_units_per_group=self.architecture.experts_per_token, gating="router", module=router
                )
            )
        if apart:
            slices = tuple(
                ParamSlice(f"{place}.{name}", axis, parts, count)
                for name, (axis, parts) in lines.items()
                if name in there
            )
            name = self._name(mixture.block, "expert-channels")
            unit = _Units(
                name, "expert-channels", count * channels, [], None, slices, sites[0].name if sites else within
            )
            sites.append(self._site(unit, parent_groups=count, gating="expert columns", module=place))
        return _with_children_params(sites)

    def _site(
        self, unit: _Units, *, min_units_per_group: int = 1, parent_groups: int = 1, columns_owned_by_child: bool = False,
        gating: Gating = "columns", module: str = "",
    ) -> Site:  # fmt: skip
        return Site(
            unit.name, self.layer, unit.kind, unit.count, tuple(unit.producers), unit.consumer,
            unit.params_per_unit(self.model, columns_owned_by_child=columns_owned_by_child), min_units_per_group, gating, module, columns_owned_by_child, unit.slices,
            parent_groups=parent_groups, parent=unit.parent,
        )  # fmt: skip


@dataclass(frozen=True)
class _Units:
    """Units of one kind in one layer, and the lines of weights that they own."""

    name: str
    kind: UnitKind
    count: int
    producers: Sequence[LinearSlice]
    consumer: LinearSlice | None
    slices: tuple[ParamSlice, ...]
    parent: str

    def params_per_unit(self, model: nn.Module, *, columns_owned_by_child: bool) -> int:
        """Weights and biases of one unit; refuses lines that are not of so many units."""
        params = 0
        if self.consumer and not columns_owned_by_child:
            params += get_base_linear(model, self.consumer.module).weight.numel() // self.count
        for cut in self.producers:
            makes = get_base_linear(model, cut.module)
            rows = axis_size(makes, ROWS)
            if rows != (cut.total_rows or self.count * cut.rows_per_unit):
                raise UnknownArchitecture(f"{cut.module}: {rows} rows are not of {self.count} units")
            params += cut.rows_per_unit * (axis_size(makes, COLUMNS) + (makes.bias is not None))
        return params + sum(model.get_parameter(part.parameter).numel() // self.count for part in self.slices)


def _with_children_params(sites: list[Site]) -> list[Site]:
    """Tell the outer of two sites what a unit of it takes along."""
    if len(sites) < 2:
        return sites
    outer, inner = sites
    return [replace(outer, params_with_children=outer.unit_params + inner.params // outer.units), inner]
