"""Short models with random weights, to time layers of one width: a few layers of one kind, cut to that width.

A short model has enough layers that its weights do not all fit into the device's cache, like those of the whole model.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch

from prunetune.config.recipe import WorkloadConfig
from prunetune.model.loading import DTYPES
from prunetune.plan import Plan
from prunetune.pruning.cut import cut, remove_layers_from_config
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import DEFAULT_UNITS, UnitKind

CPU_CACHE = 32 * 2**20  # bytes, of a usual processor
MIN_LAYERS, MAX_LAYERS = 4, 32  # that are cut to a width


def build_short_model(config: Any, layers: Sequence[int], workload: WorkloadConfig, device: torch.device) -> Any:
    """A causal language model of random weights, of these layers of a configuration in this order."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    remove_layers_from_config(config, layers)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[workload.dtype], trust_remote_code=False)
    return model.eval().requires_grad_(False)


def short_model_depth(layer_bytes: float, device: torch.device) -> int:
    """Number of layers that are cut, so that their weights take twice the device's cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE
    return min(MAX_LAYERS, max(MIN_LAYERS, math.ceil(2 * cache / max(1.0, layer_bytes))))


def narrow_layers(model: Any, kind: str, units: int, *, remove_empty_blocks: bool = False) -> Any:
    """A copy in which every layer but the first keeps so many KV groups (kind "attention") or channels ("mlp").

    With `remove_empty_blocks`, an MLP of no channels is removed as a block.
    """
    names = (*DEFAULT_UNITS, "mlp-blocks") if remove_empty_blocks else DEFAULT_UNITS
    sites = find_sites(model, names)
    kept = {}
    for site in sites:
        width = site.units
        if site.layer and site.kind == kind:
            width = units
        elif site.layer and site.kind is UnitKind.MLP_BLOCK and kind == "mlp" and not units:
            width = 0
        kept[site.name] = tuple(range(width))
    return cut(copy.deepcopy(model), Plan(kept, {site.name: site.units for site in sites}), sites=sites)
