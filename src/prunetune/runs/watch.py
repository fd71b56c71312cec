"""Looking on while a run goes on, from its files alone: from another terminal, or after it has ended."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prunetune.config.recipe import RunConfig
from prunetune.runs.folder import RunFolder, is_locked, open_run

REFRESH_SECONDS = 1.0  # seconds between looks
LOCK_CHECK_SECONDS = 30.0  # seconds of silence after which it is asked whether a process works on the run
STOPPED_AFTER_SECONDS = 900.0  # seconds without a sign of life after which a run counts as stopped
BARS = "▁▂▃▄▅▆▇█"
JsonLine = Mapping[str, Any]


@dataclass(frozen=True)
class RunSnapshot:
    """A run as its files show it at one moment."""

    name: str
    total_steps: int
    metrics: tuple[JsonLine, ...]
    validation: tuple[JsonLine, ...]
    manifest: Mapping[str, Any]
    idle_seconds: float  # seconds since a file was last written
    is_finished: bool
    is_stopped: bool = False  # no process works on it

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def seconds_left(self) -> float | None:
        """Of tuning, at the pace of the last fifty steps; None where that is not known."""
        recent = [line for line in self.metrics[-50:] if "seconds" in line]
        if len(recent) < 2 or recent[-1]["seconds"] <= recent[0]["seconds"]:
            return None
        pace = (recent[-1]["seconds"] - recent[0]["seconds"]) / (recent[-1]["step"] - recent[0]["step"])
        return float(pace * (self.total_steps - self.step))


def read_snapshot(folder: RunFolder, config: RunConfig) -> RunSnapshot:
    """Read what is there; a line that is being written is left for the next look."""
    try:
        manifest = folder.read_manifest()
    except (OSError, ValueError):
        manifest = {}
    files = [folder.path / name for name in ("metrics.jsonl", "validation.jsonl", "manifest.json", "config.yaml")]
    written = max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
    ended = (folder.path / "report.html").exists() and written <= (folder.path / "report.html").stat().st_mtime
    return RunSnapshot(
        folder.path.resolve().name,
        config.train.steps,
        _read_records(files[0]),
        _read_records(files[1]),
        manifest,
        max(0.0, time.time() - written),
        ended,
    )


def _read_records(file: Path) -> tuple[JsonLine, ...]:
    found = []
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append(value)
    return tuple(found)


def watch_run(path: Path, *, console: Console | None = None, interval: float = REFRESH_SECONDS) -> None:
    """Show a run until it ends, is stopped, or is silent for a quarter of an hour; raises `RunFolderError` for none."""
    open_run(path)
    console = console or Console(file=sys.stdout)
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            now = read_snapshot(*active_run(path))
            now = replace(
                now, is_stopped=not now.is_finished and now.idle_seconds > LOCK_CHECK_SECONDS and not _is_running(path)
            )
            live.update(render_snapshot(now), refresh=True)
            if now.is_finished or now.is_stopped or now.idle_seconds > STOPPED_AFTER_SECONDS:
                return
            time.sleep(interval)


def _is_running(path: Path) -> bool:
    """The run, or the one of several sizes that it is a size of."""
    return is_locked(path) or is_locked(path.absolute().parent.parent)


def active_run(path: Path) -> tuple[RunFolder, RunConfig]:
    """The run; of several sizes the one that was begun last, until all are done."""
    sizes = [recipe.parent for recipe in path.glob("sizes/*/config.yaml")]
    if not sizes or read_snapshot(*open_run(path)).is_finished:
        return open_run(path)
    return open_run(max(sizes, key=lambda place: (place / "config.yaml").stat().st_mtime))


def render_snapshot(snapshot: RunSnapshot) -> RenderableType:
    """One look as a panel."""
    last: JsonLine = snapshot.metrics[-1] if snapshot.metrics else {}
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", min_width=12)
    rows.add_column()
    rows.add_row("phase", Text(_phase_text(snapshot, last)))  # as it stands: a square bracket is no style
    if snapshot.metrics or not snapshot.is_finished:  # the steps of a run of several sizes are in the folders of these
        rows.add_row("step", f"{snapshot.step:,} of {snapshot.total_steps:,}{_time_left_text(snapshot)}")
        rows.add_row("", ProgressBar(total=snapshot.total_steps, completed=snapshot.step, width=50))
    for key, name in (("loss", "tuning loss"), ("search_loss", "search loss"), ("kept", "kept")):
        values = [float(line[key]) for line in snapshot.metrics if isinstance(line.get(key), int | float)]
        if values:
            shown = f"{values[-1]:.1%}" if key == "kept" else f"{values[-1]:.3f}"
            rows.add_row(name, f"{shown:<8} {sparkline(values)}")
    rows.add_row("speed", _speed_text(last))
    parts: list[RenderableType] = [rows]
    if snapshot.validation:
        parts += [Text(""), _validation_table(snapshot.validation[-5:])]
    for line in [line for line in snapshot.validation if line.get("broken")][-3:]:
        parts.append(Text(f"step {line['step']}, outside: {'; '.join(map(str, line['broken']))}", style="red"))
    return Panel(Group(*parts), title=Text(snapshot.name), title_align="left", width=100)


def _phase_text(snapshot: RunSnapshot, last: JsonLine) -> str:
    if snapshot.manifest.get("failed"):
        return f"ended: {snapshot.manifest['failed']}"
    if snapshot.is_finished:
        return "ended; the report is written"
    if snapshot.is_stopped:
        return "stopped: no process works on it; `prunetune run ... --resume` goes on"
    if snapshot.idle_seconds > STOPPED_AFTER_SECONDS:
        return f"silent for {snapshot.idle_seconds / 60:.0f} minutes: stopped, it seems; `prunetune run ... --resume` goes on"
    if snapshot.step >= snapshot.total_steps:
        return "cut, check and evaluate"
    return str(last.get("phase", "before the first step"))


def _time_left_text(snapshot: RunSnapshot) -> str:
    if snapshot.is_finished or snapshot.step >= snapshot.total_steps or snapshot.seconds_left is None:
        return ""
    minutes, seconds = divmod(round(snapshot.seconds_left), 60)
    return f", about {minutes} min {seconds:02d} s of tuning left"


def _speed_text(last: JsonLine) -> str:
    parts = [f"{last['tokens_per_s']:,.0f} tokens/s"] if "tokens_per_s" in last else []
    parts += [f"{last['memory_mb'] / 1e3:.2f} GB"] if "memory_mb" in last else []
    return ", ".join(parts) or "–"


def _validation_table(lines: Sequence[JsonLine]) -> Table:
    wanted = ("valid.accuracy", "guard.perplexity", "guard.accuracy")
    names = [name for name in wanted if name in lines[-1]]
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for name in ("validation", "phase", "kept", "valid.nll", *names):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for line in lines:
        scores = [f"{line[name]:.4g}" if isinstance(line.get(name), int | float) else "–" for name in ("nll", *names)]
        about = (str(line["step"]), Text(str(line.get("phase", ""))), f"{line.get('kept', 0):.1%}")
        table.add_row(*about, *scores)
    return table


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A line of bars: the values in `width` equal parts, each by its mean, from lowest to highest."""
    size = max(1, -(-len(values) // width))
    means = [sum(values[at : at + size]) / len(values[at : at + size]) for at in range(0, len(values), size)]
    finite = [value for value in means if value == value and abs(value) != float("inf")]
    if not finite:
        return ""
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] if value in finite else " " for value in means)
