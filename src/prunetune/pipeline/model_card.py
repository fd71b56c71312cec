"""The model card of a run: written with the checkpoint, and again when its scores are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prunetune.config.recipe import RunConfig
from prunetune.evaluation.results import Evaluation, headline_metric
from prunetune.export.card import Provenance, ScoreRow, format_model_card
from prunetune.model.license import read_license
from prunetune.plan import Plan
from prunetune.pruning.sites import Site
from prunetune.runs.folder import RunFolder
from prunetune.utils.files import sha256, write_text

MODEL_NAMES = ("dense", "tuned", "pruned")


def render_card(folder: RunFolder, config: RunConfig, plan: Plan, sites: Sequence[Site]) -> str:
    """The card by what the run folder holds so far."""
    recipe = folder.path / "config.yaml"
    origin = Provenance(
        config=config,
        manifest=folder.read_manifest(),
        licence=read_license(config.model),
        scores=card_scores(folder),
        recipe_sha256=sha256(recipe) if recipe.is_file() else "",
    )
    return format_model_card(origin, plan, sites)


def rewrite_card(folder: RunFolder, config: RunConfig, sites: Sequence[Site]) -> Path:
    """Put the scores into the finished model's card; `SHA256SUMS` leaves the card out."""
    path = folder.model_folder / "README.md"
    write_text(path, render_card(folder, config, Plan.load(folder.plan_file), sites))
    return path


def card_scores(folder: RunFolder) -> tuple[ScoreRow, ...]:
    """The headline metric of each task, and its NLL, of the models scored so far; none before the pruned one is."""
    files = {name: folder.evaluation_file(name) for name in MODEL_NAMES}
    found = {name: Evaluation.from_json(file.read_text("utf-8")) for name, file in files.items() if file.is_file()}
    if "pruned" not in found:
        return ()
    rows = []
    for task, result in found["pruned"].tasks.items():
        for metric in dict.fromkeys((headline_metric(result), "nll")):
            scores = {
                name: scored.tasks[task].scores[metric]
                for name, scored in found.items()
                if task in scored.tasks and metric in scored.tasks[task].scores
            }
            if scores:
                rows.append(ScoreRow(task, metric, {name: (s.value, s.se, s.n) for name, s in scores.items()}))
    return tuple(rows)
