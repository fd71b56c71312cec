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
from prunetune.report import facts, scores, svg, text, verdicts
from prunetune.report.figures import WIDTH, legend
from prunetune.report.run_folder import RunFiles, lookup, mapping, number, read_run
from prunetune.report.scores import Headline
from prunetune.report.speed import in_turns
from prunetune.report.training_curves import Figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

SPEEDS = {"throughput": "tokens a second", "prefill": "first token", "decode": "decode step"}


@dataclass(frozen=True)
class Row:
    """One size."""

    name: str
    run: RunFiles
    headline: Headline | None
    on_front: bool = False  # no other size is as good, as fast and as small, and better in one of them

    @property
    def quality(self) -> float | None:
        """Mean of the headline metric."""
        return self.headline.pruned if self.headline else None

    @property
    def params(self) -> float | None:
        """Of the whole model."""
        return number(self.run.manifest, "pruned", "params")

    def times(self, speed: str = "throughput") -> float | None:
        """How many times the dense model's speed."""
        found = in_turns(self.run.manifest, speed)
        return found.ratio if found else None

    @property
    def failed(self) -> str:
        """What gate it is outside of, in words."""
        return str(lookup(self.run.manifest, "failed") or "")


def is_of_sizes(run: RunFiles) -> bool:
    """Whether a run made several sizes."""
    return isinstance(lookup(run.manifest, "sizes"), list)


def rows_of(folder: Path, run: RunFiles) -> list[Row]:
    """The sizes that are there, the largest first."""
    found = []
    for place in map(str, run.manifest["sizes"]):
        if Path(place).is_absolute() or ".." in Path(place).parts:
            continue
        try:
            size = read_run(folder / place)
        except RunFolderError:  # not begun yet
            continue
        found.append(Row(Path(place).name, size, scores.headline(size.evaluations)))
    return [Row(row.name, row.run, row.headline, _is_on_front(row, found)) for row in found]


def _is_on_front(row: Row, rows: Sequence[Row]) -> bool:
    mine = _merits(row)
    if mine is None:
        return False
    others = [merits for other in rows if other is not row and (merits := _merits(other)) is not None]
    return not any(all(a >= b for a, b in zip(other, mine, strict=True)) and other != mine for other in others)


def _merits(row: Row) -> tuple[float, float, float] | None:
    """Quality, speed and smallness; more is better."""
    speed, params = row.times(), row.params
    if row.headline is None or row.quality is None or speed is None or params is None:
        return None
    return (row.quality if higher_is_better(row.headline.metric) else -row.quality), speed, -params


def content(folder: Path, run: RunFiles) -> dict[str, Any]:
    """What the template shows."""
    rows = rows_of(folder, run)
    known = next((row.headline for row in rows if row.headline), None)
    return {
        "run": run,
        "model_name": str(lookup(run.manifest, "model", "name") or lookup(run.config, "model") or ""),
        "verdict": verdict(rows),
        "rows": [_cells(row) for row in rows],
        "headline": known,
        "dense": _dense(run, rows),
        "figures": _figures(rows, known),
        "legend": legend({svg.PRUNED: "sizes of this run", svg.TUNED: f"{known.reference_name if known else 'dense'}"}),
        "tasks": _tasks(rows),
        "names": [row.name for row in rows],
        "limits": [(row.name, limit) for row in rows for limit in verdicts.limits(row.run.manifest)],
        "failed": [(row.name, row.failed) for row in rows if row.failed],
        "stopped": str(lookup(run.manifest, "failed") or ""),
        "costs": _costs(run, rows),
        "splits": facts.splits(run.manifest),
        "environment": facts.environment(run),
        "command": facts.command(run.manifest),
        "settings": _settings(run),
    }


def verdict(rows: Sequence[Row]) -> str:
    """All sizes in a sentence."""
    saved = [share for row in rows if (share := _saved(row)) is not None]
    if not saved:
        return "Several sizes from one run: no results yet"
    words = f"{len(saved)} sizes from one run, decoder {_range(saved)} smaller"
    known = [row.headline for row in rows if row.headline]
    if known:
        label = f"{'mean ' if known[0].tasks > 1 else ''}{known[0].label}"
        words += f"; {label} {_span([text.decimal(one.pruned) for one in known])}"
        left = [one.recovery for one in known if one.recovery is not None]
        words += f", {_range(left)} of the {known[0].reference_name} model" if left else ""
    return words


def _range(shares: Sequence[float]) -> str:
    return _span([text.share(share) for share in shares])


def _span(words: Sequence[str]) -> str:
    return words[0] if words[0] == words[-1] else f"{words[0]} to {words[-1]}"


def _saved(row: Row) -> float | None:
    dense, pruned = (number(row.run.manifest, model, "decoder_params") for model in ("model", "pruned"))
    return 1 - pruned / dense if dense and pruned is not None else None


def _cells(row: Row) -> dict[str, Any]:
    manifest, saved = row.run.manifest, _saved(row)
    measured = {name: mapping(manifest, "gain", "figures", name) for name in SPEEDS}
    prefill, decode = (number(measured[name], "pruned") for name in ("prefill", "decode"))
    return {
        "name": row.name,
        "kept": text.share(None if saved is None else 1 - saved, 1),
        "params": text.short(row.params),
        "bytes": text.size(number(manifest, "pruned", "bytes")),
        "quality": _quality(row.headline),
        "recovery": text.share(row.headline.recovery, 1) if row.headline and row.headline.recovery is not None else "–",
        "speed": str(in_turns(manifest, "throughput") or text.NOT_KNOWN),
        "prefill": text.decimal(None if prefill is None else 1000 * prefill),
        "decode": text.decimal(None if decode is None else 1000 * decode),
        "front": row.on_front,
        "passed": not row.failed,
        "report": f"sizes/{row.name}/report.html",
    }


def _quality(headline: Headline | None) -> Score | None:
    return Score(headline.pruned, headline.pruned_se, headline.tasks) if headline else None


def _dense(run: RunFiles, rows: Sequence[Row]) -> dict[str, str]:
    """The row that all sizes are held against."""
    known = next((row.headline for row in rows if row.headline), None)
    measured = mapping(rows[0].run.manifest, "gain", "figures") if rows else {}
    waits = {name: number(measured, name, "dense") for name in ("prefill", "decode")}
    first = rows[0].run.manifest if rows else run.manifest
    return {
        "name": known.reference_name if known else "dense",
        "params": text.short(number(first, "model", "params")),
        "bytes": text.size(number(first, "model", "bytes")),
        "quality": text.decimal(known.reference if known else None),
        **{name: text.decimal(None if wait is None else 1000 * wait) for name, wait in waits.items()},
    }


def _tasks(rows: Sequence[Row]) -> list[tuple[str, str, list[scores.Row | None]]]:
    """(task, metric, the row of each size) of the metric that stands for each task."""
    found = [{row.task: row for row in scores.rows(size.run.evaluations) if row.headline} for size in rows]
    tasks = dict.fromkeys(task for size in found for task in size)
    return [
        (task, next(size[task].label for size in found if task in size), [size.get(task) for size in found])
        for task in tasks
    ]


def _costs(run: RunFiles, rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(what, steps, wall time), the sum last."""
    shared = mapping(run.manifest, "timings")
    lines: list[tuple[str, str, float | None]] = [("teacher, for all sizes", "", number(shared, "teacher"))]
    for row in rows:
        steps, spent = number(row.run.config, "train", "steps"), number(row.run.manifest, "timings", "tune and prune")
        lines.append((f"size {row.name}: tune", text.count(steps), spent))
    others = [number(row.run.manifest, "timings", stage) for row in rows for stage in ("cut and check", "evaluate")]
    lines.append(("cut, check and evaluate", "", math.fsum(value for value in others if value is not None)))
    lines += [(f"{stage}, all models", "", number(shared, stage)) for stage in ("evaluate", "bench") if stage in shared]
    seconds = math.fsum(value for _, _, value in lines if value is not None)
    return [(name, steps, text.duration(value)) for name, steps, value in [*lines, ("total", "", seconds)]]


def _settings(run: RunFiles) -> str:
    """How speed was measured."""
    gain = mapping(run.config, "gain")
    prompt, generate, batch = (text.count(number(gain, key)) for key in ("prompt", "generate", "batch"))
    return (
        f"prompts of up to {prompt} tokens, {generate} written, batch {batch}, the dense model and each size in turns"
    )


# -- pictures ----------------------------------------------------------------------------------------------------------


def _figures(rows: Sequence[Row], known: Headline | None) -> list[Figure]:
    if known is None:
        return []
    label = f"{'Mean ' if known.tasks > 1 else ''}{known.label}"
    label = label[:1].upper() + label[1:]
    by_size = [(row, row.params / 1e6) for row in rows if row.params is not None]
    by_speed = [(row, speed) for row in rows if (speed := row.times()) is not None]
    better = "Higher is better." if higher_is_better(known.metric) else "Lower is better."
    note = f"{better} Bars: one standard error. Dashed: the {known.reference_name} model."
    made = []
    if by_size:
        picture = _picture("front-size", f"{label} over parameters", by_size, known, "parameters, millions")
        made.append(Figure(f"{label} and size", picture, note=note))
    if by_speed:
        across = "times the dense model's tokens a second"
        picture = _picture("front-speed", f"{label} over speed", by_speed, known, across)
        made.append(Figure(f"{label} and speed", picture, note=note))
    return made


def _picture(name: str, label: str, points: Sequence[tuple[Row, float]], known: Headline, across: str) -> Markup:
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

    return svg.drawn(name, f"{label}; the numbers stand in the table above", WIDTH, 2.6, draw)
