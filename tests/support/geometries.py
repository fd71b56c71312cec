"""Geometries for tests of search: sites of tiny models, and of sizes without a model."""

from __future__ import annotations

from functools import cache

from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import LinearSlice, Site, SiteWeights, UnitKind
from support.models import tiny


def build_sites(layers: int, groups: int, group_params: int, channels: int, channel_params: int) -> tuple[Site, ...]:
    """Sites without a model, since it would be too large for a test; the first layer keeps a group at least."""
    sites = []
    for layer in range(layers):
        name = f"model.layers.{layer}"
        rows = LinearSlice(name, (1,))
        weights = SiteWeights(producers=(rows,), consumer=rows)
        heads = Site(
            name=f"{name}.self_attn", layer=layer, kind=UnitKind.KV_GROUP, units=groups, unit_params=group_params,
            min_units_per_group=int(layer == 0), weights=weights,
        )  # fmt: skip
        mlp = Site(
            name=f"{name}.mlp", layer=layer, kind=UnitKind.MLP_CHANNEL, units=channels, unit_params=channel_params,
            weights=weights,
        )  # fmt: skip
        sites += [heads, mlp]
    return tuple(sites)


@cache
def geometry(name: str) -> tuple[tuple[Site, ...], int, tuple[int, ...]]:
    """Sites, alignment, and the group counts that a uniform model may have."""
    if name == "llama":
        return find_sites(tiny("llama")), 8, (1, 2)
    if name == "qwen2, biases":
        return find_sites(tiny("qwen2", groups=4, ratio=1, layers=2)), 32, (1, 2, 4)
    if name == "gemma3, two layer types":
        return find_sites(tiny("gemma3_text", groups=3, ratio=1, layers=4)), 16, (1, 3)
    if name == "smollm":
        return build_sites(6, 3, 442368, 1536, 1728), 32, (1, 2, 3)
    return build_sites(3, 8, 5242880, 1000, 12288), 128, tuple(range(1, 9))  # 1000 is no multiple of 128


GEOMETRIES = ("llama", "qwen2, biases", "gemma3, two layer types", "smollm", "odd width")
