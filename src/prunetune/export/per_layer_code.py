"""The two modules that go with a per-layer checkpoint: text, made from the sites of one layer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.errors import ModelError
from prunetune.export.per_layer import PerLayerNames, width_option_names
from prunetune.export.per_layer_templates import (
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
from prunetune.pruning.families import get_family
from prunetune.pruning.linears import is_transposed
from prunetune.pruning.units import ParamSlice, Site, UnitKind


def write_code(folder: Path, names: PerLayerNames, sites: Sequence[Site], model: Any) -> None:
    """Write `configuration_pruned.py` and `modeling_pruned.py`."""
    configuration, modeling = generate_code(names, sites, model)
    (folder / "configuration_pruned.py").write_text(configuration, encoding="utf-8")
    (folder / "modeling_pruned.py").write_text(modeling, encoding="utf-8")


def generate_code(names: PerLayerNames, sites: Sequence[Site], model: Any) -> tuple[str, str]:
    """The text of both modules; `hub` runs it, too."""
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
    values = {
        "config": names.config, "base": names.base, "causal": names.causal, "model_type": names.model_type,
        "inner": names.base_attribute, "layers": names.layers_path,
        "helpers": "".join(helper for name, helper in helpers.items() if name in text),
        "resizers": (RESIZED_TRANSPOSED if transposed else RESIZED) + (SHORTER if "shorter(" in text else ""),
        "conv": "from transformers.pytorch_utils import Conv1D\n" if transposed else "",
        "lines": "".join(f"        {line}\n" for line in lines),
        "pruned_config": f"Pruned{names.config}", "pruned_base": f"Pruned{names.base}",
        "pruned_causal": names.model_class,
    }  # fmt: skip
    modeling = MODELING_TEMPLATE.substitute(values)
    values["digest"] = f"modeling_pruned.py {hashlib.sha256(modeling.encode()).hexdigest()[:12]}"
    return CONFIGURATION_TEMPLATE.substitute(values), modeling


def layer_lines(sites: Sequence[Site], names: PerLayerNames, model: Any) -> list[str]:
    """What `resize` does to one layer."""
    kinds: dict[int, set[str]] = {}
    for site in sites:
        kinds.setdefault(site.layer, set()).add(site.kind)
    if len({frozenset(found) for found in kinds.values()}) > 1 or model.config.num_hidden_layers > len(kinds):
        raise ModelError("layout per-layer needs layers of the same make, and this model has MLPs beside mixtures")
    first = [site for site in sites if site.layer == sites[0].layer]
    return _LayerStatements(
        first, width_option_names(model.config), f"{names.base_attribute}.{names.layers_path}.{sites[0].layer}", model
    ).statements()


@dataclass(frozen=True)
class _LayerStatements:
    """Statements of the generated code, from the sites of one layer."""

    sites: Sequence[Site]
    words: dict[str, str]
    layer: str
    model: Any

    def statements(self) -> list[str]:
        """Resize, tell, then leave out."""
        lines = [
            *self._resize_linears(),
            *(line for site in self.sites for line in self._resize_parameters(site)),
            *self._set_attributes(),
        ]
        return [*lines, *self._skip_blocks()] or ["pass"]

    def _local_name(self, name: str) -> str:
        return "layer" + name.removeprefix(self.layer)

    def _resize_linears(self) -> list[str]:
        terms: dict[tuple[str, int], list[str]] = {}
        for site in self.sites:
            for cut, axis in site.linear_slices():
                times = f" * {cut.rows_per_unit}" if cut.rows_per_unit > 1 else ""
                found = terms.setdefault((cut.module, axis), [])
                found.append(f"own.{self.words[site.kind]}{times}")
                others = cut.total_rows - site.units * cut.rows_per_unit if cut.total_rows else 0
                if others and not any(cut.module == o.module for s in self.sites if s is not site for o in s.producers):
                    found.append(str(others))
        return [
            f"{self._local_name(name)} = resized({self._local_name(name)}, {('rows', 'columns')[axis]}={' + '.join(found)})"
            for (name, axis), found in terms.items()
        ]

    def _resize_parameters(self, site: Site) -> list[str]:
        lines = []
        for part in site.weights.params:
            place = self._local_name(part.parameter)
            if part.parent_groups > 1 and any(other.kind is UnitKind.EXPERT for other in self.sites):
                lines.append(f"{place} = shorter({place}, 0, own.{self.words['experts']})")
            lines.append(f"{place} = shorter({place}, {part.axis}, {self._count(site, part)})")
        return lines

    def _count(self, site: Site, part: ParamSlice) -> str:
        per_unit = sum(part.part_sizes)
        return f"own.{self.words[site.kind]}" + (f" * {per_unit}" if per_unit > 1 else "")

    def _set_attributes(self) -> list[str]:
        """Modules that know how many units they have."""
        found: dict[str, Site] = {site.kind: site for site in self.sites}
        lines = []
        heads = [found[kind] for kind in ("attention", "query-heads") if kind in found]
        if heads:
            block = self._local_name(heads[0].name.partition(":")[0])
            if any(len(cut.part_sizes) > 1 or cut.total_rows for site in heads for cut in site.producers):
                lines += [
                    f"{block}.config = OwnHeads(config, own.num_attention_heads)",
                    f"{block}.num_key_value_heads = own.num_key_value_heads",
                ]
            if "query-heads" in found:
                lines.append(f"{block}.num_key_value_groups = own.num_attention_heads // own.num_key_value_heads")
        mixture = get_family(self.model.config).mixture
        if "experts" in found and mixture:
            lines += [
                f"layer.{place}.num_experts = own.{self.words['experts']}"
                for place in (mixture.router, mixture.experts)
            ]
        if "expert-channels" in found and mixture:
            name = (
                "intermediate_dim"
                if hasattr(self._experts(mixture.experts), "intermediate_dim")
                else "intermediate_size"
            )
            lines.append(f"layer.{mixture.experts}.{name} = own.{mixture.intermediate_size_key}")
        return lines

    def _experts(self, name: str) -> Any:
        """Of some layer that still has them."""
        layers = self.model.get_submodule(self.layer.rpartition(".")[0])
        return next(module for layer in layers for place, module in layer.named_modules() if place == name)

    def _skip_blocks(self) -> list[str]:
        found: dict[str, Site] = {site.kind: site for site in self.sites}
        lines = []
        attention = found.get("attention-blocks") or found.get("attention")
        if attention:
            block = self._local_name(attention.name.partition(":")[0])
            lines += ['if "attention" in own.skip:', f"    {block} = NoAttention()"]
        if "mlp-blocks" in found:
            lines.append('if "mlp" in own.skip:')
            mixture, site = get_family(self.model.config).mixture, found["mlp-blocks"]
            if mixture and site.gated_module.endswith(f".{mixture.block}"):
                lines.append(f"    layer.{mixture.block} = NoMixture()")
            else:
                *producers, consumer = (self._local_name(name) for name in site.weights.block_linears)
                lines += [f"    {place} = NoLinear(0)" for place in producers]
                lines.append(f"    {consumer} = NoLinear(config.hidden_size)")
        return lines
