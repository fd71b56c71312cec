"""Configuration of models whose layers differ in width: transformers' `per_layer_config`, and the classes' names.

No stock class builds layers from `per_layer_config` yet (transformers 5.23 has the configuration half only), so the
folder has two small generated modules (see `per_layer_code`) that subclass the original classes and resize linears.
prunetune itself opens such a folder by classes of its own (`per_layer_classes`), and never runs those modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunetune.errors import ModelError
from prunetune.plan import Plan
from prunetune.pruning.families import (
    MODEL_TYPE_PREFIX,
    architecture_info,
    get_family,
    head_counts,
    num_experts_key,
)
from prunetune.pruning.units import Site, UnitKind, surviving_layers
from prunetune.utils.failures import reading_model_files

# Keys that the stock class does not have: the per-layer schema, and rotary keys that only older releases read.
NON_STOCK_KEYS = ("per_layer_config", "auto_map", "architectures", "transformers_version", "rope_theta", "rope_scaling")


def dense_config(values: Mapping[str, Any], folder: object) -> Any:
    """The stock class's configuration in the values of `folder`'s config.json; of a per-layer model the dense one.

    Raises `ModelError` for an unknown class, and for values that it refuses.
    """
    from transformers import CONFIG_MAPPING

    family = str(values["model_type"]).removeprefix(MODEL_TYPE_PREFIX)
    if family not in CONFIG_MAPPING:
        raise ModelError(f"{folder}: {family} is no architecture of transformers; name a model of one that is")
    stock_values = {key: _with_floats(value) for key, value in values.items() if key not in NON_STOCK_KEYS}
    with reading_model_files(f"{folder}/config.json does not fit {family}", "write the model again"):
        return CONFIG_MAPPING[family].from_dict(stock_values | {"model_type": family})


def _with_floats(value: Any) -> Any:
    """A value of config.json with infinite numbers as such, which transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    if isinstance(value, dict):
        return float(value["__float__"]) if "__float__" in value else {k: _with_floats(v) for k, v in value.items()}
    return value


@dataclass(frozen=True)
class PerLayerNames:
    """The stock classes that the generated modules subclass, and where the layers are."""

    config: str
    base: str
    causal: str
    base_attribute: str  # the causal model's attribute for the base model: "model"
    layers_path: str  # the layers' path in the base model: "layers", "decoder.layers"
    model_type: str  # of the generated configuration

    @classmethod
    def from_model(cls, model: Any) -> PerLayerNames:
        """The names for a transformers model or a per-layer one; raises `ModelError` for a class of another package."""
        first_layer = architecture_info(model).layer_prefixes[0]
        base_attribute = first_layer.partition(".")[0]  # Llama 4's `base_model_prefix` names no module
        causal, base, config = map(_stock_class, (model, getattr(model, base_attribute), model.config))
        return cls(
            config=config.__name__,
            base=base.__name__,
            causal=causal.__name__,
            base_attribute=base_attribute,
            layers_path=first_layer.removeprefix(f"{base_attribute}.").rpartition(".")[0],
            model_type=MODEL_TYPE_PREFIX + config.model_type,
        )

    @property
    def model_class(self) -> str:
        """The name of the generated causal language model."""
        return f"Pruned{self.causal}"

    def auto_map(self) -> dict[str, Any]:
        """The entries of config.json by which the Auto classes find the generated modules."""
        return {
            "model_type": self.model_type,
            "architectures": [self.model_class],
            "auto_map": {
                "AutoConfig": f"configuration_pruned.Pruned{self.config}",
                "AutoModel": f"modeling_pruned.Pruned{self.base}",
                "AutoModelForCausalLM": f"modeling_pruned.{self.model_class}",
            },
        }


def _stock_class(value: Any) -> Any:
    """The class of transformers that a value is of, itself or through a per-layer class of this package."""
    own = type(value)
    stock = own.__mro__[1] if own.__module__ == "prunetune.model.per_layer_classes" else own
    if not stock.__module__.startswith("transformers.models."):
        raise ModelError(f"{own.__name__} is not a class of transformers: per-layer code can subclass only those")
    return stock


# Kind of a site that keeps no unit -> the block that `skip` names.
SKIP_NAMES = {"attention": "attention", "attention-blocks": "attention", "mlp-blocks": "mlp"}


def width_option_names(config: Any) -> dict[str, str]:
    """Kind of a site -> the option for its width in a layer's configuration, also if the dense one has none."""
    family = get_family(config)
    options = {
        "attention": "num_key_value_heads",
        "query-heads": "num_attention_heads",
        "mlp": family.intermediate_size_key or "intermediate_size",
    }
    if family.mixture:
        options |= {"experts": num_experts_key(config), "expert-channels": family.mixture.intermediate_size_key}
    return options


def per_layer_overrides(plan: Plan, sites: Sequence[Site], config: Any) -> dict[str, Any]:
    """`per_layer_config` for config.json, whose other values remain the dense model's; every layer has an entry."""
    options = width_option_names(config)
    has_layer_sites = any(site.kind is UnitKind.LAYER for site in sites)
    kept_layers = surviving_layers(plan, sites) if has_layer_sites else range(config.num_hidden_layers)
    new_index = {layer: index for index, layer in enumerate(kept_layers)}
    # What an earlier run made of a layer; `config` is of the cut model.
    before = config.to_dict().get("per_layer_config", {}) if config.is_heterogeneous else {}
    by_index = {int(index): dict(values) for index, values in before.items()}
    layers: dict[str, dict[str, Any]] = {f"{index:02d}": by_index.get(index, {}) for index in new_index.values()}
    for site in sites:
        if site.layer not in new_index or site.kind is UnitKind.LAYER:
            continue
        layer, width = layers[f"{new_index[site.layer]:02d}"], len(plan.kept[site.name])
        if site.kind is UnitKind.KV_GROUP and width:
            ratio = head_counts(config, new_index[site.layer]).queries_per_kv_head
            layer |= {"num_attention_heads": width * ratio, "num_key_value_heads": width}
        elif site.kind in SKIP_NAMES:
            if not width:
                layer.setdefault("skip", []).append(SKIP_NAMES[site.kind])
        elif site.kind is UnitKind.QUERY_HEAD:
            layer |= {"num_attention_heads": width} if width else {}
        elif width:
            parents = site.parent_groups
            if site.kind is UnitKind.EXPERT_CHANNEL:  # only experts that keep channels
                parents = len({unit // site.units_per_group for unit in plan.kept[site.name]})
            layer[options[site.kind]] = width // parents
        else:
            layer[options[site.kind]] = site.units_per_group  # the block is skipped: as in the dense model
    for layer in layers.values():
        if "skip" in layer:
            layer["skip"] = sorted(set(layer["skip"]))
    if any(site.kind.is_head for site in sites):
        return {"per_layer_config": layers, "head_dim": head_counts(config).head_dim}
    return {"per_layer_config": layers}
