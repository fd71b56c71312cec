"""The page of a run of several sizes: quality, size and speed of each beside the dense model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from prunetune.errors import RunFolderError
from prunetune.evaluation.results import Score, higher_is_better
from prunetune.report import formatting, run_details, scores, svg, verdicts
from prunetune.report.figures import WIDTH, legend_entries
from prunetune.report.run_folder import RunFiles, get_mapping, get_number, lookup, read_run
from prunetune.report.scores import HeadlineScore
from prunetune.report.speed import interleaved_ratio
from prunetune.report.training_curves import ReportFigure

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

SPEEDS = {"throughput": "tokens a second", "prefill": "first token", "decode": "decode step"}


@dataclass(frozen=True)
class SizeRow:
    """One size."""

    name: str
    run: RunFiles
    headline: HeadlineScore | None
    on_frontier: bool = False  # no other size is as good, as fast and as small, and better in one of them

    @property
    def quality(self) -> float | None:
        """Mean of the headline metric."""
        return self.headline.pruned if self.headline else None

    @property
    def params(self) -> float | None:
        """Of the whole model."""
        return get_number(self.run.manifest, "pruned", "params")

    def speed_ratio(self, speed: str = "throughput") -> float | None:
        """How many times the dense model's speed."""
        found = interleaved_ratio(self.run.manifest, speed)
        return found.ratio if found else None

    @property
    def failed(self) -> str:
        """What gate it is outside of, in words."""
        return str(lookup(self.run.manifest, "failed") or "")


def has_multiple_sizes(run: RunFiles) -> bool:
    """Whether a run made several sizes."""
    return isinstance(lookup(run.manifest, "sizes"), list)


def load_size_rows(folder: Path, run: RunFiles) -> list[SizeRow]:
    """The sizes that are there, the largest first."""
    found = []
    for place in map(str, run.manifest["sizes"]):
        if Path(place).is_absolute() or ".." in Path(place).parts:
            continue
        try:
            size = read_run(folder / place)
        except RunFolderError:  # not begun yet
            continue
        found.append(SizeRow(Path(place).name, size, scores.headline_score(size.evaluations)))
    return [SizeRow(row.name, row.run, row.headline, _is_on_frontier(row, found)) for row in found]


def _is_on_frontier(row: SizeRow, rows: Sequence[SizeRow]) -> bool:
    mine = _objectives(row)
    if mine is None:
        return False
    others = [merits for other in rows if other is not row and (merits := _objectives(other)) is not None]
    return not any(all(a >= b for a, b in zip(other, mine, strict=True)) and other != mine for other in others)


def _objectives(row: SizeRow) -> tuple[float, float, float] | None:
    """Quality, speed and smallness; more is better."""
    speed, params = row.speed_ratio(), row.params
    if row.headline is None or row.quality is None or speed is None or params is None:
        return None
    return (row.quality if higher_is_better(row.headline.metric) else -row.quality), speed, -params


def template_context(folder: Path, run: RunFiles) -> dict[str, Any]:
    """What the template shows."""
    rows = load_size_rows(folder, run)
    known = next((row.headline for row in rows if row.headline), None)
    return {
        "run": run,
        "model_name": str(lookup(run.manifest, "model", "name") or lookup(run.config, "model") or ""),
        "verdict": summary_line(rows),
        "rows": [_table_row(row) for row in rows],
        "headline": known,
        "dense": _dense(run, rows),
        "figures": _figures(rows, known),
        "legend": legend_entries(
            {svg.PRUNED: "sizes of this run", svg.TUNED: f"{known.reference_name if known else 'dense'}"}
        ),
        "tasks": _tasks(rows),
        "names": [row.name for row in rows],
        "limits": [(row.name, limit) for row in rows for limit in verdicts.limit_verdicts(row.run.manifest)],
        "failed": [(row.name, row.failed) for row in rows if row.failed],
        "stopped": str(lookup(run.manifest, "failed") or ""),
        "costs": _costs(run, rows),
        "splits": run_details.split_summaries(run.manifest),
        "environment": run_details.environment_rows(run),
        "command": run_details.command_line(run.manifest),
        "settings": _settings(run),
    }


def summary_line(rows: Sequence[SizeRow]) -> str:
    """All sizes in a sentence."""
    saved = [share for row in rows if (share := _saved(row)) is not None]
    if not saved:
        return "Several sizes from one run: no results yet"
    words = f"{len(saved)} sizes from one run, decoder {_range(saved)} smaller"
    known = [row.headline for row in rows if row.headline]
    if known:
        label = f"{'mean ' if known[0].tasks > 1 else ''}{known[0].label}"
        words += f"; {label} {_span([formatting.decimal(one.pruned) for one in known])}"
        left = [one.recovery for one in known if one.recovery is not None]
        words += f", {_range(left)} of the {known[0].reference_name} model" if left else ""
    return words


def _range(shares: Sequence[float]) -> str:
    return _span([formatting.share(share) for share in shares])


def _span(words: Sequence[str]) -> str:
    return words[0] if words[0] == words[-1] else f"{words[0]} to {words[-1]}"


def _saved(row: SizeRow) -> float | None:
    dense, pruned = (get_number(row.run.manifest, model, "decoder_params") for model in ("model", "pruned"))
    return 1 - pruned / dense if dense and pruned is not None else None


def _table_row(row: SizeRow) -> dict[str, Any]:
    manifest, saved = row.run.manifest, _saved(row)
    measured = {name: get_mapping(manifest, "gain", "figures", name) for name in SPEEDS}
    prefill, decode = (get_number(measured[name], "pruned") for name in ("prefill", "decode"))
    return {
        "name": row.name,
        "kept": formatting.share(None if saved is None else 1 - saved, 1),
        "params": formatting.short(row.params),
        "bytes": formatting.size(get_number(manifest, "pruned", "bytes")),
        "quality": _quality(row.headline),
        "recovery": formatting.share(row.headline.recovery, 1)
        if row.headline and row.headline.recovery is not None
        else "–",
        "speed": str(interleaved_ratio(manifest, "throughput") or formatting.NOT_KNOWN),
        "prefill": formatting.decimal(None if prefill is None else 1000 * prefill),
        "decode": formatting.decimal(None if decode is None else 1000 * decode),
        "front": row.on_frontier,
        "passed": not row.failed,
        "report": f"sizes/{row.name}/report.html",
    }


def _quality(headline: HeadlineScore | None) -> Score | None:
    return Score(headline.pruned, headline.pruned_se, headline.tasks) if headline else None


def _dense(run: RunFiles, rows: Sequence[SizeRow]) -> dict[str, str]:
    """The row that all sizes are held against."""
    known = next((row.headline for row in rows if row.headline), None)
    measured = get_mapping(rows[0].run.manifest, "gain", "figures") if rows else {}
    waits = {name: get_number(measured, name, "dense") for name in ("prefill", "decode")}
    first = rows[0].run.manifest if rows else run.manifest
    return {
        "name": known.reference_name if known else "dense",
        "params": formatting.short(get_number(first, "model", "params")),
        "bytes": formatting.size(get_number(first, "model", "bytes")),
        "quality": formatting.decimal(known.reference if known else None),
        **{name: formatting.decimal(None if wait is None else 1000 * wait) for name, wait in waits.items()},
    }


def _tasks(rows: Sequence[SizeRow]) -> list[tuple[str, str, list[scores.TaskMetricRow | None]]]:
    """(task, metric, the row of each size) of the metric that stands for each task."""
    found = [{row.task: row for row in scores.metric_rows(size.run.evaluations) if row.is_headline} for size in rows]
    tasks = dict.fromkeys(task for size in found for task in size)
    return [
        (task, next(size[task].label for size in found if task in size), [size.get(task) for size in found])
        for task in tasks
    ]


def _costs(run: RunFiles, rows: Sequence[SizeRow]) -> list[tuple[str, str, str]]:
    """(what, steps, wall time), the sum last."""
    shared = get_mapping(run.manifest, "timings")
    lines: list[tuple[str, str, float | None]] = [("teacher, for all sizes", "", get_number(shared, "teacher"))]
    for row in rows:
        steps, spent = (
            get_number(row.run.config, "train", "steps"),
            get_number(row.run.manifest, "timings", "tune and prune"),
        )
        lines.append((f"size {row.name}: tune", formatting.count(steps), spent))
    others = [get_number(row.run.manifest, "timings", stage) for row in rows for stage in ("cut and check", "evaluate")]
    lines.append(("cut, check and evaluate", "", math.fsum(value for value in others if value is not None)))
    lines += [
        (f"{stage}, all models", "", get_number(shared, stage)) for stage in ("evaluate", "bench") if stage in shared
    ]
    seconds = math.fsum(value for _, _, value in lines if value is not None)
    return [(name, steps, formatting.duration(value)) for name, steps, value in [*lines, ("total", "", seconds)]]


def _settings(run: RunFiles) -> str:
    """How speed was measured."""
    workload = get_mapping(run.config, "require")
    prompt, generate, batch = (formatting.count(get_number(workload, key)) for key in ("prompt", "generate", "batch"))
    return (
        f"prompts of up to {prompt} tokens, {generate} written, batch {batch}, the dense model and each size in turns"
    )


# -- pictures ----------------------------------------------------------------------------------------------------------


def _figures(rows: Sequence[SizeRow], known: HeadlineScore | None) -> list[ReportFigure]:
    if known is None:
        return []
    label = f"{'Mean ' if known.tasks > 1 else ''}{known.label}"
    label = label[:1].upper() + label[1:]
    by_size = [(row, row.params / 1e6) for row in rows if row.params is not None]
    by_speed = [(row, speed) for row in rows if (speed := row.speed_ratio()) is not None]
    better = "Higher is better." if higher_is_better(known.metric) else "Lower is better."
    note = f"{better} Bars: one standard error. Dashed: the {known.reference_name} model."
    made = []
    if by_size:
        picture = _frontier_plot("front-size", f"{label} over parameters", by_size, known, "parameters, millions")
        made.append(ReportFigure(f"{label} and size", picture, note=note))
    if by_speed:
        across = "times the dense model's tokens a second"
        picture = _frontier_plot("front-speed", f"{label} over speed", by_speed, known, across)
        made.append(ReportFigure(f"{label} and speed", picture, note=note))
    return made


def _frontier_plot(
    name: str, label: str, points: Sequence[tuple[SizeRow, float]], known: HeadlineScore, across: str
) -> Markup:
    """Each size a mark with its name and its standard error; the reference a dashed line."""

    def draw(drawing: Drawing) -> None:
        axes = drawing.subplots()
        axes.locator_params(axis="x", nbins=5)  # sizes that are nearly equal have long numbers
        shown = [(x, row.headline.pruned, row.headline.pruned_se, row.name) for row, x in points if row.headline]
        axes.plot([x for x, *_ in shown], [quality for _, quality, *_ in shown], color=svg.PRUNED, linewidth=1)
        for x, quality, error, size in shown:
            axes.errorbar(
                x, quality, yerr=error if math.isfinite(error) else None,
                fmt="D", color=svg.PRUNED, markersize=5.5, elinewidth=1.6,
            )  # fmt: skip
            place: Any = {"xytext": (7, 5), "textcoords": "offset points"}
            axes.annotate(size, (x, quality), color=svg.INK, fontsize=9, **place)
        axes.axhline(known.reference, color=svg.TUNED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.margins(x=0.14, y=0.14)
        axes.grid(visible=True, axis="both")
        axes.set_xlabel(across)

    return svg.render_svg(name, f"{label}; the numbers stand in the table above", WIDTH, 2.6, draw)
