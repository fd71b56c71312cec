"""The two modules that go with a per-layer checkpoint: text, made from the sites of one layer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.errors import ModelError
from prunetune.export.per_layer import PerLayer, words_of
from prunetune.export.per_layer_text import (
    CONFIGURATION,
    MODELING,
    NO_ATTENTION,
    NO_LINEAR,
    NO_MIXTURE,
    NO_MIXTURE_WITH_SCORES,
    OWN_HEADS,
    RESIZED,
    RESIZED_TRANSPOSED,
    SHORTER,
)
from prunetune.pruning.families import family_of
from prunetune.pruning.linears import is_transposed
from prunetune.pruning.units import Site, Slice


def write_code(folder: Path, names: PerLayer, sites: Sequence[Site], model: Any) -> None:
    """Write `configuration_pruned.py` and `modeling_pruned.py`."""
    configuration, modeling = code_of(names, sites, model)
    (folder / "configuration_pruned.py").write_text(configuration, encoding="utf-8")
    (folder / "modeling_pruned.py").write_text(modeling, encoding="utf-8")


def code_of(names: PerLayer, sites: Sequence[Site], model: Any) -> tuple[str, str]:
    """The text of both modules; `hub` runs it, too."""
    lines = layer_lines(sites, names, model)
    text = "".join(lines)
    mixture = family_of(model.config).mixture
    helpers = {
        "NoAttention(": NO_ATTENTION,
        "NoLinear(": NO_LINEAR,
        "NoMixture(": NO_MIXTURE_WITH_SCORES if mixture and mixture.returns_scores else NO_MIXTURE,
        "OwnHeads(": OWN_HEADS,
    }
    transposed = any(is_transposed(module) for module in model.modules())
    values = {
        "config": names.config, "base": names.base, "causal": names.causal, "model_type": names.model_type,
        "inner": names.inner, "layers": names.layers,
        "helpers": "".join(helper for name, helper in helpers.items() if name in text),
        "resizers": (RESIZED_TRANSPOSED if transposed else RESIZED) + (SHORTER if "shorter(" in text else ""),
        "conv": "from transformers.pytorch_utils import Conv1D\n" if transposed else "",
        "lines": "".join(f"        {line}\n" for line in lines),
        "pruned_config": f"Pruned{names.config}", "pruned_base": f"Pruned{names.base}",
        "pruned_causal": names.model_class,
    }  # fmt: skip
    modeling = MODELING.substitute(values)
    values["digest"] = f"modeling_pruned.py {hashlib.sha256(modeling.encode()).hexdigest()[:12]}"
    return CONFIGURATION.substitute(values), modeling


def layer_lines(sites: Sequence[Site], names: PerLayer, model: Any) -> list[str]:
    """What `resize` does to one layer."""
    kinds: dict[int, set[str]] = {}
    for site in sites:
        kinds.setdefault(site.layer, set()).add(site.kind)
    if len({frozenset(found) for found in kinds.values()}) > 1 or model.config.num_hidden_layers > len(kinds):
        raise ModelError("layout per-layer needs layers of the same make, and this model has MLPs beside mixtures")
    first = [site for site in sites if site.layer == sites[0].layer]
    return _Lines(first, words_of(model.config), f"{names.inner}.{names.layers}.{sites[0].layer}", model).all()


@dataclass(frozen=True)
class _Lines:
    """Statements of the generated code, from the sites of one layer."""

    sites: Sequence[Site]
    words: dict[str, str]
    layer: str
    model: Any

    def all(self) -> list[str]:
        """Resize, tell, then leave out."""
        lines = [*self._linears(), *(line for site in self.sites for line in self._parameters(site)), *self._told()]
        return [*lines, *self._left_out()] or ["pass"]

    def _place(self, name: str) -> str:
        return "layer" + name.removeprefix(self.layer)

    def _linears(self) -> list[str]:
        terms: dict[tuple[str, int], list[str]] = {}
        for site in self.sites:
            for cut, axis in site.cuts():
                times = f" * {cut.per_unit}" if cut.per_unit > 1 else ""
                found = terms.setdefault((cut.module, axis), [])
                found.append(f"own.{self.words[site.kind]}{times}")
                others = cut.rows - site.units * cut.per_unit if cut.rows else 0
                if others and not any(cut.module == o.module for s in self.sites if s is not site for o in s.producers):
                    found.append(str(others))
        return [
            f"{self._place(name)} = resized({self._place(name)}, {('rows', 'columns')[axis]}={' + '.join(found)})"
            for (name, axis), found in terms.items()
        ]

    def _parameters(self, site: Site) -> list[str]:
        lines = []
        for part in site.slices:
            place = self._place(part.parameter)
            if part.lanes > 1 and any(other.kind == "experts" for other in self.sites):
                lines.append(f"{place} = shorter({place}, 0, own.{self.words['experts']})")
            lines.append(f"{place} = shorter({place}, {part.axis}, {self._count(site, part)})")
        return lines

    def _count(self, site: Site, part: Slice) -> str:
        per_unit = sum(part.parts)
        return f"own.{self.words[site.kind]}" + (f" * {per_unit}" if per_unit > 1 else "")

    def _told(self) -> list[str]:
        """Modules that know how many units they have."""
        found: dict[str, Site] = {site.kind: site for site in self.sites}
        lines = []
        heads = [found[kind] for kind in ("attention", "query-heads") if kind in found]
        if heads:
            block = self._place(heads[0].name.partition(":")[0])
            if any(len(cut.parts) > 1 or cut.rows for site in heads for cut in site.producers):
                lines += [
                    f"{block}.config = OwnHeads(config, own.num_attention_heads)",
                    f"{block}.num_key_value_heads = own.num_key_value_heads",
                ]
            if "query-heads" in found:
                lines.append(f"{block}.num_key_value_groups = own.num_attention_heads // own.num_key_value_heads")
        mixture = family_of(self.model.config).mixture
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
            lines.append(f"layer.{mixture.experts}.{name} = own.{mixture.width}")
        return lines

    def _experts(self, name: str) -> Any:
        """Of some layer that still has them."""
        layers = self.model.get_submodule(self.layer.rpartition(".")[0])
        return next(module for layer in layers for place, module in layer.named_modules() if place == name)

    def _left_out(self) -> list[str]:
        found: dict[str, Site] = {site.kind: site for site in self.sites}
        lines = []
        attention = found.get("attention-blocks") or found.get("attention")
        if attention:
            block = self._place(attention.name.partition(":")[0])
            lines += ['if "attention" in own.skip:', f"    {block} = NoAttention()"]
        if "mlp-blocks" in found:
            lines.append('if "mlp" in own.skip:')
            mixture, site = family_of(self.model.config).mixture, found["mlp-blocks"]
            if mixture and site.module.endswith(f".{mixture.block}"):
                lines.append(f"    layer.{mixture.block} = NoMixture()")
            else:
                *producers, consumer = (self._place(name) for name in site.inside)
                lines += [f"    {place} = NoLinear(0)" for place in producers]
                lines.append(f"    {consumer} = NoLinear(config.hidden_size)")
        return lines
