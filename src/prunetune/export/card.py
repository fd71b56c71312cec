"""The model card that goes with a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from prunetune.config.fields import fields_by_path
from prunetune.config.recipe import RunConfig
from prunetune.manifest import Manifest
from prunetune.model.license import LicenseInfo
from prunetune.plan import Plan
from prunetune.pruning.units import Site, effective_layout, kept_params

REMOTE_CODE_NOTE = """`trust_remote_code` runs `configuration_pruned.py` and `modeling_pruned.py` of this folder.
They give each layer its own widths; read them first. Where prunetune is installed, `prunetune.hub.register()` opens the
folder without them, and vLLM does so by itself. A model of `layout: uniform` needs none of this."""
ONNX = """```python
import onnxruntime
from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("PATH/model.onnx")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```"""
MODEL_TITLES = {"dense": "dense", "tuned": "dense, tuned", "pruned": "this model"}
UNIT_LABELS = {
    "layers": "layer",
    "attention-blocks": "attention block",
    "attention": "attention",
    "query-heads": "query head",
    "mlp-blocks": "MLP block",
    "mlp": "MLP",
    "experts": "expert",
    "expert-channels": "expert channel",
}
UNKNOWN = LicenseInfo()
PRIVATE_OPTIONS = ("out", "device", "data.root")  # of the place where it ran, not of the model


@dataclass(frozen=True)
class ScoreRow:
    """One metric of one task: model name (`dense`, `tuned`, `pruned`) -> (value, standard error, items)."""

    task: str
    metric: str
    scores: Mapping[str, tuple[float, float, int]]


@dataclass(frozen=True)
class Provenance:
    """What a card tells beside the plan: where the base comes from, and what was found so far."""

    config: RunConfig
    manifest: Manifest
    licence: LicenseInfo = UNKNOWN
    scores: Sequence[ScoreRow] = ()
    recipe_sha256: str = ""  # of the run's config.yaml


def format_model_card(origin: Provenance, plan: Plan, sites: Sequence[Site]) -> str:
    """README.md of the model folder: where it comes from, what was removed, what it scores, how to open it."""
    parts = [
        _front_matter(origin),
        f"# {origin.config.model}, tuned and pruned",
        _summary(origin, plan, sites),
        _usage_section(effective_layout(origin.config.layout, sites)),
        _sizes(origin.manifest),
        _scores(origin.scores, origin.manifest),
        _provenance(origin),
        _licence(origin.licence),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def format_export_card(card: str, layout: str, description: str) -> str:
    """A model's card for an export of it, which is opened in its own way; sizes and scores stay those of the model."""
    head, mark, rest = card.partition("\n\n## ")
    head = head.partition("\n\n```python")[0]
    note = f"This is an export: {description}. Sizes and scores below are of the model that it was made from."
    return f"{head}\n\n{note}\n\n{ONNX if layout == 'onnx' else _usage_section(layout)}{mark}{rest}"


def _front_matter(origin: Provenance) -> str:
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if origin.config.model.count("/") == 1 and origin.config.model[0] not in "./~":
        values["base_model"] = origin.config.model
    if origin.licence.id:
        named = {"license": origin.licence.id, "license_name": origin.licence.name, "license_link": origin.licence.link}
        values |= {key: value for key, value in named.items() if value}
    text: str = yaml.safe_dump(values | {"tags": ["prunetune", "pruning", "lora"]}, sort_keys=False)
    return f"---\n{text}---"


def _summary(origin: Provenance, plan: Plan, sites: Sequence[Site]) -> str:
    share = kept_params(sites, plan) / sum(site.params for site in sites)
    kinds = {site.kind for site in sites}  # others stay whole
    blocks = " and ".join(name for kind, name in UNIT_LABELS.items() if kind in kinds)
    return (
        f"Made by prunetune from `{origin.config.model}`: LoRA tuning and structural pruning in one run.\n"
        f"{100 * share:.1f}% of the {blocks} parameters remain (layout {origin.config.layout});\n"
        "`plan.json` names the units kept, `SHA256SUMS` the files as they were written."
    )


def _usage_section(layout: str) -> str:
    code = ", trust_remote_code=True" if layout == "per-layer" else ""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH"{code})
tokenizer = AutoTokenizer.from_pretrained("PATH"{code})
```{f"{chr(10)}{chr(10)}{REMOTE_CODE_NOTE}" if code else ""}"""


def _sizes(manifest: Manifest) -> str:
    dense, pruned = manifest.model, manifest.pruned
    rows = [
        ("parameters", dense.params, pruned.params, "M"),
        ("of them in the decoder", dense.decoder_params, pruned.decoder_params, "M"),
        (f"weights on disk, {pruned.dtype}", dense.bytes, pruned.bytes, "MB"),
    ]
    if dense.bytes is None or pruned.bytes is None:
        return ""
    lines = [
        f"| {title} | {before / 1e6:,.1f} {unit} | {after / 1e6:,.1f} {unit} |"
        for title, before, after, unit in rows
        if before is not None and after is not None
    ]
    return "\n".join(["## Size", "", "| | dense | this model |", "|---|---:|---:|", *lines])


def _scores(scores: Sequence[ScoreRow], manifest: Manifest) -> str:
    if not scores:
        return ""
    names = [name for name in MODEL_TITLES if any(name in row.scores for row in scores)]
    head = ["| task | metric | items |" + "".join(f" {MODEL_TITLES[name]} |" for name in names)]
    head.append("|---|---|---:|" + "---:|" * len(names))
    lines = [
        f"| {row.task} | {row.metric} | {max(n for *_, n in row.scores.values())} |"
        + "".join(f" {_cell(row.scores.get(name))} |" for name in names)
        for row in scores
    ]
    computed = f", computed in {manifest.dtype}" if manifest.dtype else ""
    return "\n".join(["## Scores", "", f"On the run's test split{computed}, ± standard error.", "", *head, *lines])


def _cell(found: tuple[float, float, int] | None) -> str:
    if found is None or math.isnan(found[0]):
        return "–"
    return f"{found[0]:.3f}" + ("" if math.isnan(found[1]) else f" ± {found[1]:.3f}")


def _provenance(origin: Provenance) -> str:
    manifest = origin.manifest
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    commit = f"; prunetune at commit `{manifest.commit}`" if manifest.commit else ""
    lines = ["## Provenance", ""]
    lines += [f"- made with {versions}{commit}"] if versions else []
    lines += [f"- recipe, where it is not the default: {_changed_options(origin.config)}"]
    lines += [f"- SHA-256 of the run's config.yaml: `{origin.recipe_sha256}`"] if origin.recipe_sha256 else []
    lines += [f"- SHA-256 of the data, {split}: `{digest}`" for split, digest in manifest.data.hashes.items()]
    return "\n".join(lines)


def _changed_options(config: RunConfig) -> str:
    said, plain = _flat(config), _flat(RunConfig())
    changed = [
        f"`{name}: {value}`" for name, value in said.items() if value != plain[name] and name not in PRIVATE_OPTIONS
    ]
    return ", ".join(changed) or "all of it is"


def _flat(config: RunConfig) -> dict[str, Any]:
    found = {}
    for path in fields_by_path(RunConfig):
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name)
        found[path] = list(value) if isinstance(value, tuple) else value
    return found


def _licence(licence: LicenseInfo) -> str:
    if not licence.id:
        return "## Licence\n\nThe licence of the base model applies; the base does not name one where it was read."
    name = f" ({licence.name})" if licence.name else ""
    link = f", {licence.link}" if licence.link else ""
    return f"## Licence\n\nThat of the base model applies: {licence.id}{name}{link}, as {licence.where} says."
