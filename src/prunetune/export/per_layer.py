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
from prunetune.model.families import coupling_of, family_of, heads_of
from prunetune.model.sites import Site
from prunetune.plan import Plan

PREFIX = "pruned_"  # of a model_type
CONFIGURATION = Template('''\
"""Configuration of a model whose layers differ in width. Written by prunetune; needs transformers >= 5.14."""

from transformers import $config


class $pruned_config($config):
    model_type = "$model_type"

    def validate(self):  # on saving, of numbers that all layers would share
        """Widths are checked layer by layer when the model is built."""
''')

MODELING = Template('''\
"""A $causal whose layers differ in width. Written by prunetune; needs transformers >= 5.14."""

import copy

import torch
from torch import nn
from transformers import $causal, $base

from .configuration_pruned import $pruned_config

$helpers
def dense(config):
    plain = copy.copy(config)
    plain.per_layer_config = None
    return plain


def resized(linear, rows=None, columns=None):
    return nn.Linear(columns or linear.in_features, rows or linear.out_features, bias=linear.bias is not None,
                     device=linear.weight.device, dtype=linear.weight.dtype)


def resize(model, layers, config):
    for kernels in ("_attn_implementation", "_experts_implementation"):
        setattr(config, kernels, getattr(model.config, kernels))
    for module in model.modules():
        if hasattr(module, "config") and "Rotary" not in type(module).__name__:  # angles are the dense model's
            module.config = config
    for layer, own in zip(layers, config.per_layer_config):
$lines

class $pruned_base($base):
    config_class = $pruned_config

    def __init__(self, config):
        super().__init__(dense(config))
        resize(self, self.$layers, config)


class $pruned_causal($causal):
    config_class = $pruned_config

    def __init__(self, config):
        super().__init__(dense(config))
        resize(self, self.$inner.$layers, config)
''')

NO_ATTENTION = """
class NoAttention(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states), None

"""

OWN_HEADS = """
class OwnHeads:
    def __init__(self, config, heads):
        self.__dict__.update(shared=config, num_attention_heads=heads)

    def __getattr__(self, name):
        return getattr(self.shared, name)

"""


@dataclass(frozen=True)
class PerLayer:
    """Class names of the generated modules, and where the layers are."""

    config: str
    base: str
    causal: str
    inner: str  # the causal model's name for the base: "model"
    layers: str  # the base's name for the layers: "layers", "decoder.layers"
    model_type: str
    width: str  # the configuration's name for the channels of an MLP

    @classmethod
    def of(cls, model: Any) -> PerLayer:
        """The names for a stock `transformers` model; refuses classes that do not come with transformers."""
        causal, inner = type(model), model.base_model_prefix
        if not causal.__module__.startswith("transformers.models."):
            raise ModelError(
                f"{causal.__name__} is not a class of transformers: per-layer code can subclass only those"
            )
        first = coupling_of(model).layer_prefixes[0]
        return cls(
            config=type(model.config).__name__,
            base=type(getattr(model, inner)).__name__,
            causal=causal.__name__,
            inner=inner,
            layers=first.removeprefix(f"{inner}.").rpartition(".")[0],
            model_type=PREFIX + model.config.model_type,
            width=channels_of(model.config),
        )

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
                "AutoModel": f"{modeling}Pruned{self.base}",
                "AutoModelForCausalLM": modeling + self.model_class,
            },
        }


def channels_of(config: Any) -> str:
    """What a layer's own configuration calls the channels of its MLP, also where the dense one has no name for them."""
    return family_of(config).width or "intermediate_size"


def write_code(folder: Path, names: PerLayer, sites: Sequence[Site]) -> None:
    """Write `configuration_pruned.py` and `modeling_pruned.py`."""
    configuration, modeling = code_of(names, sites)
    (folder / "configuration_pruned.py").write_text(configuration, encoding="utf-8")
    (folder / "modeling_pruned.py").write_text(modeling, encoding="utf-8")


def code_of(names: PerLayer, sites: Sequence[Site]) -> tuple[str, str]:
    """The text of both modules; `hub` runs it, too."""
    lines = [line for site in sites if site.layer == sites[0].layer for line in _lines(site, names)]
    helpers = "".join(
        text for text, name in ((NO_ATTENTION, "NoAttention("), (OWN_HEADS, "OwnHeads(")) if name in "".join(lines)
    )
    values = {
        "config": names.config, "base": names.base, "causal": names.causal, "model_type": names.model_type,
        "inner": names.inner, "layers": names.layers, "helpers": helpers,
        "lines": "".join(f"        {line}\n" for line in lines),
        "pruned_config": f"Pruned{names.config}", "pruned_base": f"Pruned{names.base}",
        "pruned_causal": names.model_class,
    }  # fmt: skip
    return CONFIGURATION.substitute(values), MODELING.substitute(values)


def _lines(site: Site, names: PerLayer) -> list[str]:
    """What `resize` does to one layer's block."""
    layer = f"{names.inner}.{names.layers}.{site.layer}"
    attends = site.kind == "attention"
    units = "own.num_key_value_heads" if attends else f"own.{names.width}"
    cuts = [*((cut, "rows") for cut in site.producers), (site.consumer, "columns")]
    lines = []
    for cut, side in cuts:
        place = "layer" + cut.module.removeprefix(layer)
        times = f" * {cut.per_unit}" if cut.per_unit > 1 else ""
        lines.append(f"{place} = resized({place}, {side}={units}{times})")
    if not attends:
        return lines
    block = "layer" + site.name.removeprefix(layer)
    if any(len(cut.parts) > 1 for cut in site.producers):
        lines += [
            f"{block}.config = OwnHeads(config, own.num_attention_heads)",
            f"{block}.num_key_value_heads = own.num_key_value_heads",
        ]
    return [*lines, 'if "attention" in own.skip:', f"    {block} = NoAttention()"]


def per_layer_overrides(plan: Plan, sites: Sequence[Site], config: Any) -> dict[str, Any]:
    """`per_layer_config` for config.json, which else keeps the dense values; every layer is spelled out."""
    heads, channels = heads_of(config), channels_of(config)
    layers: dict[str, dict[str, Any]] = {}
    for site in sites:
        width = len(plan.kept[site.name])
        layer = layers.setdefault(f"{site.layer:02d}", {})
        if site.kind == "mlp":
            layer[channels] = width
        elif width:
            layer |= {"num_attention_heads": width * heads.ratio, "num_key_value_heads": width}
        else:
            layer["skip"] = ["attention"]
    if any(site.kind == "attention" for site in sites):
        return {"per_layer_config": layers, "head_dim": heads.size}
    return {"per_layer_config": layers}
