"""The report of a run: one HTML file that needs nothing else, with every part that the run's files allow."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from prunetune.evaluation.drift_results import drift_verdict, scores_by_kind
from prunetune.evaluation.results import Score, higher_is_better
from prunetune.report import (
    cuts,
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
from prunetune.report.run_folder import MODELS, RunFiles, get_number, read_run
from prunetune.report.speed import speed_rows
from prunetune.report.training_curves import ReportFigure
from prunetune.utils.files import write_text
from prunetune.utils.untrusted import printable

MODEL_NAMES = {"dense": "Dense, untuned", "tuned": "Dense, tuned", "pruned": "Pruned"}
FLIP_NAMES = {
    "lost": "right → wrong", "gained": "wrong → right",
    "right": "both right", "wrong": "both wrong", "open": "generated",
}  # fmt: skip
VALIDATION_COLUMNS = ("valid.accuracy", "guard.perplexity", "guard.accuracy")


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder, and return its path; an earlier page is replaced at once or not at all.

    Raises what `render_report` raises.
    """
    target, page = run_folder / "report.html", render_report(run_folder)
    write_text(target, page)
    return target


def render_report(run_folder: Path) -> str:
    """The page of a run, from the files that are there; the same files give the same page.

    Raises `RunFolderError` where the folder or its `config.yaml` is missing.
    """
    run = read_run(run_folder)
    if run.manifest.sizes:
        template, values = "size_frontier.html.j2", size_frontier.template_context(run_folder, run)
    else:
        template, values = "template.html.j2", _template_context(run)
    return printable(template_environment().get_template(template).render(values))


def template_environment(*folders: Path) -> jinja2.Environment:
    """An environment of the templates in these folders and in the report's, with filters for numbers."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {
        "count": formatting.count, "decimal": formatting.decimal, "share": formatting.share,
        "short": formatting.short, "size": formatting.size, "milliseconds": formatting.milliseconds,
        "ranges": kept_layers.format_ranges,
    }  # fmt: skip
    return environment


def _template_context(run: RunFiles) -> dict[str, Any]:
    manifest, evaluations = run.manifest, run.evaluations
    models = [name for name in MODELS if name in evaluations]
    headline, rows = scores.headline_score(evaluations), scores.metric_rows(evaluations)
    tasks: dict[str, list[scores.TaskMetricRow]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    kept = kept_layers.kept_by_kind(run.plan) if run.plan else {}
    attention, mlp = kept.get(kept_layers.GROUPS, {}), kept.get(kept_layers.CHANNELS, {})
    layers = sorted({*attention, *mlp})
    cut_rows = cuts.cut_rows(run)
    marks = {figures.MODEL_MARKS[name][0]: MODEL_NAMES[name].lower() for name in models}
    return {
        "run": run,
        "model_name": run.model_name,
        "verdict": summary.summary_line(run, headline),
        "answers": verdicts.run_verdicts(run, headline, rows),
        "tiles": summary.summary_tiles(run, headline),
        "headline": headline,
        "models": models,
        "model_names": MODEL_NAMES,
        "reference_name": scores.REFERENCE_NAMES.get(scores.reference_model(evaluations), ""),
        "tasks": tasks,
        "score_figures": _score_figures(rows, with_recovery="tuned" in evaluations),
        "score_legend": figures.legend_entries(marks),
        "drift": _drift_rows(run),
        "drift_models": [name for name in MODELS if run.drift and name in run.drift.tasks],
        "drift_verdict": drift_verdict(run.drift) if run.drift else "",
        "layers": layers,
        "attention": attention,
        "mlp": mlp,
        "groups": kept_layers.count_kept(attention.values()),
        "channels": kept_layers.count_kept(mlp.values()),
        "kept_figures": _kept_figures(kept, layers),
        "kept_legend": figures.legend_entries({svg.PRUNED: "kept", svg.REMOVED: "removed"}),
        "cuts": cut_rows,
        "cut_kinds": list(dict.fromkeys(kind for cut in cut_rows for kind in cut.removed)),
        "cut_neighbours": cuts.NEIGHBOURS,
        "heatmaps": decision_heatmap.heatmap_figures(run),
        "limits": [("", limit) for limit in verdicts.all_limits(manifest)],
        "limit_events": verdicts.limit_events(manifest),
        "failed": manifest.failed,
        "misaligned_widths": verdicts.misaligned_widths(manifest),
        "validation_scores": verdicts.validation_scores(manifest),
        "training_curves": training_curves.training_figures(run),
        "phases": training_curves.phase_legend(training_curves.phase_spans(run.metrics)),
        "validation": _validation_rows(run),
        "validation_columns": [
            name for name in VALIDATION_COLUMNS if any(get_number(line, name) is not None for line in run.validation)
        ],
        "samples": samples.select_samples(evaluations),
        "flip_names": FLIP_NAMES,
        "splits": run_details.split_summaries(manifest.data),
        "data_notes": run_details.data_notes(manifest.data),
        "environment": run_details.environment_rows(run),
        "command": manifest.command,
        "timings": run_details.timing_rows(manifest),
        "speeds": speed_rows(manifest),
        "cost": run_details.cost_rows(run),
    }


def _drift_rows(run: RunFiles) -> dict[str, dict[str, dict[str, Score]]]:
    """Kind of prompt -> metric -> model -> score."""
    rows: dict[str, dict[str, dict[str, Score]]] = {}
    for name, result in run.drift.tasks.items() if run.drift else ():
        for metric in ("kl", "agreement"):
            for kind, score in scores_by_kind(result.items, metric).items():
                rows.setdefault(kind, {"kl": {}, "agreement": {}})[metric][name] = score
    return {kind: row for kind, row in rows.items() if row["kl"]}


def _score_figures(rows: Sequence[scores.TaskMetricRow], *, with_recovery: bool) -> list[ReportFigure]:
    """What is left of the reference's score in each task, by the metric that stands for it; then each such metric."""
    drawn, by_metric = [], dict[str, list[scores.TaskMetricRow]]()
    for row in (row for row in rows if row.is_headline):
        by_metric.setdefault(row.metric, []).append(row)
    kept = [(row.task, *row.recovery_with_se) for row in rows if row.is_headline]
    kept = [share for share in kept if math.isfinite(share[1])]
    if with_recovery and kept:
        picture = figures.recovery_figure("Recovery by task; the table above has the numbers", kept)
        note = (
            "Of the reference's score, upside down for perplexity. Bars: one standard error of the paired difference."
        )
        drawn.append(ReportFigure("Recovery", picture, note=note))
    for metric, metric_rows in by_metric.items():
        better = "Higher is better." if higher_is_better(metric) else "Lower is better."
        title = metric_rows[0].label[:1].upper() + metric_rows[0].label[1:]
        label = f"{title} of each model by task; the table above has the numbers"
        picture = figures.scores_figure(label, metric_rows)
        drawn.append(ReportFigure(title, picture, note=f"{better} Bars: one standard error."))
    return drawn


def _kept_figures(
    by_kind: Mapping[str, Mapping[int, kept_layers.LayerKeptUnits]], layers: Sequence[int]
) -> list[ReportFigure]:
    """A figure for each kind of unit that the plan names."""
    drawn = []
    for kind, by_layer in by_kind.items():
        if not by_layer:
            continue
        (kept, units), name = kept_layers.count_kept(by_layer.values()), kind.replace("-", " ")
        if kind == kept_layers.GROUPS:
            label = f"{name} kept by layer: {kept} of {units}; the table below has the numbers"
            picture = figures.groups_figure(label, by_layer, layers)
        else:
            label = f"Share of {name} kept by layer: {kept} of {units}"
            picture = figures.unit_share_figure(kind.replace(" ", "-"), label, by_layer)
        drawn.append(ReportFigure(name[:1].upper() + name[1:], picture, note=f"{kept:,} of {units:,} are kept."))
    return drawn


def _validation_rows(run: RunFiles) -> list[dict[str, str]]:
    return [
        {
            "step": formatting.count(get_number(line, "step")),
            "phase": str(line.get("phase", "")),
            "nll": formatting.decimal(get_number(line, "nll")),
            "kept": formatting.share(get_number(line, "kept"), 1),
            **{name: formatting.decimal(get_number(line, name)) for name in VALIDATION_COLUMNS},
            "broken": "; ".join(map(str, broken)) if isinstance(broken := line.get("broken"), list) else "",
        }
        for line in run.validation
    ]
