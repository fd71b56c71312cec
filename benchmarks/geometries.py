"""Random models in the shapes of known ones, made where they are to be, layer by layer: no download, no dense copy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from prunetune.pruning.nf4 import NF4Linear, cut_axes
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import Site

GEOMETRIES: Mapping[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "smollm2-1.7b": {
        "vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "llama-3-70b": {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
}  # fmt: skip


def config_of(geometry: str, *, layers: int = 0) -> LlamaConfig:
    """The configuration, with fewer layers where asked for."""
    values = GEOMETRIES[geometry] | ({"num_hidden_layers": layers} if layers else {})
    return LlamaConfig(max_position_embeddings=8192, **values)


def made(
    geometry: str, device: torch.device, dtype: torch.dtype, *, layers: int = 0, quantize: str = "off"
) -> tuple[Any, tuple[Site, ...]]:
    """A frozen random model on `device` and its sites; in 4 bits it never stands there in full, one linear apart."""
    torch.manual_seed(0)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config_of(geometry, layers=layers), dtype=dtype)
    sites = find_sites(model)
    lines = cut_axes(model, sites) if quantize == "nf4" else {}
    modules = dict(model.named_modules())
    for name, axis in lines.items():
        parent, _, child = name.rpartition(".")
        linear = _filled(modules[name], device, dtype)
        held = NF4Linear.from_linear(linear, cut_axis=axis, dtype=dtype, device=device)
        setattr(modules[parent], child, held)
        linear.to_empty(device="meta")
    for module in model.modules():
        if not isinstance(module, NF4Linear):
            _filled(module, device, dtype)
    model.tie_weights()
    return model.to(device).eval().requires_grad_(False), sites


def _filled(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """Random weights in place of empty ones: of this module, not of those inside it."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            weight = torch.empty(parameter.shape, device=device, dtype=dtype)
            if weight.dim() > 1:
                weight.normal_(std=1 / math.sqrt(weight.shape[1]))
            else:
                weight.fill_(1)  # norms
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
    return module
