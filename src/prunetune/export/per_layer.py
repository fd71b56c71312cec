"""Layers of different width: transformers' `per_layer_config` schema, and the little code that builds such a model.

No mainstream class builds layers from `per_layer_config` yet (transformers 5.23 ships the configuration half), so the
folder carries two small modules that subclass the original architecture and resize its linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from prunetune.errors import ModelError
from prunetune.model.sites import Site
from prunetune.plan import Plan

CONFIGURATION = Template('''\
"""Configuration of a model whose layers differ in width. Written by prunetune; needs transformers >= 5.14."""

from transformers import $config


class $pruned_config($config):
    model_type = "$model_type"

    def validate_architecture(self):
        """Widths are checked layer by layer when the model is built."""
''')

MODELING = Template('''\
"""A $causal whose layers differ in width. Written by prunetune; needs transformers >= 5.14."""

import copy

import torch
from torch import nn
from transformers import $causal, $inner

from .configuration_pruned import $pruned_config


class NoAttention(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states), None


def dense(config):
    plain = copy.copy(config)
    plain.per_layer_config = None
    return plain


def resized(linear, rows=None, columns=None):
    return nn.Linear(columns or linear.in_features, rows or linear.out_features, bias=linear.bias is not None,
                     device=linear.weight.device, dtype=linear.weight.dtype)


def resize(inner, config):
    config._attn_implementation = inner.config._attn_implementation
    inner.config = config
    for layer, own in zip(inner.layers, config.per_layer_config):
        attention, mlp = layer.self_attn, layer.mlp
        heads, groups = own.num_attention_heads * own.head_dim, own.num_key_value_heads * own.head_dim
        attention.config = config
        attention.q_proj = resized(attention.q_proj, rows=heads)
        attention.k_proj = resized(attention.k_proj, rows=groups)
        attention.v_proj = resized(attention.v_proj, rows=groups)
        attention.o_proj = resized(attention.o_proj, columns=heads)
        if "attention" in own.skip:
            layer.self_attn = NoAttention()
        mlp.gate_proj = resized(mlp.gate_proj, rows=own.intermediate_size)
        mlp.up_proj = resized(mlp.up_proj, rows=own.intermediate_size)
        mlp.down_proj = resized(mlp.down_proj, columns=own.intermediate_size)


class $pruned_inner($inner):
    config_class = $pruned_config

    def __init__(self, config):
        super().__init__(dense(config))
        resize(self, config)


class $pruned_causal($causal):
    config_class = $pruned_config

    def __init__(self, config):
        super().__init__(dense(config))
        resize(self.model, config)
        self.config = config
''')


@dataclass(frozen=True)
class PerLayer:
    """Class names of the generated modules."""

    config: str
    inner: str
    causal: str
    model_type: str

    @classmethod
    def of(cls, model: Any) -> PerLayer:
        """The names for a stock `transformers` model; refuses classes that do not come with transformers."""
        causal, inner = type(model), type(model.get_decoder())
        if not causal.__module__.startswith("transformers.models."):
            raise ModelError(
                f"{causal.__name__} is not a class of transformers: per-layer code can subclass only those"
            )
        return cls(type(model.config).__name__, inner.__name__, causal.__name__, f"pruned_{model.config.model_type}")

    @property
    def model_class(self) -> str:
        """The generated causal language model."""
        return f"Pruned{self.causal}"

    def auto_map(self) -> dict[str, Any]:
        """What config.json says so that the Auto classes find the generated modules."""
        modeling = "modeling_pruned."
        return {
            "model_type": self.model_type,
            "architectures": [self.model_class],
            "auto_map": {
                "AutoConfig": f"configuration_pruned.Pruned{self.config}",
                "AutoModel": f"{modeling}Pruned{self.inner}",
                "AutoModelForCausalLM": modeling + self.model_class,
            },
        }


def write_code(folder: Path, names: PerLayer) -> None:
    """Write `configuration_pruned.py` and `modeling_pruned.py`."""
    values = {
        "config": names.config, "inner": names.inner, "causal": names.causal, "model_type": names.model_type,
        "pruned_config": f"Pruned{names.config}", "pruned_inner": f"Pruned{names.inner}",
        "pruned_causal": names.model_class,
    }  # fmt: skip
    (folder / "configuration_pruned.py").write_text(CONFIGURATION.substitute(values), encoding="utf-8")
    (folder / "modeling_pruned.py").write_text(MODELING.substitute(values), encoding="utf-8")


def per_layer_overrides(plan: Plan, sites: Sequence[Site], config: Any) -> dict[str, Any]:
    """`per_layer_config` for config.json, which else keeps the dense values; every layer is spelled out."""
    ratio = config.num_attention_heads // config.num_key_value_heads
    layers: dict[str, dict[str, Any]] = {}
    for site in sites:
        width = len(plan.kept[site.name])
        layer = layers.setdefault(f"{site.layer:02d}", {})
        if site.kind == "mlp":
            layer["intermediate_size"] = width
        elif width:
            layer |= {"num_attention_heads": width * ratio, "num_key_value_heads": width}
        else:
            layer["skip"] = ["attention"]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"per_layer_config": layers, "head_dim": head_dim}
