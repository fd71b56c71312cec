"""Generates the two Python modules of a per-layer checkpoint: a function of its config.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunetune.model.config_checks import auto_class
from prunetune.model.per_layer_config import PerLayerNames, dense_config, width_option_names
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
from prunetune.pruning.families import architecture_info, get_family, head_counts
from prunetune.pruning.linears import is_transposed
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import DEFAULT_UNITS, Site, UnitKind


def build_meta_model(config: Any) -> Any:
    """A causal language model of a stock class, or one with images around it, without weights (on the meta device)."""
    with torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=False)


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
    kinds = _resized_kinds(values["per_layer_config"].values(), model)
    sites = find_sites(model, [kind.recipe_name for kind in kinds] or DEFAULT_UNITS)
    lines = layer_lines(sites, names, model)
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


def _resized_kinds(layers: Iterable[Mapping[str, Any]], model: Any) -> set[UnitKind]:
    """The kinds of unit that some layer in `per_layer_config` has fewer of, or none."""
    options, heads = width_option_names(model.config), head_counts(model.config)
    keys = {key for layer in layers for key in (*layer, *layer.get("skip", ()))}
    kinds = {kind for kind in UnitKind if options.get(kind) in keys} - {UnitKind.QUERY_HEAD}
    if any(
        layer.get("num_attention_heads", heads.query_heads)
        != layer.get("num_key_value_heads", heads.kv_heads) * heads.queries_per_kv_head
        for layer in layers
    ):
        kinds.add(UnitKind.QUERY_HEAD)
    kinds |= {UnitKind.KV_GROUP, UnitKind.ATTENTION_BLOCK} if "attention" in keys else set()
    kinds |= {UnitKind.MLP_BLOCK} if "mlp" in keys else set()
    return kinds - set(architecture_info(model).unprunable)


def layer_lines(sites: Sequence[Site], names: PerLayerNames, model: Any) -> list[str]:
    """The statements of the generated `resize` for one layer; where layers are of several makes, by their index."""
    layers_by_lines: dict[tuple[str, ...], list[int]] = {}
    for layer in range(len(architecture_info(model).layer_prefixes)):
        own_sites = [site for site in sites if site.layer == layer]
        path = f"{names.base_attribute}.{names.layers_path}.{layer}"
        statements = _LayerStatements(own_sites, width_option_names(model.config), path, model).statements()
        layers_by_lines.setdefault(tuple(statements), []).append(layer)
    if len(layers_by_lines) == 1:
        return list(*layers_by_lines)
    lines = ["index = [*layers].index(layer)"]
    for own_lines, layers in layers_by_lines.items():
        if own_lines != ("pass",):
            lines += [f"if index in {layers}:", *(f"    {line}" for line in own_lines)]
    return lines


@dataclass(frozen=True)
class _LayerStatements:
    """Writes the statements of the generated code from the sites of one layer."""

    sites: Sequence[Site]
    options: dict[str, str]  # kind of a site -> the option for its width
    layer: str  # path of the layer in the model
    model: Any

    def statements(self) -> list[str]:
        """Resize weights, set attributes that count units, then replace skipped blocks."""
        lines = [
            *self._resize_linears(),
            *(line for site in self.sites for line in self._resize_parameters(site)),
            *self._set_attributes(),
        ]
        return [*lines, *self._skip_blocks()] or ["pass"]

    def _local_name(self, name: str) -> str:
        return "layer" + name.removeprefix(self.layer)

    def _resize_linears(self) -> list[str]:
        """`resized(linear, rows=...)` for every linear; rows that no unit owns are a constant term."""
        terms_by_linear: dict[tuple[str, int], list[str]] = {}
        for site in self.sites:
            others = {linear.module for other in self.sites if other is not site for linear in other.producers}
            for linear, axis in site.linear_slices():
                factor = f" * {linear.rows_per_unit}" if linear.rows_per_unit > 1 else ""
                terms = terms_by_linear.setdefault((linear.module, axis), [])
                terms.append(f"own.{self.options[site.kind]}{factor}")
                fixed_rows = linear.total_rows - site.units * linear.rows_per_unit if linear.total_rows else 0
                if fixed_rows and linear.module not in others:
                    terms.append(str(fixed_rows))
        lines = []
        for (module, axis), terms in terms_by_linear.items():
            name = self._local_name(module)
            lines.append(f"{name} = resized({name}, {('rows', 'columns')[axis]}={' + '.join(terms)})")
        return lines

    def _resize_parameters(self, site: Site) -> list[str]:
        """`shorter(parameter, axis, size)` for parameters outside linears; stacked experts lose experts first."""
        lines = []
        for param in site.weights.params:
            name = self._local_name(param.parameter)
            if param.parent_groups > 1 and any(other.kind is UnitKind.EXPERT for other in self.sites):
                lines.append(f"{name} = shorter({name}, 0, own.{self.options['experts']})")
            per_unit = sum(param.part_sizes)
            factor = f" * {per_unit}" if per_unit > 1 else ""
            lines.append(f"{name} = shorter({name}, {param.axis}, own.{self.options[site.kind]}{factor})")
        return lines

    def _set_attributes(self) -> list[str]:
        """Set the attributes of modules that hold a number of units."""
        site_of_kind: dict[str, Site] = {site.kind: site for site in self.sites}
        lines = []
        heads = [site_of_kind[kind] for kind in ("attention", "query-heads") if kind in site_of_kind]
        if heads:
            block = self._local_name(heads[0].name.partition(":")[0])
            if any(len(linear.part_sizes) > 1 or linear.total_rows for site in heads for linear in site.producers):
                lines += [
                    f"{block}.config = OwnHeads(config, own.num_attention_heads)",
                    f"{block}.num_key_value_heads = own.num_key_value_heads",
                ]
            if "query-heads" in site_of_kind:
                lines.append(f"{block}.num_key_value_groups = own.num_attention_heads // own.num_key_value_heads")
        mixture = get_family(self.model.config).mixture
        if "experts" in site_of_kind and mixture:
            lines += [
                f"layer.{module}.num_experts = own.{self.options['experts']}"
                for module in (mixture.router, mixture.experts)
            ]
        if "expert-channels" in site_of_kind and mixture:
            layers = self.model.get_submodule(self.layer.rpartition(".")[0])
            # Of the first layer that still has experts.
            experts = next(
                module for layer in layers for name, module in layer.named_modules() if name == mixture.experts
            )
            attribute = "intermediate_dim" if hasattr(experts, "intermediate_dim") else "intermediate_size"
            lines.append(f"layer.{mixture.experts}.{attribute} = own.{mixture.intermediate_size_key}")
        return lines

    def _skip_blocks(self) -> list[str]:
        """Replace the blocks that a layer's `skip` names by modules that return zeros."""
        site_of_kind: dict[str, Site] = {site.kind: site for site in self.sites}
        lines = []
        attention = site_of_kind.get("attention-blocks") or site_of_kind.get("attention")
        if attention:
            block = self._local_name(attention.name.partition(":")[0])
            lines += ['if "attention" in own.skip:', f"    {block} = NoAttention()"]
        if "mlp-blocks" in site_of_kind:
            lines.append('if "mlp" in own.skip:')
            mixture, site = get_family(self.model.config).mixture, site_of_kind["mlp-blocks"]
            if mixture and site.gated_module.endswith(f".{mixture.block}"):
                lines.append(f"    layer.{mixture.block} = NoMixture()")
            else:
                *producers, consumer = (self._local_name(name) for name in site.weights.block_linears)
                lines += [f"    {producer} = NoLinear(0)" for producer in producers]
                lines.append(f"    {consumer} = NoLinear(config.hidden_size)")
        return lines
