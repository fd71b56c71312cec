"""The model card of a run: written with the checkpoint, and again once the scores are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prunetune.config.recipe import RunConfig
from prunetune.evaluation.results import Evaluation, headline_metric
from prunetune.export.model_card import Provenance, ScoreRow, format_model_card
from prunetune.model.history import PruningRun, has_per_layer_config, read_history
from prunetune.model.license import read_license
from prunetune.plan import Plan
from prunetune.pruning.units import Site, effective_layout, kept_params
from prunetune.runs.folder import RunFolder
from prunetune.utils.files import sha256, write_text

MODEL_NAMES = ("dense", "tuned", "pruned")


def render_card(folder: RunFolder, config: RunConfig, plan: Plan, sites: Sequence[Site]) -> str:
    """The text of the card, from what the run folder holds so far."""
    history = pruning_history(folder, config, plan, sites)
    origin = Provenance(
        config=config,
        manifest=folder.read_manifest(),
        licence=read_license(config.model),
        scores=card_scores(folder),
        recipe_sha256=history[-1].recipe_sha256,
        history=history,
    )
    return format_model_card(origin, plan, sites)


def pruning_history(folder: RunFolder, config: RunConfig, plan: Plan, sites: Sequence[Site]) -> tuple[PruningRun, ...]:
    """The runs that made the model, this one last."""
    recipe, dense = folder.path / "config.yaml", folder.read_manifest().model
    dense_params = dense.reduced_params or dense.params or 0
    run = PruningRun(
        model=config.model,
        layout="per-layer" if has_per_layer_config(config.model) else effective_layout(config.layout, sites),
        kept=kept_params(sites, plan) / sum(site.params for site in sites),
        params=dense_params - sum(site.params for site in sites) + kept_params(sites, plan),
        steps=config.train.steps,
        recipe_sha256=sha256(recipe) if recipe.is_file() else "",
    )
    return (*read_history(config.model), run)


def rewrite_card(folder: RunFolder, config: RunConfig, sites: Sequence[Site]) -> Path:
    """Write the finished model's card again, now with scores; `SHA256SUMS` does not list the card."""
    path = folder.model_folder / "README.md"
    write_text(path, render_card(folder, config, Plan.load(folder.plan_file), sites))
    return path


def card_scores(folder: RunFolder) -> tuple[ScoreRow, ...]:
    """Headline metric and NLL of each task, of the models scored so far; empty until the pruned one is."""
    files = {name: folder.evaluation_file(name) for name in MODEL_NAMES}
    evaluations = {
        name: Evaluation.from_json(file.read_text("utf-8")) for name, file in files.items() if file.is_file()
    }
    if "pruned" not in evaluations:
        return ()
    rows = []
    for task, result in evaluations["pruned"].tasks.items():
        for metric in dict.fromkeys((headline_metric(result), "nll")):
            scores = {
                name: evaluation.tasks[task].scores[metric]
                for name, evaluation in evaluations.items()
                if task in evaluation.tasks and metric in evaluation.tasks[task].scores
            }
            if scores:
                rows.append(ScoreRow(task, metric, {name: (s.value, s.se, s.n) for name, s in scores.items()}))
    return tuple(rows)
