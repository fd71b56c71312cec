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
    figures,
    formatting,
    kept_layers,
    run_details,
    samples,
    scores,
    size_frontier,
    summary,
    svg,
    training_curves,
    verdicts,
)
from prunetune.report.run_folder import MODELS, RunFiles, get_number, lookup, read_run
from prunetune.report.speed import speed_rows
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
    if size_frontier.has_multiple_sizes(run):
        write_text(target, _rendered("size_frontier.html.j2", size_frontier.template_context(run_folder, run)))
    else:
        write_text(target, render(run))
    return target


def render(run: RunFiles) -> str:
    """The page of one size as HTML text."""
    return _rendered("template.html.j2", _template_context(run))


def _rendered(template: str, content: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {
        "count": formatting.count, "decimal": formatting.decimal, "share": formatting.share, "runs": kept_layers.format_ranges,
    }  # fmt: skip
    return environment.get_template(template).render(content)


def _template_context(run: RunFiles) -> dict[str, Any]:
    headline = scores.headline_score(run.evaluations)
    rows = scores.metric_rows(run.evaluations)
    kept = kept_layers.layers_from_plan(run.plan) if run.plan else ()
    spans = training_curves.phase_spans(run.metrics)
    return {
        "run": run,
        "model_name": str(lookup(run.manifest, "model", "name") or lookup(run.config, "model") or ""),
        "verdict": summary.summary_line(run, headline),
        "answers": verdicts.run_verdicts(run, headline, rows),
        "tiles": summary.summary_tiles(run, headline),
        "headline": headline,
        "models": [name for name in MODELS if name in run.evaluations],
        "model_names": MODEL_NAMES,
        "reference_name": scores.REFERENCE_NAMES.get(scores.reference_model(run.evaluations), ""),
        "tasks": _by_task(rows),
        "score_figures": [*(_recovery_figures(rows) if "tuned" in run.evaluations else ()), *_score_figures(rows)],
        "score_legend": figures.legend_entries(
            {figures.MODEL_MARKS[name][0]: MODEL_NAMES[name].lower() for name in MODELS if name in run.evaluations}
        ),
        "layers": kept,
        "groups": kept_layers.count_kept(layer.attention for layer in kept),
        "channels": kept_layers.count_kept(layer.mlp for layer in kept),
        "kept_figures": _kept_figures(kept)
        + (_other_figures(kept_layers.other_units_by_layer(run.plan)) if run.plan else []),
        "heat": decision_heatmap.heatmap_figures(run),
        "limits": verdicts.limit_verdicts(run.manifest),
        "events": verdicts.limit_events(run.manifest),
        "watched": verdicts.monitored_metrics(run.manifest),
        "gates_failed": str(lookup(run.manifest, "failed") or ""),
        "uneven": verdicts.misaligned_widths(run.manifest),
        "kept_legend": figures.legend_entries({svg.PRUNED: "kept", svg.REMOVED: "removed"}),
        "course": training_curves.training_figures(run),
        "phases": training_curves.phase_legend(spans),
        "validation": _validation(run),
        "watched_names": [
            name for name in VALIDATION_METRICS if any(get_number(line, name) is not None for line in run.validation)
        ],
        "samples": samples.select_samples(run.evaluations),
        "flip_names": FLIP_NAMES,
        "splits": run_details.split_summaries(run.manifest),
        "data_notes": run_details.data_notes(run.manifest),
        "environment": run_details.environment_rows(run),
        "command": run_details.command_line(run.manifest),
        "timings": run_details.timing_rows(run.manifest),
        "speeds": speed_rows(run.manifest),
        "cost": run_details.cost_rows(run),
    }


def _by_task(rows: Sequence[scores.TaskMetricRow]) -> dict[str, list[scores.TaskMetricRow]]:
    tasks: dict[str, list[scores.TaskMetricRow]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    return tasks


def _recovery_figures(rows: Sequence[scores.TaskMetricRow]) -> list[training_curves.ReportFigure]:
    """How much of the reference is left in each task, by the metric that stands for it."""
    shares = [
        (row.task, *row.recovery_with_se) for row in rows if row.is_headline and math.isfinite(row.recovery_with_se[0])
    ]
    if not shares:
        return []
    label = "Recovery by task; the numbers stand in the table above"
    note = "Of the reference's score, upside down for perplexity. Bars: one standard error of the paired difference."
    return [training_curves.ReportFigure("Recovery", figures.recovery_figure(label, shares), note=note)]


def _score_figures(rows: Sequence[scores.TaskMetricRow]) -> list[training_curves.ReportFigure]:
    """The headline metrics, one figure for each."""
    metrics = dict.fromkeys(row.metric for row in rows if row.is_headline)
    return [_score_figure([row for row in rows if row.is_headline and row.metric == metric]) for metric in metrics]


def _score_figure(rows: Sequence[scores.TaskMetricRow]) -> training_curves.ReportFigure:
    better = "Higher is better." if higher_is_better(rows[0].metric) else "Lower is better."
    title = rows[0].label[:1].upper() + rows[0].label[1:]
    label = f"{title} of each model by task; the numbers stand in the table above"
    return training_curves.ReportFigure(
        title, figures.scores_figure(label, rows), note=f"{better} Bars: one standard error."
    )


def _kept_figures(kept: Sequence[kept_layers.KeptLayer]) -> list[training_curves.ReportFigure]:
    made = []
    if any(layer.attention for layer in kept):
        stay, units = kept_layers.count_kept(layer.attention for layer in kept)
        label = f"KV groups kept by layer: {stay} of {units}; the numbers stand in the table below"
        made.append(
            training_curves.ReportFigure(
                "KV groups", figures.groups_figure(label, kept), note=f"{stay:,} of {units:,} stay."
            )
        )
    if any(layer.mlp for layer in kept):
        stay, units = kept_layers.count_kept(layer.mlp for layer in kept)
        label = f"Share of MLP channels kept by layer: {stay} of {units}; the numbers stand in the table below"
        made.append(
            training_curves.ReportFigure(
                "MLP width", figures.widths_figure(label, kept), note=f"{stay:,} of {units:,} channels stay."
            )
        )
    return made


def _other_figures(
    others: Mapping[str, Mapping[int, kept_layers.LayerKeptUnits]],
) -> list[training_curves.ReportFigure]:
    made = []
    for kind, kept in others.items():
        stay, units = kept_layers.count_kept(kept.values())
        name = kind.replace("-", " ")
        label = f"Share of {name} kept by layer: {stay} of {units}"
        note = f"{stay:,} of {units:,} stay."
        made.append(
            training_curves.ReportFigure(name.capitalize(), figures.unit_share_figure(kind, label, kept), note=note)
        )
    return made


VALIDATION_METRICS = ("valid.accuracy", "guard.perplexity", "guard.accuracy")


def _validation(run: RunFiles) -> list[dict[str, str]]:
    return [
        {
            "step": formatting.count(get_number(line, "step")),
            "phase": str(line.get("phase", "")),
            "nll": formatting.decimal(get_number(line, "nll")),
            "kept": formatting.share(get_number(line, "kept"), 1),
            **{name: formatting.decimal(get_number(line, name)) for name in VALIDATION_METRICS},
            "broken": "; ".join(map(str, broken)) if isinstance(broken := line.get("broken"), list) else "",
        }
        for line in run.validation
    ]
