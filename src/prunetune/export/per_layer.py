"""Layers of different width: transformers' `per_layer_config` schema, and the little code that builds such a model.

No mainstream class builds layers from `per_layer_config` yet (transformers 5.23 ships the configuration half), so the
folder carries two small modules that subclass the original architecture and resize its linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prunetune.errors import ModelError
from prunetune.plan import Plan
from prunetune.pruning.families import architecture_info, get_family, head_counts, num_experts_key
from prunetune.pruning.units import Site, surviving_layers

MODEL_TYPE_PREFIX = "pruned_"  # of a model_type


@dataclass(frozen=True)
class PerLayerNames:
    """Class names of the generated modules, and where the layers are."""

    config: str
    base: str
    causal: str
    base_attribute: str  # the causal model's name for the base: "model"
    layers_path: str  # the base's name for the layers: "layers", "decoder.layers"
    model_type: str

    @classmethod
    def from_model(cls, model: Any) -> PerLayerNames:
        """The names for a stock `transformers` model; refuses classes that do not come with transformers."""
        causal, inner = type(model), model.base_model_prefix
        if not causal.__module__.startswith("transformers.models."):
            raise ModelError(
                f"{causal.__name__} is not a class of transformers: per-layer code can subclass only those"
            )
        first = architecture_info(model).layer_prefixes[0]
        return cls(
            config=type(model.config).__name__,
            base=type(getattr(model, inner)).__name__,
            causal=causal.__name__,
            base_attribute=inner,
            layers_path=first.removeprefix(f"{inner}.").rpartition(".")[0],
            model_type=MODEL_TYPE_PREFIX + model.config.model_type,
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


SKIP_NAMES = {"attention": "attention", "attention-blocks": "attention", "mlp-blocks": "mlp"}


def width_option_names(config: Any) -> dict[str, str]:
    """What a layer's own configuration calls the number of units of a kind, also where the dense one has no name."""
    family = get_family(config)
    words = {
        "attention": "num_key_value_heads",
        "query-heads": "num_attention_heads",
        "mlp": family.intermediate_size_key or "intermediate_size",
    }
    if family.mixture:
        words |= {"experts": num_experts_key(config), "expert-channels": family.mixture.intermediate_size_key}
    return words


def per_layer_overrides(plan: Plan, sites: Sequence[Site], config: Any) -> dict[str, Any]:
    """`per_layer_config` for config.json, which else keeps the dense values; every layer is spelled out."""
    heads, words = head_counts(config), width_option_names(config)
    places = {layer: place for place, layer in enumerate(surviving_layers(plan, sites))}
    layers: dict[str, dict[str, Any]] = {f"{place:02d}": {} for place in places.values()}
    for site in sites:
        if site.layer not in places or site.kind == "layers":
            continue
        layer, width = layers[f"{places[site.layer]:02d}"], len(plan.kept[site.name])
        if site.kind == "attention" and width:
            layer |= {"num_attention_heads": width * heads.queries_per_kv_head, "num_key_value_heads": width}
        elif site.kind in SKIP_NAMES:
            if not width:
                layer.setdefault("skip", []).append(SKIP_NAMES[site.kind])
        elif site.kind == "query-heads":
            layer |= {"num_attention_heads": width} if width else {}
        elif width:
            per_lane = site.parent_groups if site.kind != "expert-channels" else len(_experts_with_channels(site, plan))
            layer[words[site.kind]] = width // per_lane
        else:
            layer[words[site.kind]] = site.units_per_group  # of a block that is not there: as in the dense model
    for layer in layers.values():
        if "skip" in layer:
            layer["skip"] = sorted(set(layer["skip"]))
    if any(site.kind in ("attention", "query-heads") for site in sites):
        return {"per_layer_config": layers, "head_dim": heads.head_dim}
    return {"per_layer_config": layers}


def _experts_with_channels(site: Site, plan: Plan) -> set[int]:
    return {unit // site.units_per_group for unit in plan.kept[site.name]}
