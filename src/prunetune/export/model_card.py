"""The model card (README.md) of a checkpoint and of an export."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from prunetune.config.fields import fields_by_path
from prunetune.config.recipe import RunConfig
from prunetune.manifest import Manifest
from prunetune.model.provenance import LicenseInfo, PruningRun
from prunetune.plan import Plan
from prunetune.pruning.units import Site, UnitKind, kept_params
from prunetune.utils.untrusted import markdown_code, markdown_text

REMOTE_CODE_NOTE = """`trust_remote_code` runs `configuration_pruned.py` and `modeling_pruned.py` of this folder.
They give each layer its own widths; read them first. Where prunetune is installed, `prunetune.hub.register()` opens the
folder without them, and vLLM does so by itself. A model of `layout: uniform` needs none of this."""
ONNX_USAGE = """```python
import onnxruntime
from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("PATH/model.onnx")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```"""
UNKNOWN_LICENSE = LicenseInfo()
UNPUBLISHED_OPTIONS = ("out", "device", "data.root")  # they describe the machine of the run, not the model


@dataclass(frozen=True)
class ScoreRow:
    """One metric of one task: model name (`dense`, `tuned`, `pruned`) -> (value, standard error, items)."""

    task: str
    metric: str
    scores: Mapping[str, tuple[float, float, int]]


@dataclass(frozen=True)
class Provenance:
    """What a card says besides the plan: the recipe, the run's manifest, the base's licence, and scores."""

    config: RunConfig
    manifest: Manifest
    licence: LicenseInfo = UNKNOWN_LICENSE
    scores: Sequence[ScoreRow] = ()
    recipe_sha256: str = ""  # of the run's config.yaml
    history: Sequence[PruningRun] = ()  # the runs that pruned the model, this one last

    @property
    def titles(self) -> Mapping[str, str]:
        """What tables call the models of the run: the result of an earlier one is not dense."""
        start = "before this run" if len(self.history) > 1 else "dense"
        return {"dense": start, "tuned": f"{start}, tuned", "pruned": "this model"}


def format_model_card(provenance: Provenance, plan: Plan, sites: Sequence[Site]) -> str:
    """README.md of the model folder: where the model comes from, what was removed, its scores, how to open it."""
    layouts = [provenance.config.layout, *(run.layout for run in provenance.history)]
    usage = _usage_section(layouts[-1])
    if any(f".{part}." in sites[0].name for part in ("language_model", "text_model")):  # inside a multimodal model
        usage = usage.replace("AutoModelForCausalLM", "AutoModelForImageTextToText")
    sections = [
        _front_matter(provenance),
        f"# {markdown_text(provenance.config.model)}, tuned and pruned",
        _summary(provenance, plan, sites),
        usage,
        _history_section(provenance.history),
        _size_section(provenance),
        _score_section(provenance),
        _provenance_section(provenance),
        _licence_section(provenance.licence),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _history_section(history: Sequence[PruningRun]) -> str:
    """One line for each run, where there was more than one."""
    lines = [
        f"{number}. {markdown_code(run.model)}: {100 * run.kept:.1f}% of the prunable parameters kept in {run.steps} "
        f"steps, layout {markdown_text(run.layout)}: {run.params / 1e6:,.1f} M parameters"
        + (f" (recipe SHA-256 {markdown_code(run.recipe_sha256)})" if run.recipe_sha256 else "")
        for number, run in enumerate(history, start=1)
    ]
    return "\n".join(["## History", "", "Pruned by these runs, one after the other:", "", *lines]) if lines[1:] else ""


def format_export_card(card: str, layout: str, description: str) -> str:
    """The model's card with the usage section of an export; sizes and scores remain those of the model."""
    head, heading, rest = card.partition("\n\n## ")
    head = head.partition("\n\n```python")[0]
    note = f"This is an export: {description}. Sizes and scores below are of the model that it was made from."
    return f"{head}\n\n{note}\n\n{ONNX_USAGE if layout == 'onnx' else _usage_section(layout)}{heading}{rest}"


def _front_matter(provenance: Provenance) -> str:
    """The YAML block that the Hugging Face Hub reads."""
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    model, licence = [*(run.model for run in provenance.history), provenance.config.model][0], provenance.licence
    model = model.partition("@")[0]  # without a revision
    if model.count("/") == 1 and model[0] not in "./~":
        values["base_model"] = model
    if licence.id:
        fields = {"license": licence.id, "license_name": licence.name, "license_link": licence.link}
        values |= {key: value for key, value in fields.items() if value}
    text: str = yaml.safe_dump(values | {"tags": ["prunetune", "pruning"]}, sort_keys=False)
    return f"---\n{text}---"


def _summary(provenance: Provenance, plan: Plan, sites: Sequence[Site]) -> str:
    share = kept_params(sites, plan) / sum(site.params for site in sites)
    kinds = {site.kind for site in sites}  # only these were pruned
    blocks = " and ".join(kind.label for kind in UnitKind if kind in kinds)
    cuts = provenance.manifest.cuts
    steps = ", ".join(f"{cut.step}" for cut in cuts)
    within = f", in {len(cuts)} cut{'s' * (len(cuts) > 1)} (before step {steps} of {provenance.config.train.steps})"
    base = markdown_code(provenance.config.model)
    return (
        f"Made by prunetune from {base}: tuned and pruned in one run{within if cuts else ''}.\n"
        f"{100 * share:.1f}% of the {blocks} parameters remain (layout {provenance.config.layout});\n"
        "`plan.json` names the units kept, `SHA256SUMS` the files as they were written."
    )


def _usage_section(layout: str) -> str:
    code = ", trust_remote_code=True" if layout == "per-layer" else ""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH"{code})
tokenizer = AutoTokenizer.from_pretrained("PATH"{code})
```{f"{chr(10)}{chr(10)}{REMOTE_CODE_NOTE}" if code else ""}"""


def _size_section(provenance: Provenance) -> str:
    dense, pruned = provenance.manifest.model, provenance.manifest.pruned
    if dense.bytes is None or pruned.bytes is None:
        return ""
    rows = [
        ("parameters", dense.params, pruned.params, "M"),
        ("of them in the decoder", dense.decoder_params, pruned.decoder_params, "M"),
        (f"weights on disk, {markdown_text(str(pruned.dtype))}", dense.bytes, pruned.bytes, "MB"),
    ]
    lines = [
        f"| {title} | {before / 1e6:,.1f} {unit} | {after / 1e6:,.1f} {unit} |"
        for title, before, after, unit in rows
        if before is not None and after is not None
    ]
    return "\n".join(["## Size", "", f"| | {provenance.titles['dense']} | this model |", "|---|---:|---:|", *lines])


def _score_section(provenance: Provenance) -> str:
    scores, titles, manifest = provenance.scores, provenance.titles, provenance.manifest
    if not scores:
        return ""
    names = [name for name in titles if any(name in row.scores for row in scores)]
    head = ["| task | metric | items |" + "".join(f" {titles[name]} |" for name in names)]
    head.append("|---|---|---:|" + "---:|" * len(names))
    lines = [
        f"| {markdown_text(row.task)} | {markdown_text(row.metric)} | {max(n for *_, n in row.scores.values())} |"
        + "".join(f" {_format_score(row.scores.get(name))} |" for name in names)
        for row in scores
    ]
    computed = f", computed in {markdown_text(manifest.dtype)}" if manifest.dtype else ""
    return "\n".join(["## Scores", "", f"On the run's test split{computed}, ± standard error.", "", *head, *lines])


def _format_score(score: tuple[float, float, int] | None) -> str:
    if score is None or math.isnan(score[0]):
        return "–"
    value, error, _ = score
    return f"{value:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def _provenance_section(provenance: Provenance) -> str:
    manifest = provenance.manifest
    made_with = [
        markdown_text(", ".join(f"{name} {version}" for name, version in environment.versions.items()))
        + (f"; prunetune at commit {markdown_code(environment.commit)}" if environment.commit else "")
        for environment in manifest.known_environments
    ]
    values, defaults = _option_values(provenance.config), _option_values(RunConfig())
    changed = ", ".join(
        markdown_code(f"{name}: {value}")
        for name, value in values.items()
        if value != defaults[name] and name not in UNPUBLISHED_OPTIONS
    )
    lines = ["## Provenance", ""]
    lines += [f"- {'made' if index == 0 else 'resumed'} with {text}" for index, text in enumerate(made_with)]
    lines += [f"- recipe, where it is not the default: {changed or 'all of it is'}"]
    chosen = manifest.learning_rate.description
    lines += [f"- learning rate {markdown_text(chosen)}"] if chosen else []
    lines += [f"- SHA-256 of the run's config.yaml: `{provenance.recipe_sha256}`"] if provenance.recipe_sha256 else []
    lines += [
        f"- SHA-256 of the data, {markdown_text(split)}: {markdown_code(digest)}"
        for split, digest in manifest.data.hashes.items()
    ]
    return "\n".join(lines)


def _option_values(config: RunConfig) -> dict[str, Any]:
    """The value of every option, by its dotted path."""
    values = {}
    for path in fields_by_path(RunConfig):
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name)
        values[path] = list(value) if isinstance(value, tuple) else value
    return values


def _licence_section(licence: LicenseInfo) -> str:
    if not licence.id:
        return "## Licence\n\nThe licence of the base model applies; the base does not name one where it was read."
    name = f" ({licence.name})" if licence.name else ""
    link = f", {licence.link}" if licence.link else ""
    return "## Licence\n\n" + markdown_text(
        f"That of the base model applies: {licence.id}{name}{link}, as {licence.where} says."
    )
