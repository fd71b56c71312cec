"""The page: every part that the run's files allow, in one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from prunetune.evaluation.results import higher_is_better
from prunetune.report import (
    decision_heatmap,
    facts,
    figures,
    layers,
    samples,
    scores,
    size_frontier,
    summary,
    svg,
    text,
    training_curves,
    verdicts,
)
from prunetune.report.run_folder import MODELS, RunFiles, lookup, number, read_run
from prunetune.report.speed import speeds
from prunetune.utils.files import write_text

MODEL_NAMES = {"dense": "Dense, untuned", "tuned": "Dense, tuned", "pruned": "Pruned"}
FLIP_NAMES = {
    "lost": "right → wrong",
    "gained": "wrong → right",
    "right": "both right",
    "wrong": "both wrong",
    "open": "generated",
}


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder from the files that are there, and return its path.

    The same files give the same bytes; an earlier page is replaced at once or not at all.
    Raises `RunFolderError` where the folder or its `config.yaml` is missing.
    """
    target, run = run_folder / "report.html", read_run(run_folder)
    if size_frontier.is_of_sizes(run):
        write_text(target, _rendered("size_frontier.html.j2", size_frontier.content(run_folder, run)))
    else:
        write_text(target, render(run))
    return target


def render(run: RunFiles) -> str:
    """The page of one size as HTML text."""
    return _rendered("template.html.j2", _content(run))


def _rendered(template: str, content: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {
        "count": text.count, "decimal": text.decimal, "share": text.share, "runs": layers.runs,
    }  # fmt: skip
    return environment.get_template(template).render(content)


def _content(run: RunFiles) -> dict[str, Any]:
    headline = scores.headline(run.evaluations)
    rows = scores.rows(run.evaluations)
    kept = layers.layers_of(run.plan) if run.plan else ()
    spans = training_curves.spans_of(run.metrics)
    return {
        "run": run,
        "model_name": str(lookup(run.manifest, "model", "name") or lookup(run.config, "model") or ""),
        "verdict": summary.verdict(run, headline),
        "answers": verdicts.answers(run, headline, rows),
        "tiles": summary.tiles(run, headline),
        "headline": headline,
        "models": [name for name in MODELS if name in run.evaluations],
        "model_names": MODEL_NAMES,
        "reference_name": scores.REFERENCE_NAMES.get(scores.reference_of(run.evaluations), ""),
        "tasks": _by_task(rows),
        "score_figures": [*(_recovery_figures(rows) if "tuned" in run.evaluations else ()), *_score_figures(rows)],
        "score_legend": figures.legend(
            {figures.MODEL_MARKS[name][0]: MODEL_NAMES[name].lower() for name in MODELS if name in run.evaluations}
        ),
        "layers": kept,
        "groups": layers.total(layer.attention for layer in kept),
        "channels": layers.total(layer.mlp for layer in kept),
        "kept_figures": _kept_figures(kept) + (_other_figures(layers.others_of(run.plan)) if run.plan else []),
        "heat": decision_heatmap.figures(run),
        "limits": verdicts.limits(run.manifest),
        "events": verdicts.events(run.manifest),
        "watched": verdicts.watched(run.manifest),
        "gates_failed": str(lookup(run.manifest, "failed") or ""),
        "uneven": verdicts.uneven(run.manifest),
        "kept_legend": figures.legend({svg.PRUNED: "kept", svg.GONE: "removed"}),
        "course": training_curves.figures(run),
        "phases": training_curves.phase_legend(spans),
        "validation": _validation(run),
        "watched_names": [name for name in WATCHED if any(number(line, name) is not None for line in run.validation)],
        "samples": samples.choose(run.evaluations),
        "flip_names": FLIP_NAMES,
        "splits": facts.splits(run.manifest),
        "data_notes": facts.data_notes(run.manifest),
        "environment": facts.environment(run),
        "command": facts.command(run.manifest),
        "timings": facts.timings(run.manifest),
        "speeds": speeds(run.manifest),
        "cost": facts.cost(run),
    }


def _by_task(rows: Sequence[scores.Row]) -> dict[str, list[scores.Row]]:
    tasks: dict[str, list[scores.Row]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    return tasks


def _recovery_figures(rows: Sequence[scores.Row]) -> list[training_curves.Figure]:
    """How much of the reference is left in each task, by the metric that stands for it."""
    shares = [(row.task, *row.left) for row in rows if row.headline and math.isfinite(row.left[0])]
    if not shares:
        return []
    label = "Recovery by task; the numbers stand in the table above"
    note = "Of the reference's score, upside down for perplexity. Bars: one standard error of the paired difference."
    return [training_curves.Figure("Recovery", figures.recovery_figure(label, shares), note=note)]


def _score_figures(rows: Sequence[scores.Row]) -> list[training_curves.Figure]:
    """The headline metrics, one figure for each."""
    metrics = dict.fromkeys(row.metric for row in rows if row.headline)
    return [_score_figure([row for row in rows if row.headline and row.metric == metric]) for metric in metrics]


def _score_figure(rows: Sequence[scores.Row]) -> training_curves.Figure:
    better = "Higher is better." if higher_is_better(rows[0].metric) else "Lower is better."
    title = rows[0].label[:1].upper() + rows[0].label[1:]
    label = f"{title} of each model by task; the numbers stand in the table above"
    return training_curves.Figure(title, figures.scores_figure(label, rows), note=f"{better} Bars: one standard error.")


def _kept_figures(kept: Sequence[layers.Layer]) -> list[training_curves.Figure]:
    made = []
    if any(layer.attention for layer in kept):
        stay, units = layers.total(layer.attention for layer in kept)
        label = f"KV groups kept by layer: {stay} of {units}; the numbers stand in the table below"
        made.append(
            training_curves.Figure("KV groups", figures.groups_figure(label, kept), note=f"{stay:,} of {units:,} stay.")
        )
    if any(layer.mlp for layer in kept):
        stay, units = layers.total(layer.mlp for layer in kept)
        label = f"Share of MLP channels kept by layer: {stay} of {units}; the numbers stand in the table below"
        made.append(
            training_curves.Figure(
                "MLP width", figures.widths_figure(label, kept), note=f"{stay:,} of {units:,} channels stay."
            )
        )
    return made


def _other_figures(others: Mapping[str, Mapping[int, layers.Kept]]) -> list[training_curves.Figure]:
    made = []
    for kind, kept in others.items():
        stay, units = layers.total(kept.values())
        name = kind.replace("-", " ")
        label = f"Share of {name} kept by layer: {stay} of {units}"
        note = f"{stay:,} of {units:,} stay."
        made.append(training_curves.Figure(name.capitalize(), figures.others_figure(kind, label, kept), note=note))
    return made


WATCHED = ("valid.accuracy", "guard.perplexity", "guard.accuracy")


def _validation(run: RunFiles) -> list[dict[str, str]]:
    return [
        {
            "step": text.count(number(line, "step")),
            "phase": str(line.get("phase", "")),
            "nll": text.decimal(number(line, "nll")),
            "kept": text.share(number(line, "kept"), 1),
            **{name: text.decimal(number(line, name)) for name in WATCHED},
            "broken": "; ".join(map(str, broken)) if isinstance(broken := line.get("broken"), list) else "",
        }
        for line in run.validation
    ]
