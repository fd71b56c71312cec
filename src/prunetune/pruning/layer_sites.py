"""The sites of one layer: which lines of which weights its units own, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from prunetune.errors import UnknownArchitecture
from prunetune.pruning.families import Block, Coupling
from prunetune.pruning.linears import COLUMNS, ROWS, linear_of, size
from prunetune.pruning.units import Cut, Gating, Kind, Site, Slice


def _has(layer: nn.Module, name: str) -> bool:
    try:
        layer.get_submodule(name)
    except AttributeError:
        return False
    return True


def params_of(module: nn.Module) -> int:
    """Without adapters."""
    return sum(weight.numel() for name, weight in module.named_parameters() if "lora_" not in name)


@dataclass(frozen=True)
class Layer:
    """One layer, and the kinds of unit that it may lose."""

    model: nn.Module
    coupling: Coupling
    prefix: str
    layer: int
    wanted: frozenset[Kind]
    first_of_type: bool

    def sites(self) -> list[Site]:
        """Outer ones first."""
        around = self._name("", "layers") if "layers" in self.wanted else ""
        inner = [*self._attention(around), *self._mlp(around)]
        if not around:
            return inner
        whole = self._whole("layers", "", around, inner, module=self.prefix, gating="layer", keep=self.first_of_type)
        return [whole, *inner]

    def tuned_linears(self) -> list[str]:
        """The linears that adapters go on."""
        blocks = self.coupling.blocks.values()
        names = (name for block in blocks for name in (*block.producers, block.consumer))
        return [f"{self.prefix}.{name}" for name in names if _has(self.model.get_submodule(self.prefix), name)]

    def _name(self, module: str, kind: Kind) -> str:
        return f"{self.prefix}{'.' if module else ''}{module}:{kind}"

    def _whole(
        self, kind: Kind, within: str, name: str, inner: Sequence[Site], *, module: str, gating: Gating, keep: bool
    ) -> Site:
        """A block or the layer as the only unit of a site."""
        parts = self._linears_of_mlp() if gating == "output" and kind == "mlp-blocks" else ()
        weights = sum(params_of(self.model.get_submodule(part)) for part in parts or (module,))
        inside = parts or tuple(name for name in self.tuned_linears() if name.startswith(f"{module}."))
        own = weights - sum(site.params for site in inner)
        return Site(
            name, self.layer, kind, 1, (), None, own, int(keep), gating, module, inside=inside, within=within,
            span=weights,
        )  # fmt: skip

    # -- attention ---------------------------------------------------------------------------------------------------

    def _attention(self, around: str) -> list[Site]:
        module, inner = f"{self.prefix}.{self.coupling.attention}", []
        block = self._name(self.coupling.attention, "attention-blocks") if "attention-blocks" in self.wanted else ""
        if "attention" in self.coupling.blocks and self.wanted & {"attention", "query-heads"}:
            inner = self._groups_and_heads(self.coupling.blocks["attention"], block or around)
        if not block:
            return inner
        keep = self.first_of_type
        return [
            self._whole("attention-blocks", around, block, inner, module=module, gating="output", keep=keep), *inner
        ]  # fmt: skip

    def _groups_and_heads(self, block: Block, within: str) -> list[Site]:
        heads, consumer = self.coupling.heads, f"{self.prefix}.{block.consumer}"
        output = linear_of(self.model, consumer)
        queries = heads.ratio * heads.size
        if heads.queries % heads.groups or size(output, COLUMNS) != heads.queries * heads.size:
            raise UnknownArchitecture(
                f"{self.prefix}: {heads.queries} query heads of {heads.size} do not divide over {heads.groups} "
                f"key-value heads, or are not the {size(output, COLUMNS)} columns of {block.consumer}"
            )
        apart = "query-heads" in self.wanted
        of_groups, of_heads = self._projections(block, apart=apart)
        sinks = f"{self.prefix}.{self.coupling.family.sinks}" if self.coupling.family.sinks else ""
        name, sites = consumer.rpartition(".")[0], []
        if "attention" in self.wanted:
            # The cache tells a sequence's length from the first layer of each type, so that layer has to attend; and an
            # output bias outlives its last group, which a layer without attention cannot express.
            keep = self.first_of_type or output.bias is not None or "attention-blocks" in self.wanted
            slices = (Slice(sinks, 0, (heads.ratio,)),) if sinks and not apart else ()
            group = _Units(name, "attention", heads.groups, of_groups, Cut(consumer, (queries,)), slices, within)
            sites.append(self._site(group, floor=int(keep), lends_columns=apart))
        if apart:
            slices = (Slice(sinks, 0),) if sinks else ()
            head = _Units(
                f"{name}:query-heads", "query-heads", heads.queries, of_heads, Cut(consumer, (heads.size,)), slices,
                sites[0].name if sites else within,
            )  # fmt: skip
            sites.append(self._site(head, lanes=heads.groups))
        return _with_spans(sites)

    def _projections(self, block: Block, *, apart: bool) -> tuple[list[Cut], list[Cut]]:
        """Cuts by KV group, and by query head where these are units of their own."""
        heads = self.coupling.heads
        groups, one, queries = heads.groups, heads.size, heads.ratio * heads.size
        of_groups, of_heads = [], []
        for name in block.producers:
            module = f"{self.prefix}.{name}"
            rows = size(linear_of(self.model, module), ROWS)
            fused = rows == groups * (queries + 2 * one)  # query, key, value in this order: Phi-3
            if not apart:
                of_groups.append(Cut(module, (queries, one, one) if fused else (rows // groups,)))
            elif fused:
                of_heads.append(Cut(module, (one,), 0, rows))
                of_groups.append(Cut(module, (one, one), groups * queries, rows))
            else:
                (of_heads if rows == groups * queries else of_groups).append(
                    Cut(module, (one,) if rows == groups * queries else (rows // groups,))
                )
        return of_groups, of_heads

    # -- MLP and experts ---------------------------------------------------------------------------------------------

    def _has_experts(self) -> bool:
        mixture = self.coupling.family.mixture
        return mixture is not None and _has(self.model.get_submodule(self.prefix), mixture.experts)

    def _linears_of_mlp(self) -> tuple[str, ...]:
        """Of a plain MLP; a mixture goes as one module."""
        block = self.coupling.mlp
        if block is None or self._has_experts():
            return ()
        return tuple(f"{self.prefix}.{name}" for name in (*block.producers, block.consumer))

    def _mlp(self, around: str) -> list[Site]:
        mixture, block = self.coupling.family.mixture, self.coupling.mlp
        place = mixture.block if mixture and self._has_experts() else block.module if block else ""
        whole = self._name(place, "mlp-blocks") if "mlp-blocks" in self.wanted else ""
        if self._has_experts():
            inner = self._experts(whole or around)
        elif block and "mlp" in self.wanted & set(self.coupling.blocks):
            inner = [self._channels(block, whole or around)]
        else:
            inner = []
        if not whole:
            return inner
        module = f"{self.prefix}.{block.consumer if block and not self._has_experts() else place}"
        return [self._whole("mlp-blocks", around, whole, inner, module=module, gating="output", keep=False), *inner]

    def _channels(self, block: Block, within: str) -> Site:
        consumer = f"{self.prefix}.{block.consumer}"
        units = size(linear_of(self.model, consumer), COLUMNS)
        # Gate above up in one linear: Phi-3, GLM.
        modules = [f"{self.prefix}.{name}" for name in block.producers]
        cuts = [Cut(name, (1,) * (size(linear_of(self.model, name), ROWS) // units)) for name in modules]
        name = consumer.rpartition(".")[0]
        return self._site(_Units(name, "mlp", units, cuts, Cut(consumer, (1,)), (), within))

    def _experts(self, within: str) -> list[Site]:
        mixture = self.coupling.family.mixture
        assert mixture is not None
        place, router = f"{self.prefix}.{mixture.experts}", f"{self.prefix}.{mixture.router}"
        there = dict(self.model.get_submodule(place).named_parameters())
        count, channels = there["down_proj"].shape[0], there["down_proj"].shape[1 if mixture.transposed else 2]
        pair = (2,) if mixture.interleaved else (1, 1)
        out, into = (2, 1) if mixture.transposed else (1, 2)  # axes of what an expert's linear gives and takes
        lines = {"gate_up_proj": (out, pair), "gate_up_proj_bias": (1, pair), "down_proj": (into, (1,))}
        apart = "expert-channels" in self.wanted
        sites = []
        if "experts" in self.wanted:
            rows = [f"{router}.{name}" for name, _ in self.model.get_submodule(router).named_parameters()]
            rows += [f"{place}.{name}" for name in there if not (apart and name in lines)]
            slices = tuple(Slice(name, 0) for name in rows)
            name = self._name(mixture.block, "experts")
            unit = _Units(name, "experts", count, [], None, slices, within)
            sites.append(self._site(unit, floor=self.coupling.picked, gating="router", module=router))
        if apart:
            slices = tuple(
                Slice(f"{place}.{name}", axis, parts, count) for name, (axis, parts) in lines.items() if name in there
            )
            name = self._name(mixture.block, "expert-channels")
            unit = _Units(
                name, "expert-channels", count * channels, [], None, slices, sites[0].name if sites else within
            )
            sites.append(self._site(unit, lanes=count, gating="expert columns", module=place))
        return _with_spans(sites)

    def _site(
        self, unit: _Units, *, floor: int = 1, lanes: int = 1, lends_columns: bool = False,
        gating: Gating = "columns", module: str = "",
    ) -> Site:  # fmt: skip
        return Site(
            unit.name, self.layer, unit.kind, unit.count, tuple(unit.producers), unit.consumer,
            unit.price(self.model, lends_columns=lends_columns), floor, gating, module, lends_columns, unit.slices,
            lanes=lanes, within=unit.within,
        )  # fmt: skip


@dataclass(frozen=True)
class _Units:
    """Units of one kind in one layer, and the lines of weights that they own."""

    name: str
    kind: Kind
    count: int
    producers: Sequence[Cut]
    consumer: Cut | None
    slices: tuple[Slice, ...]
    within: str

    def price(self, model: nn.Module, *, lends_columns: bool) -> int:
        """Weights and biases of one unit; refuses lines that are not of so many units."""
        params = 0
        if self.consumer and not lends_columns:
            params += linear_of(model, self.consumer.module).weight.numel() // self.count
        for cut in self.producers:
            makes = linear_of(model, cut.module)
            rows = size(makes, ROWS)
            if rows != (cut.rows or self.count * cut.per_unit):
                raise UnknownArchitecture(f"{cut.module}: {rows} rows are not of {self.count} units")
            params += cut.per_unit * (size(makes, COLUMNS) + (makes.bias is not None))
        return params + sum(model.get_parameter(part.parameter).numel() // self.count for part in self.slices)


def _with_spans(sites: list[Site]) -> list[Site]:
    """Tell the outer of two sites what a unit of it takes along."""
    if len(sites) < 2:
        return sites
    outer, inner = sites
    return [replace(outer, span=outer.unit_params + inner.params // outer.units), inner]
