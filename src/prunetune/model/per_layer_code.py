"""Models whose layers differ in width: transformers' `per_layer_config`, and the two Python modules generated from it.

No stock class builds layers from `per_layer_config` yet (transformers 5.23 has the configuration half only), so the
folder has two small generated modules that subclass the original classes and resize linears. prunetune itself opens
such a folder by classes of its own (`per_layer_classes`), and never runs those modules.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunetune.errors import ModelError
from prunetune.model.config_checks import auto_class
from prunetune.model.per_layer_templates import (
    CONFIGURATION_TEMPLATE,
    MODELING_TEMPLATE,
    NO_ATTENTION,
    NO_LINEAR,
    NO_MIXTURE,
    NO_MIXTURE_WITH_SCORES,
    OWN_HEADS,
    RESIZED,
    RESIZED_TRANSPOSED,
    SHORTER,
)
from prunetune.plan import Plan
from prunetune.pruning.families import (
    MODEL_TYPE_PREFIX,
    architecture_info,
    get_family,
    head_counts,
    num_experts_key,
)
from prunetune.pruning.linears import is_transposed
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import DEFAULT_UNITS, Site, UnitKind, surviving_layers
from prunetune.utils.failures import reading_model_files


def build_meta_model(config: Any) -> Any:
    """A causal language model of a stock class, or one with images around it, without weights (on the meta device).

    In float32, whatever the configuration says: a class that transformers builds in another dtype makes it the default
    of the whole process meanwhile, and two threads that do so at once can leave it there.
    """
    config = copy.deepcopy(config)
    parts = [config, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)]
    dtypes = [part.dtype for part in parts]
    with torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=False)
    for part, dtype in zip(parts, dtypes, strict=True):
        part.dtype = dtype
    return model


def write_code(folder: Path) -> None:
    """Write `configuration_pruned.py` and `modeling_pruned.py` for the folder's config.json."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name, text in generate_code(values, folder)[1].items():
        (folder / name).write_text(text, encoding="utf-8")


def generate_code(values: Mapping[str, Any], folder: object) -> tuple[PerLayerNames, dict[str, str]]:
    """The class names, and the text of both modules by file name, for the values of `folder`'s config.json.

    Raises `ModelError` for values that no module can be written for.
    """
    model = build_meta_model(dense_config(values, folder))
    names = PerLayerNames.from_model(model)
    own_values, heads = values["per_layer_config"].values(), head_counts(model.config)
    # The kinds of unit that some layer has fewer of, or none.
    keys = {key for own in own_values for key in (*own, *own.get("skip", ()))}
    options = width_option_names(model.config)
    kinds = {kind for kind in UnitKind if options.get(kind) in keys} - {UnitKind.QUERY_HEAD}
    for own in own_values:
        queries = own.get("num_attention_heads", heads.query_heads)
        if queries != own.get("num_key_value_heads", heads.kv_heads) * heads.queries_per_kv_head:
            kinds.add(UnitKind.QUERY_HEAD)
    kinds |= {UnitKind.KV_GROUP, UnitKind.ATTENTION_BLOCK} if "attention" in keys else set()
    kinds |= {UnitKind.MLP_BLOCK} if "mlp" in keys else set()
    kinds -= set(architecture_info(model).unprunable)
    sites = find_sites(model, [kind.recipe_name for kind in kinds] or DEFAULT_UNITS)
    layers_by_lines: dict[tuple[str, ...], list[int]] = {}  # where layers are of several makes, by their index
    for layer in range(len(architecture_info(model).layer_prefixes)):
        own_sites = [site for site in sites if site.layer == layer]
        statements = _layer_statements(own_sites, f"{names.base_attribute}.{names.layers_path}.{layer}", model)
        layers_by_lines.setdefault(tuple(statements), []).append(layer)
    lines = ["index = [*layers].index(layer)"]
    for own_lines, layers in layers_by_lines.items():
        if own_lines != ("pass",):
            lines += [f"if index in {layers}:", *(f"    {line}" for line in own_lines)]
    if len(layers_by_lines) == 1:
        lines = list(*layers_by_lines)
    text = "".join(lines)
    mixture = get_family(model.config).mixture
    helpers = {
        "NoAttention(": NO_ATTENTION,
        "NoLinear(": NO_LINEAR,
        "NoMixture(": NO_MIXTURE_WITH_SCORES if mixture and mixture.returns_scores else NO_MIXTURE,
        "OwnHeads(": OWN_HEADS,
    }
    transposed = any(is_transposed(module) for module in model.modules())
    fields = {
        "config": names.config, "base": names.base, "causal": names.causal, "model_type": names.model_type,
        "inner": names.base_attribute, "layers": names.layers_path,
        "helpers": "".join(helper for name, helper in helpers.items() if name in text),
        "resizers": (RESIZED_TRANSPOSED if transposed else RESIZED) + (SHORTER if "shorter(" in text else ""),
        "conv": "from transformers.pytorch_utils import Conv1D\n" if transposed else "",
        "lines": "".join(f"        {line}\n" for line in lines),
        "pruned_config": f"Pruned{names.config}", "pruned_base": f"Pruned{names.base}",
        "pruned_causal": names.model_class,
    }  # fmt: skip
    modeling = MODELING_TEMPLATE.substitute(fields)
    fields["digest"] = f"modeling_pruned.py {hashlib.sha256(modeling.encode()).hexdigest()[:12]}"
    configuration = CONFIGURATION_TEMPLATE.substitute(fields)
    return names, {"configuration_pruned.py": configuration, "modeling_pruned.py": modeling}


def _layer_statements(sites: Sequence[Site], layer: str, model: Any) -> list[str]:
    """The statements for the sites of one layer, whose path in the model is `layer`."""
    options, mixture = width_option_names(model.config), get_family(model.config).mixture
    by_kind: dict[str, Site] = {site.kind: site for site in sites}
    lines = []

    def local(name: str) -> str:
        return "layer" + name.removeprefix(layer)

    # `resized(linear, rows=...)` for every linear; rows that no unit owns are a constant term.
    terms_by_linear: dict[tuple[str, int], list[str]] = {}
    for site in sites:
        others = {linear.module for other in sites if other is not site for linear in other.producers}
        for linear, axis in site.linear_slices():
            factor = f" * {linear.rows_per_unit}" if linear.rows_per_unit > 1 else ""
            terms = terms_by_linear.setdefault((linear.module, axis), [])
            terms.append(f"own.{options[site.kind]}{factor}")
            fixed_rows = linear.total_rows - site.units * linear.rows_per_unit if linear.total_rows else 0
            if fixed_rows and linear.module not in others:
                terms.append(str(fixed_rows))
    for (module, axis), terms in terms_by_linear.items():
        lines.append(f"{local(module)} = resized({local(module)}, {('rows', 'columns')[axis]}={' + '.join(terms)})")
    # `shorter(parameter, axis, size)` for parameters outside linears; stacked experts lose experts first.
    for site in sites:
        for param in site.weights.params:
            name = local(param.parameter)
            if param.parent_groups > 1 and "experts" in by_kind:
                lines.append(f"{name} = shorter({name}, 0, own.{options['experts']})")
            per_unit = sum(param.part_sizes)
            factor = f" * {per_unit}" if per_unit > 1 else ""
            lines.append(f"{name} = shorter({name}, {param.axis}, own.{options[site.kind]}{factor})")
    # Attributes of modules that hold a number of units.
    if heads := [by_kind[kind] for kind in ("attention", "query-heads") if kind in by_kind]:
        block = local(heads[0].name.partition(":")[0])
        if any(len(linear.part_sizes) > 1 or linear.total_rows for site in heads for linear in site.producers):
            lines.append(f"{block}.config = OwnHeads(config, own.num_attention_heads)")
            lines.append(f"{block}.num_key_value_heads = own.num_key_value_heads")
        if "query-heads" in by_kind:
            lines.append(f"{block}.num_key_value_groups = own.num_attention_heads // own.num_key_value_heads")
    if "experts" in by_kind and mixture:
        modules = (mixture.router, mixture.experts)
        lines += [f"layer.{module}.num_experts = own.{options['experts']}" for module in modules]
    if "expert-channels" in by_kind and mixture:
        layers = model.get_submodule(layer.rpartition(".")[0])
        named = (module for other in layers for module in other.named_modules())
        experts = next(module for name, module in named if name == mixture.experts)  # of the first layer that has some
        attribute = "intermediate_dim" if hasattr(experts, "intermediate_dim") else "intermediate_size"
        lines.append(f"layer.{mixture.experts}.{attribute} = own.{mixture.intermediate_size_key}")
    # The blocks that a layer's `skip` names become modules that return zeros.
    if attention := by_kind.get("attention-blocks") or by_kind.get("attention"):
        block = local(attention.name.partition(":")[0])
        lines += ['if "attention" in own.skip:', f"    {block} = NoAttention()"]
    if site_of_mlp := by_kind.get("mlp-blocks"):
        lines.append('if "mlp" in own.skip:')
        if mixture and site_of_mlp.gated_module.endswith(f".{mixture.block}"):
            lines.append(f"    layer.{mixture.block} = NoMixture()")
        else:
            *producers, consumer = map(local, site_of_mlp.weights.block_linears)
            lines += [f"    {producer} = NoLinear(0)" for producer in producers]
            lines.append(f"    {consumer} = NoLinear(config.hidden_size)")
    return lines or ["pass"]


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
    size, heads, whole = stock_values.get("hidden_size"), stock_values.get("num_attention_heads"), {}
    # Llama demands that heads divide the hidden size, which channels that are left need not.
    if type(size) is int and type(heads) is int and heads > 0 and size % heads and family != values["model_type"]:
        whole = {"hidden_size": heads * (size // heads + 1)}
    with reading_model_files(f"{folder}/config.json does not fit {family}", "write the model again"):
        config = CONFIG_MAPPING[family].from_dict(stock_values | {"model_type": family} | whole)
    if whole:
        config.hidden_size = size
    return config


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
