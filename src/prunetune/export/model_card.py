"""The model card (README.md) of a checkpoint and of an export."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import yaml

from prunetune.config.fields import fields_by_path
from prunetune.config.recipe import RunConfig
from prunetune.data.sources import hub_dataset
from prunetune.manifest import Manifest
from prunetune.model.provenance import LicenseInfo, PruningRun, hub_model, public_model_name
from prunetune.plan import Plan
from prunetune.pruning.units import Site, UnitKind, kept_params, prunable_params, removed_params
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
# They describe the machine and the rows of the run, not the model; nor do paths, see `_published_options`.
UNPUBLISHED_OPTIONS = re.compile(r"(out|device|trust_remote_code|data\.(columns\..*|group)|report\..*|compare\..*)")


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
    config, manifest, history, licence = provenance.config, provenance.manifest, provenance.history, provenance.licence
    titles, sections = provenance.titles, []

    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}  # for the hub
    if base := hub_model([*(run.model for run in history), config.model][0]):
        values["base_model"] = base
    if licence.id:
        fields = {"license": licence.id, "license_name": licence.name, "license_link": licence.link}
        values |= {key: value for key, value in fields.items() if value}
    sections.append(f"---\n{yaml.safe_dump(values | {'tags': ['prunetune', 'pruning']}, sort_keys=False)}---")
    name = public_model_name(config.model)
    sections.append(f"# {markdown_text(name[:1].upper() + name[1:] if ' ' in name else name)}, tuned and pruned")

    kinds, cuts = {site.kind for site in sites}, manifest.cuts
    blocks = " and ".join(kind.label for kind in UnitKind if kind in kinds)  # only these were pruned
    before = ", ".join(f"{cut.step}" for cut in cuts)
    dense, vocabulary = manifest.model, ""
    if dense.tokens and dense.kept_tokens:
        vocabulary = (
            f"{dense.kept_tokens:,} of {dense.tokens:,} tokens remain. The dense model was scored with these tokens, "
            "too; its sizes are with all.\n"
        )
    remain = f"{100 * kept_params(sites, plan) / prunable_params(sites):.1f}% of the {blocks} parameters"
    if whole := dense.params:
        left = (dense.reduced_params or whole) - removed_params(sites, plan)
        remain = f"{100 * left / whole:.1f}% of all parameters remain, and {remain}"
    else:
        remain += " remain"
    within = f", in {len(cuts)} cut{'s' * (len(cuts) > 1)} (before step {before} of {config.train.steps})"
    sections.append(
        f"Made by prunetune from {_named(config.model)}: tuned and pruned in one run{within if cuts else ''}.\n"
        f"{remain} (layout {config.layout}).\n{vocabulary}"
        "`plan.json` names the units kept, `SHA256SUMS` the files as they were written."
    )
    usage = _usage_section([config.layout, *(run.layout for run in history)][-1])
    if any(f".{part}." in sites[0].name for part in ("language_model", "text_model")):  # inside a multimodal model
        usage = usage.replace("AutoModelForCausalLM", "AutoModelForImageTextToText")
    sections.append(usage)

    if len(history) > 1:
        lines = ["## History", "", "Pruned by these runs, one after the other:", ""]
        for number, run in enumerate(history, start=1):
            recipe = f" (recipe SHA-256 {markdown_code(run.recipe_sha256)})" if run.recipe_sha256 else ""
            lines.append(
                f"{number}. {_named(run.model)}: {100 * run.kept:.1f}% of the prunable parameters kept in "
                f"{run.steps} steps, layout {markdown_text(run.layout)}: {run.params / 1e6:,.1f} M parameters{recipe}"
            )
        sections.append("\n".join(lines))

    pruned = manifest.pruned
    if dense.bytes is not None and pruned.bytes is not None:
        lines = ["## Size", "", f"| | {titles['dense']} | this model |", "|---|---:|---:|"]
        for title, old, new, unit in (
            ("parameters", dense.params, pruned.params, "M"),
            ("of them in the decoder", dense.decoder_params, pruned.decoder_params, "M"),
            (f"weights on disk, {markdown_text(str(pruned.dtype))}", dense.bytes, pruned.bytes, "MB"),
        ):
            if old is not None and new is not None:
                lines.append(f"| {title} | {old / 1e6:,.1f} {unit} | {new / 1e6:,.1f} {unit} |")
        sections.append("\n".join(lines))

    if scores := provenance.scores:
        computed = f", computed in {markdown_text(manifest.dtype)}" if manifest.dtype else ""
        lines = ["## Scores", "", f"On the run's test split{computed}, ± standard error.", ""]
        names = [name for name in titles if any(name in row.scores for row in scores)]
        lines.append("| task | metric | items |" + "".join(f" {titles[name]} |" for name in names))
        lines.append("|---|---|---:|" + "---:|" * len(names))
        for row in scores:
            items = max(n for *_, n in row.scores.values())
            line = f"| {markdown_text(row.task)} | {markdown_text(row.metric)} | {items} |"
            for name in names:
                value, error, _ = row.scores.get(name, (math.nan, math.nan, 0))
                plus_minus = "" if math.isnan(error) else f" ± {error:.3f}"
                line += " – |" if math.isnan(value) else f" {value:.3f}{plus_minus} |"
            lines.append(line)
        sections.append("\n".join(lines))

    lines = ["## Provenance", ""]
    for index, environment in enumerate(manifest.known_environments):
        versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
        commit = f"; prunetune at commit {markdown_code(environment.commit)}" if environment.commit else ""
        lines.append(f"- {'made' if index == 0 else 'resumed'} with {markdown_text(versions)}{commit}")
    changed = ", ".join(markdown_code(f"{name}: {value}") for name, value in _published_options(config).items())
    lines.append(f"- recipe, where it is not the default, without paths: {changed or 'all of it is'}")
    if chosen := manifest.learning_rate.description:
        lines.append(f"- learning rate {markdown_text(chosen)}")
    if provenance.recipe_sha256:
        lines.append(f"- SHA-256 of the run's config.yaml: `{provenance.recipe_sha256}`")
    for split, digest in manifest.data.hashes.items():
        lines.append(f"- SHA-256 of the data, {markdown_text(split)}: {markdown_code(digest)}")
    sections.append("\n".join(lines))

    terms = "The licence of the base model applies; the base does not name one where it was read."
    if licence.id:
        name, link = licence.name and f" ({licence.name})", licence.link and f", {licence.link}"
        terms = markdown_text(f"That of the base model applies: {licence.id}{name}{link}, as {licence.where} says.")
    sections.append(f"## Licence\n\n{terms}")
    return "\n\n".join(sections) + "\n"


def format_export_card(card: str, layout: str, description: str) -> str:
    """The model's card with the usage section of an export; sizes and scores remain those of the model."""
    head, heading, rest = card.partition("\n\n## ")
    head = head.partition("\n\n```python")[0]
    note = f"This is an export: {description}. Sizes and scores below are of the model that it was made from."
    return f"{head}\n\n{note}\n\n{ONNX_USAGE if layout == 'onnx' else _usage_section(layout)}{heading}{rest}"


def _usage_section(layout: str) -> str:
    code = ", trust_remote_code=True" if layout == "per-layer" else ""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH"{code})
tokenizer = AutoTokenizer.from_pretrained("PATH"{code})
```{f"{chr(10)}{chr(10)}{REMOTE_CODE_NOTE}" if code else ""}"""


def _named(model: str) -> str:
    name = public_model_name(model)
    return name if " " in name else markdown_code(name)


def _published_options(config: RunConfig) -> dict[str, Any]:
    """The options that differ from their defaults, by dotted path; of models and sources, what is on the hub."""
    published, defaults = {}, RunConfig()
    for path, item in fields_by_path(RunConfig).items():
        value, is_public = attrgetter(path)(config), not UNPUBLISHED_OPTIONS.fullmatch(path)
        if path == "model":
            is_public = public_model_name(value) == value
        elif item.metadata["is_path"]:
            value = tuple(source for source in value if hub_dataset(source)) if isinstance(value, tuple) else ""
            is_public = is_public and bool(value)
        if is_public and value != attrgetter(path)(defaults):
            published[path] = list(value) if isinstance(value, tuple) else value
    return published
