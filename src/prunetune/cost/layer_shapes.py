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

from prunetune.pruning.families import Coupling, coupling_of
from prunetune.pruning.linears import COLUMNS, ROWS, size
from prunetune.pruning.units import Site

Counts = Mapping[str, int]


@dataclass(frozen=True)
class Owned:
    """Lines of a linear that leave with a site's units."""

    site: str
    units: int
    lines: int  # of one unit

    def gone(self, counts: Counts) -> int:
        """Lines that have left."""
        return (self.units - counts[self.site]) * self.lines


@dataclass(frozen=True)
class Linear:
    """One linear of a layer."""

    rows: int
    columns: int
    of_rows: tuple[Owned, ...]
    of_columns: tuple[Owned, ...]
    around: tuple[str, ...]  # sites whose only unit takes it along

    @property
    def is_cut(self) -> bool:
        """Whether some site takes lines of it, or all of it."""
        return bool(self.of_rows or self.of_columns or self.around)

    def shape(self, counts: Counts) -> tuple[int, int]:
        """(rows, columns) that are left."""
        if not all(counts[site] for site in self.around):
            return 0, 0
        rows = self.rows - sum(owned.gone(counts) for owned in self.of_rows)
        return rows, self.columns - sum(owned.gone(counts) for owned in self.of_columns)


@dataclass(frozen=True)
class Layer:
    """One layer of the decoder."""

    sites: tuple[Site, ...]
    linears: tuple[Linear, ...]
    groups: int  # KV heads of the dense layer
    queries: int  # query heads of a KV group of the dense layer
    head: int  # rows of a head
    window: int  # tokens that attention sees at most; 0: all
    rest: int  # parameters that no unit owns and that leave with the last KV group
    around: tuple[str, ...]  # sites whose only unit takes attention along

    def params(self, counts: Counts) -> int:
        """Of the units that are left; below zero by `rest` where attention has gone, which is held elsewhere."""
        kept = sum(counts[site.name] * site.unit_params for site in self.sites)
        return kept - (self.rest if self._lost(counts) else 0)

    def heads(self, counts: Counts) -> tuple[int, int]:
        """(KV heads, query heads) that are left."""
        if not all(counts[site] for site in self.around):
            return 0, 0
        own = {site.kind: counts[site.name] for site in self.sites}
        groups = own.get("attention", self.groups)
        return groups, own.get("query-heads", groups * self.queries)

    def _lost(self, counts: Counts) -> bool:
        return all(counts[site] for site in self.around) and not self.heads(counts)[0]


@dataclass(frozen=True)
class Anatomy:
    """A dense model: its layers by index, and what is outside their units."""

    layers: Mapping[int, Layer]
    outside: int  # parameters that no unit owns
    table: int  # of the input embedding
    head: int  # weights of the output matrix, tied or not
    tied: bool
    outputs: int  # rows of the output matrix
    is_mixture: bool

    def dense(self) -> dict[str, int]:
        """The counts that keep everything."""
        return {site.name: site.units for layer in self.layers.values() for site in layer.sites}

    def params(self, counts: Counts) -> int:
        """Of the whole model."""
        return self.outside + sum(layer.params(counts) for layer in self.layers.values())


def anatomy_of(model: Any, sites: Sequence[Site]) -> Anatomy:
    """Read it off a causal language model of `transformers`; works on the meta device."""
    coupling, windows = coupling_of(model), windows_of(model)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    everything = sum(parameter.numel() for parameter in model.parameters())
    return Anatomy(
        {
            index: _layer(model, coupling, index, [site for site in sites if site.layer == index], windows[index])
            for index in range(len(coupling.layer_prefixes))
        },
        outside=everything - sum(site.params for site in sites),
        table=table.numel(),
        head=head.numel(),
        tied=head is table,
        outputs=head.shape[0],
        is_mixture=any(".experts." in name for name, _ in model.named_parameters()),
    )


def windows_of(model: Any) -> list[int]:
    """Tokens that the cache of each layer holds at most, as `transformers` makes one; 0: all."""
    cache = DynamicCache(config=model.config)
    count = model.config.num_hidden_layers
    windows = [int(getattr(layer, "sliding_window", 0) or 0) for layer in cache.layers]
    return windows if len(windows) == count else [0] * count


def _layer(model: nn.Module, coupling: Coupling, index: int, sites: Sequence[Site], window: int) -> Layer:
    prefix = coupling.layer_prefixes[index]
    return Layer(
        tuple(sites),
        tuple(_linears(model, prefix, sites)),
        coupling.heads.groups,
        coupling.heads.ratio,
        coupling.heads.size,
        window,
        _rest(model, sites),
        tuple(site.name for site in sites if site.kind in ("layers", "attention-blocks")),
    )


def _linears(model: nn.Module, prefix: str, sites: Sequence[Site]) -> Iterator[Linear]:
    for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
        if isinstance(module, nn.Linear | Conv1D):
            rows, columns = (
                tuple(
                    Owned(site.name, site.units, cut.per_unit)
                    for site in sites
                    for cut, of in site.cuts()
                    if cut.module == name and of == axis
                )
                for axis in (ROWS, COLUMNS)
            )
            around = tuple(site.name for site in sites if site.is_whole and _holds(site, name))
            yield Linear(size(module, ROWS), size(module, COLUMNS), rows, columns, around)


def _holds(site: Site, name: str) -> bool:
    if site.kind == "layers" or name in site.inside:
        return True
    return not site.inside and name.startswith(f"{site.name.partition(':')[0]}.")


def _rest(model: nn.Module, sites: Sequence[Site]) -> int:
    """Norms of queries and keys, say: what stands in attention's module beside the units' own."""
    site = next((site for site in sites if site.kind == "attention"), None)
    if site is None:
        return 0
    everything = sum(parameter.numel() for parameter in model.get_submodule(site.name).parameters())
    return everything - sum(one.params for one in sites if one.kind in ("attention", "query-heads"))
