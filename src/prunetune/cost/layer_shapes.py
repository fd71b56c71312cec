"""What every layer of a model is made of once some units have gone: linears with their sizes, KV heads, parameters.

All of it is read off the model's structure, which may be on the meta device. `counts` are units kept by site name, as
`Plan.widths()` gives them; what is in a closed unit counts zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from prunetune.pruning.families import ArchitectureInfo, architecture_info
from prunetune.pruning.linears import COLUMNS, ROWS, axis_size
from prunetune.pruning.units import Site

UnitCounts = Mapping[str, int]


@dataclass(frozen=True)
class OwnedLines:
    """Lines of a linear that leave with a site's units."""

    site: str
    units: int
    lines_per_unit: int  # of one unit

    def removed(self, counts: UnitCounts) -> int:
        """Lines that have left."""
        return (self.units - counts[self.site]) * self.lines_per_unit


@dataclass(frozen=True)
class LinearShape:
    """One linear of a layer."""

    rows: int
    columns: int
    row_owners: tuple[OwnedLines, ...]
    column_owners: tuple[OwnedLines, ...]
    enclosing_sites: tuple[str, ...]  # sites whose only unit takes it along

    @property
    def is_cut(self) -> bool:
        """Whether some site takes lines of it, or all of it."""
        return bool(self.row_owners or self.column_owners or self.enclosing_sites)

    def shape(self, counts: UnitCounts) -> tuple[int, int]:
        """(rows, columns) that are left."""
        if not all(counts[site] for site in self.enclosing_sites):
            return 0, 0
        rows = self.rows - sum(owned.removed(counts) for owned in self.row_owners)
        return rows, self.columns - sum(owned.removed(counts) for owned in self.column_owners)


@dataclass(frozen=True)
class LayerShape:
    """One layer of the decoder."""

    sites: tuple[Site, ...]
    linears: tuple[LinearShape, ...]
    kv_heads: int  # KV heads of the dense layer
    queries_per_kv_head: int  # query heads of a KV group of the dense layer
    head_dim: int  # rows of a head
    sliding_window: int  # tokens that attention sees at most; 0: all
    other_attention_params: int  # parameters that no unit owns and that leave with the last KV group
    enclosing_sites: tuple[str, ...]  # sites whose only unit takes attention along

    def params(self, counts: UnitCounts) -> int:
        """Of the units that are left; below zero by `rest` where attention has gone, which is held elsewhere."""
        kept = sum(counts[site.name] * site.unit_params for site in self.sites)
        return kept - (self.other_attention_params if self._lost(counts) else 0)

    def heads(self, counts: UnitCounts) -> tuple[int, int]:
        """(KV heads, query heads) that are left."""
        if not all(counts[site] for site in self.enclosing_sites):
            return 0, 0
        own = {site.kind: counts[site.name] for site in self.sites}
        groups = own.get("attention", self.kv_heads)
        return groups, own.get("query-heads", groups * self.queries_per_kv_head)

    def _lost(self, counts: UnitCounts) -> bool:
        return all(counts[site] for site in self.enclosing_sites) and not self.heads(counts)[0]


@dataclass(frozen=True)
class ModelShape:
    """A dense model: its layers by index, and what is outside their units."""

    layers: Mapping[int, LayerShape]
    unprunable_params: int  # parameters that no unit owns
    embedding_params: int  # of the input embedding
    lm_head_params: int  # weights of the output matrix, tied or not
    tied: bool
    lm_head_rows: int  # rows of the output matrix
    is_mixture: bool

    def dense_counts(self) -> dict[str, int]:
        """The counts that keep everything."""
        return {site.name: site.units for layer in self.layers.values() for site in layer.sites}

    def params(self, counts: UnitCounts) -> int:
        """Of the whole model."""
        return self.unprunable_params + sum(layer.params(counts) for layer in self.layers.values())


def model_shape(model: Any, sites: Sequence[Site]) -> ModelShape:
    """Read it off a causal language model of `transformers`; works on the meta device."""
    coupling, windows = architecture_info(model), sliding_windows(model)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    everything = sum(parameter.numel() for parameter in model.parameters())
    return ModelShape(
        {
            index: _layer(model, coupling, index, [site for site in sites if site.layer == index], windows[index])
            for index in range(len(coupling.layer_prefixes))
        },
        unprunable_params=everything - sum(site.params for site in sites),
        embedding_params=table.numel(),
        lm_head_params=head.numel(),
        tied=head is table,
        lm_head_rows=head.shape[0],
        is_mixture=any(".experts." in name for name, _ in model.named_parameters()),
    )


def sliding_windows(model: Any) -> list[int]:
    """Tokens that the cache of each layer holds at most, as `transformers` makes one; 0: all."""
    cache = DynamicCache(config=model.config)
    count = model.config.num_hidden_layers
    windows = [int(getattr(layer, "sliding_window", 0) or 0) for layer in cache.layers]
    return windows if len(windows) == count else [0] * count


def _layer(model: nn.Module, coupling: ArchitectureInfo, index: int, sites: Sequence[Site], window: int) -> LayerShape:
    prefix = coupling.layer_prefixes[index]
    return LayerShape(
        tuple(sites),
        tuple(_linears(model, prefix, sites)),
        coupling.heads.kv_heads,
        coupling.heads.queries_per_kv_head,
        coupling.heads.head_dim,
        window,
        _rest(model, sites),
        tuple(site.name for site in sites if site.kind in ("layers", "attention-blocks")),
    )


def _linears(model: nn.Module, prefix: str, sites: Sequence[Site]) -> Iterator[LinearShape]:
    for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
        if isinstance(module, nn.Linear | Conv1D):
            rows, columns = (
                tuple(
                    OwnedLines(site.name, site.units, cut.rows_per_unit)
                    for site in sites
                    for cut, of in site.linear_slices()
                    if cut.module == name and of == axis
                )
                for axis in (ROWS, COLUMNS)
            )
            around = tuple(site.name for site in sites if site.is_whole_block and _holds(site, name))
            yield LinearShape(axis_size(module, ROWS), axis_size(module, COLUMNS), rows, columns, around)


def _holds(site: Site, name: str) -> bool:
    if site.kind == "layers" or name in site.block_linears:
        return True
    return not site.block_linears and name.startswith(f"{site.name.partition(':')[0]}.")


def _rest(model: nn.Module, sites: Sequence[Site]) -> int:
    """Norms of queries and keys, say: what stands in attention's module beside the units' own."""
    site = next((site for site in sites if site.kind == "attention"), None)
    if site is None:
        return 0
    everything = sum(parameter.numel() for parameter in model.get_submodule(site.name).parameters())
    return everything - sum(one.params for one in sites if one.kind in ("attention", "query-heads"))
