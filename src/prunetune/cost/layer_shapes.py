"""The shape of a model after pruning: for every layer its linears' sizes, its heads and its parameters.

All of it is read from the model's modules, which may be on the meta device. `UnitCounts` are units kept by site name,
as `Plan.widths()` returns them; sites inside a removed unit keep zero.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from prunetune.pruning.families import architecture_info
from prunetune.pruning.linears import COLUMNS, ROWS, axis_size
from prunetune.pruning.units import Site, UnitKind, hidden_site

UnitCounts = Mapping[str, int]


@dataclass(frozen=True)
class OwnedLines:
    """Rows or columns of a linear that leave with a site's units."""

    site: str
    units: int
    lines_per_unit: int

    def removed(self, counts: UnitCounts) -> int:
        return (self.units - counts[self.site]) * self.lines_per_unit


@dataclass(frozen=True)
class LinearShape:
    """One linear of a layer."""

    rows: int
    columns: int
    row_owners: tuple[OwnedLines, ...]
    column_owners: tuple[OwnedLines, ...]
    enclosing_sites: tuple[str, ...]  # sites of whole blocks that contain it

    @property
    def is_cut(self) -> bool:
        """Whether some site removes rows or columns of it, or all of it."""
        return bool(self.row_owners or self.column_owners or self.enclosing_sites)

    def shape(self, counts: UnitCounts) -> tuple[int, int]:
        """(rows, columns) that are kept."""
        if not all(counts[site] for site in self.enclosing_sites):
            return 0, 0
        rows = self.rows - sum(owner.removed(counts) for owner in self.row_owners)
        return rows, self.columns - sum(owner.removed(counts) for owner in self.column_owners)


@dataclass(frozen=True)
class LayerShape:
    """One layer of the decoder; head counts are those of the dense layer."""

    sites: tuple[Site, ...]
    linears: tuple[LinearShape, ...]
    kv_heads: int
    queries_per_kv_head: int
    head_dim: int
    sliding_window: int  # tokens that attention sees at most; 0: all
    other_attention_params: int  # parameters that no unit owns and that leave with the last KV group
    enclosing_sites: tuple[str, ...]  # sites of whole blocks that contain attention
    hidden: Site | None = None  # of the model, if hidden channels are units

    def params(self, counts: UnitCounts) -> int:
        """Parameters of kept units.

        Where the last KV group is removed, less `other_attention_params`, which `ModelShape.unprunable_params` counts.
        """
        has_attention_block = all(counts[site] for site in self.enclosing_sites)
        lost_last_group = has_attention_block and not self.heads(counts)[0]
        removed = self.hidden.units - counts[self.hidden.name] if self.hidden else 0
        kept = sum(counts[site.name] * (site.unit_params - removed * site.hidden_params) for site in self.sites)
        return kept - (self.other_attention_params if lost_last_group else 0)

    def heads(self, counts: UnitCounts) -> tuple[int, int]:
        """(KV heads, query heads) that are kept."""
        if not all(counts[site] for site in self.enclosing_sites):
            return 0, 0
        by_kind = {site.kind: counts[site.name] for site in self.sites}
        kv_heads = by_kind.get(UnitKind.KV_GROUP, self.kv_heads)
        return kv_heads, by_kind.get(UnitKind.QUERY_HEAD, kv_heads * self.queries_per_kv_head)


@dataclass(frozen=True)
class ModelShape:
    """A dense model: its layers by index, and its parameters that no unit owns."""

    layers: Mapping[int, LayerShape]
    unprunable_params: int  # parameters that no unit owns
    embedding_params: int  # of the input embedding
    lm_head_params: int  # weights of the output matrix, tied or not
    tied: bool
    lm_head_rows: int
    is_mixture: bool
    hidden: Site | None = None  # if hidden channels are units

    def dense_counts(self) -> dict[str, int]:
        """The counts that keep every unit."""
        sites = [site for layer in self.layers.values() for site in layer.sites]
        return {site.name: site.units for site in [*sites, *([self.hidden] if self.hidden else [])]}

    def params(self, counts: UnitCounts) -> int:
        return self.fixed_params(counts) + sum(layer.params(counts) for layer in self.layers.values())

    def fixed_params(self, counts: UnitCounts) -> int:
        """Parameters that no unit of a layer owns: those of no unit, and those of kept hidden channels alone."""
        channels = (self.hidden.unit_params + self.hidden.outer_params) * counts[self.hidden.name] if self.hidden else 0
        return self.unprunable_params + channels

    def channel_share(self, counts: UnitCounts) -> float:
        """The share of the hidden channels that is kept."""
        return counts[self.hidden.name] / self.hidden.units if self.hidden else 1.0


def model_shape(model: Any, sites: Sequence[Site]) -> ModelShape:
    """Read the shape of a causal language model of `transformers`, which may be on the meta device."""
    architecture = architecture_info(model)
    # Tokens that the cache of each layer holds at most, as `transformers` makes it; 0: all.
    cache, count = DynamicCache(config=model.config), model.config.get_text_config().num_hidden_layers
    windows = [int(getattr(layer, "sliding_window", 0) or 0) for layer in cache.layers]
    windows = windows if len(windows) == count else [0] * count
    embedding, lm_head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    layers, hidden = {}, hidden_site(sites)
    for index, prefix in enumerate(architecture.layer_prefixes):
        layer_sites = [site for site in sites if site.layer == index]
        groups = next((site for site in layer_sites if site.kind is UnitKind.KV_GROUP), None)
        attention = model.get_submodule(groups.name).parameters() if groups else ()
        owned = sum(site.params for site in layer_sites if site.kind.is_head) if groups else 0
        other_params = sum(parameter.numel() for parameter in attention) - owned  # such as norms of queries and keys
        layers[index] = LayerShape(
            sites=tuple(layer_sites),
            linears=tuple(_linear_shapes(model, prefix, [*layer_sites, *([hidden] if hidden else [])])),
            kv_heads=architecture.layer_heads[index].kv_heads,
            queries_per_kv_head=architecture.layer_heads[index].queries_per_kv_head,
            head_dim=architecture.layer_heads[index].head_dim,
            sliding_window=windows[index],
            other_attention_params=other_params,
            enclosing_sites=tuple(site.name for site in layer_sites if site.kind.removes_attention),
            hidden=hidden,
        )
    all_params = sum(parameter.numel() for parameter in model.parameters())
    return ModelShape(
        layers,
        unprunable_params=all_params - sum(site.params + site.units * site.outer_params for site in sites),
        embedding_params=embedding.numel(),
        lm_head_params=lm_head.numel(),
        tied=lm_head is embedding,
        lm_head_rows=lm_head.shape[0],
        is_mixture=any(".experts." in name for name, _ in model.named_parameters()),
        hidden=hidden,
    )


def _linear_shapes(model: nn.Module, prefix: str, sites: Sequence[Site]) -> Iterator[LinearShape]:
    for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
        if isinstance(module, nn.Linear | Conv1D):
            row_owners, column_owners = (
                tuple(
                    OwnedLines(site.name, site.units, linear_slice.rows_per_unit)
                    for site in sites
                    for linear_slice, slice_axis in site.linear_slices()
                    if linear_slice.module == name and slice_axis == axis
                )
                for axis in (ROWS, COLUMNS)
            )
            enclosing = []
            for site in sites:
                linears = site.weights.block_linears
                is_inside = name in linears if linears else name.startswith(f"{site.name.partition(':')[0]}.")
                if site.kind is UnitKind.LAYER or (site.kind.is_whole_block and is_inside):
                    enclosing.append(site.name)
            rows, columns = axis_size(module, ROWS), axis_size(module, COLUMNS)
            yield LinearShape(rows, columns, row_owners, column_owners, tuple(enclosing))
