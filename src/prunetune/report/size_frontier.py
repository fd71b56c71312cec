"""The page of a run of several sizes: quality, size and speed of each against the dense model."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from prunetune.errors import RunFolderError
from prunetune.evaluation.results import higher_is_better
from prunetune.report import formatting, run_details, scores, svg, verdicts
from prunetune.report.figures import WIDTH, draw_mark, legend_entries
from prunetune.report.run_folder import RunFiles, get_mapping, get_number, read_run
from prunetune.report.scores import HeadlineScore
from prunetune.report.speed import speedup, speedup_text
from prunetune.report.summary import share_saved
from prunetune.report.training_curves import ReportFigure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class SizeRow:
    """One size of the run."""

    name: str
    run: RunFiles
    headline: HeadlineScore | None
    on_frontier: bool = False  # no other size is at least as good, as fast and as small

    @property
    def params(self) -> int | None:
        """Parameters of the whole model."""
        return self.run.manifest.pruned.params

    @property
    def speed_ratio(self) -> float | None:
        """Tokens a second over the dense model's, measured in turns."""
        facts = speedup(self.run.manifest, "throughput")
        return facts.median if facts else None

    @property
    def speed_text(self) -> str:
        """The ratio with its range; "" where it was not measured."""
        return speedup_text(speedup(self.run.manifest, "throughput"))

    @property
    def saved(self) -> float | None:
        """Share of the decoder's parameters that is gone."""
        return share_saved(self.run.manifest.model.decoder_params, self.run.manifest.pruned.decoder_params)

    @property
    def objectives(self) -> tuple[float, float, float] | None:
        """Quality, speed and smallness, more is better; None where one is not known."""
        if self.headline is None or self.speed_ratio is None or self.params is None:
            return None
        sign = 1 if higher_is_better(self.headline.metric) else -1
        return sign * self.headline.pruned, self.speed_ratio, -self.params


def load_size_rows(folder: Path, run: RunFiles) -> list[SizeRow]:
    """The sizes that are there, the largest first."""
    rows = []
    for size in map(Path, run.manifest.sizes):
        if size.is_absolute() or ".." in size.parts:
            continue
        try:
            files = read_run(folder / size)
        except RunFolderError:  # not begun yet
            continue
        rows.append(SizeRow(size.name, files, scores.headline_score(files.evaluations)))
    known = [row.objectives for row in rows if row.objectives is not None]
    beaten = [mine for mine in known if any(all(map(operator.ge, other, mine)) and other != mine for other in known)]
    return [replace(row, on_frontier=row.objectives in known and row.objectives not in beaten) for row in rows]


def template_context(folder: Path, run: RunFiles) -> dict[str, Any]:
    """The values that the template shows."""
    rows = load_size_rows(folder, run)
    headline = next((row.headline for row in rows if row.headline), None)
    reference_name = headline.reference_name if headline else "dense"
    require = get_mapping(run.config, "require")
    prompt, generate, batch = (formatting.count(get_number(require, key)) for key in ("prompt", "generate", "batch"))
    workload = f"prompts of up to {prompt} tokens, {generate} generated, batch {batch}, in turns with the dense model"
    return {
        "run": run,
        "model_name": run.model_name,
        "verdict": summary_line(rows),
        "rows": rows,
        "headline": headline,
        "dense": (rows[0].run if rows else run).manifest,  # the first size measured it, too
        "reference_name": reference_name,
        "figures": _frontier_figures(rows, headline),
        "legend_entries": legend_entries({svg.PRUNED: "sizes of this run", svg.TUNED: reference_name}),
        "tasks": _task_rows(rows),
        "names": [row.name for row in rows],
        "limits": [(row.name, limit) for row in rows for limit in verdicts.all_limits(row.run.manifest)],
        "failed": [(row.name, row.run.manifest.failed) for row in rows if row.run.manifest.failed],
        "run_failed": run.manifest.failed,
        "costs": _cost_rows(run, rows),
        "splits": run_details.split_summaries(run.manifest.data),
        "environment": run_details.environment_rows(run),
        "command": run.manifest.command,
        "workload": workload,
    }


def summary_line(rows: Sequence[SizeRow]) -> str:
    """All sizes in a sentence."""
    saved = [formatting.share(row.saved) for row in rows if row.saved is not None]
    if not saved:
        return "Several sizes from one run: no results yet"
    words = f"{len(saved)} sizes from one run, decoder {_first_to_last(saved)} smaller"
    headlines = [row.headline for row in rows if row.headline]
    if headlines:
        label = f"{'mean ' if headlines[0].tasks > 1 else ''}{headlines[0].label}"
        words += f"; {label} {_first_to_last([formatting.decimal(headline.pruned) for headline in headlines])}"
    recoveries = [formatting.share(headline.recovery) for headline in headlines if headline.recovery is not None]
    if recoveries:
        words += f", {_first_to_last(recoveries)} of the {headlines[0].reference_name} model"
    return words


def _first_to_last(words: Sequence[str]) -> str:
    return words[0] if words[0] == words[-1] else f"{words[0]} to {words[-1]}"


def _task_rows(rows: Sequence[SizeRow]) -> list[tuple[str, str, list[scores.TaskMetricRow | None]]]:
    """(task, metric, the row of each size) of the metric that stands for each task."""
    by_size = [{row.task: row for row in scores.metric_rows(size.run.evaluations) if row.is_headline} for size in rows]
    labels = {row.task: row.label for by_task in reversed(by_size) for row in by_task.values()}
    tasks = dict.fromkeys(task for by_task in by_size for task in by_task)
    return [(task, labels[task], [by_task.get(task) for by_task in by_size]) for task in tasks]


def _cost_rows(run: RunFiles, rows: Sequence[SizeRow]) -> list[tuple[str, str, str]]:
    """(what, steps, wall time), the sum last."""
    shared = run.manifest.timings
    costs: list[tuple[str, str, float | None]] = [("teacher, for all sizes", "", shared.get("teacher"))]
    for row in rows:
        steps = formatting.count(get_number(row.run.config, "train", "steps"))
        costs.append((f"size {row.name}: tune", steps, row.run.manifest.timings.get("tune and prune")))
    others = [row.run.manifest.timings.get(stage) for row in rows for stage in ("cut and check", "evaluate")]
    costs.append(("cut, check and evaluate", "", math.fsum(seconds for seconds in others if seconds is not None)))
    costs += [(f"{stage}, all models", "", shared[stage]) for stage in ("evaluate", "bench") if stage in shared]
    total = math.fsum(seconds for _, _, seconds in costs if seconds is not None)
    return [(name, steps, formatting.duration(seconds)) for name, steps, seconds in [*costs, ("total", "", total)]]


def _frontier_figures(rows: Sequence[SizeRow], headline: HeadlineScore | None) -> list[ReportFigure]:
    if headline is None:
        return []
    label = f"{'Mean ' if headline.tasks > 1 else ''}{headline.label}"
    label = label[:1].upper() + label[1:]
    by_size = [(row, row.params / 1e6) for row in rows if row.params is not None]
    by_speed = [(row, speed) for row in rows if (speed := row.speed_ratio) is not None]
    better = "Higher is better." if higher_is_better(headline.metric) else "Lower is better."
    note = f"{better} Bars: one standard error. Dashed: the {headline.reference_name} model."
    x_axes = [("size", "parameters", "parameters, millions", by_size)]
    x_axes += [("speed", "speed", "times the dense model's tokens a second", by_speed)]
    return [
        ReportFigure(
            f"{label} and {name}",
            _draw_frontier(f"frontier-{name}", f"{label} over {over}", points, headline, x_label),
            note=note,
        )
        for name, over, x_label, points in x_axes
        if points
    ]


def _draw_frontier(
    name: str, label: str, points: Sequence[tuple[SizeRow, float]], headline: HeadlineScore, x_label: str
) -> Markup:
    """Each size a mark with its name and its standard error; the reference a dashed line."""

    def draw(axes: Axes) -> None:
        axes.locator_params(axis="x", nbins=5)  # sizes that are nearly equal have long numbers
        marks = [(x, row.headline.pruned, row.headline.pruned_se, row.name) for row, x in points if row.headline]
        axes.plot([x for x, *_ in marks], [quality for _, quality, *_ in marks], color=svg.PRUNED, linewidth=1)
        for x, quality, error, size in marks:
            draw_mark(axes, x, quality, yerr=error)
            offset: Any = {"xytext": (7, 5), "textcoords": "offset points"}
            axes.annotate(size, (x, quality), color=svg.INK, **offset)
        axes.axhline(headline.reference, color=svg.TUNED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.margins(x=0.14, y=0.14)
        axes.grid(visible=True, axis="both")
        axes.set_xlabel(x_label)

    return svg.render_svg(name, f"{label}; the table above has the numbers", WIDTH, 2.6, draw)
