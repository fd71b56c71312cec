"""Live view of a run (`prunetune watch`), from its files alone: phase, progress, losses, validation."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prunetune.config.recipe import RunConfig
from prunetune.manifest import Manifest
from prunetune.runs.folder import RunFolder, is_locked, open_run
from prunetune.utils.json_lines import JsonObject, is_cut, read_json_lines
from prunetune.utils.tables import plain_text

REFRESH_SECONDS = 1.0
LOCK_CHECK_SECONDS = 30.0  # without a new line; then the lock says whether a process works on the run
STOPPED_AFTER_SECONDS = 900.0  # without a new line; then a run counts as stopped
NUMBERS = ("kept", "seconds", "tokens_per_s", "memory_mb")  # a record that holds anything else there is not shown
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class RunSnapshot:
    """The state of a run by its files, at one moment."""

    name: str
    total_steps: int
    metrics: tuple[JsonObject, ...]
    validation: tuple[JsonObject, ...]
    manifest: Manifest
    idle_seconds: float  # seconds since a file was last written
    is_finished: bool
    is_stopped: bool = False  # no process works on it

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def seconds_left(self) -> float | None:
        """Seconds of tuning that are left, at the pace of the last fifty lines; None where that is not known."""
        recent = [line for line in self.metrics[-50:] if "seconds" in line]
        if len(recent) < 2 or any(recent[-1][name] <= recent[0][name] for name in ("seconds", "step")):
            return None
        pace = (recent[-1]["seconds"] - recent[0]["seconds"]) / (recent[-1]["step"] - recent[0]["step"])
        return float(pace * (self.total_steps - self.step))


def read_snapshot(folder: RunFolder, config: RunConfig) -> RunSnapshot:
    """Read the files that are there; a line that is just being written is left out."""
    try:
        manifest = folder.read_manifest()
    except (OSError, ValueError):
        manifest = Manifest.empty()
    files = [folder.path / name for name in ("metrics.jsonl", "validation.jsonl", "manifest.json", "config.yaml")]
    written = max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
    report = folder.path / "report.html"
    if manifest.status is None:  # of version 0.1.0, which recorded none
        is_finished = report.exists() and written <= report.stat().st_mtime
    else:
        is_finished = report.exists() and manifest.status in ("done", "limit broken", "gate failed")
    return RunSnapshot(
        folder.path.resolve().name,
        config.train.steps,
        _read_records(files[0]),
        _read_records(files[1]),
        manifest,
        max(0.0, time.time() - written),
        is_finished,
        manifest.status in ("failed", "interrupted"),
    )


def _read_records(file: Path) -> tuple[JsonObject, ...]:
    try:
        records, _ = read_json_lines(file)
    except OSError:
        return ()
    return tuple(
        record
        for record in records
        if isinstance(record.get("step"), int)
        and all(isinstance(record.get(name, 0.0), int | float) for name in NUMBERS)
    )


def watch_run(path: Path, *, console: Console | None = None, interval: float = REFRESH_SECONDS) -> None:
    """Show a run until it ends, stops or writes nothing for 15 minutes; raises `RunFolderError` for no run folder."""
    open_run(path)
    console = console or Console(file=sys.stdout)
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            snapshot = take_snapshot(path)
            live.update(render_snapshot(snapshot), refresh=True)
            if snapshot.is_finished or snapshot.is_stopped or snapshot.idle_seconds > STOPPED_AFTER_SECONDS:
                return
            time.sleep(interval)


def take_snapshot(path: Path) -> RunSnapshot:
    """The state of a run, or of the size that it works on; asks whether a process does if nothing was written lately.

    Raises `RunFolderError` for no run folder.
    """
    snapshot = read_snapshot(*active_run(path))
    if snapshot.is_finished or snapshot.is_stopped or snapshot.idle_seconds <= LOCK_CHECK_SECONDS:
        return snapshot
    # One of several sizes is locked with the run around it: RUN/sizes/0.6.
    return replace(snapshot, is_stopped=not (is_locked(path) or is_locked(path.absolute().parent.parent)))


def active_run(path: Path) -> tuple[RunFolder, RunConfig]:
    """The run; of several sizes the one that was started last, until all are done."""
    sizes = [recipe.parent for recipe in path.glob("sizes/*/config.yaml")]
    if not sizes or read_snapshot(*open_run(path)).is_finished:
        return open_run(path)
    return open_run(max(sizes, key=lambda size: (size / "config.yaml").stat().st_mtime))


def render_snapshot(snapshot: RunSnapshot) -> RenderableType:
    """The snapshot as a panel."""
    last: JsonObject = snapshot.metrics[-1] if snapshot.metrics else {}
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", min_width=12)
    rows.add_column()
    if snapshot.metrics or not snapshot.is_finished:  # a run of several sizes has its steps in their folders
        left, time_left = snapshot.seconds_left, ""
        if not snapshot.is_finished and snapshot.step < snapshot.total_steps and left is not None:
            time_left = f", about {round(left) // 60} min {round(left) % 60:02d} s left"
        rows.add_row("", ProgressBar(total=snapshot.total_steps, completed=snapshot.step, width=40))
        rows.add_row("step", f"{snapshot.step:,} of {snapshot.total_steps:,}{time_left}")
    rows.add_row("phase", plain_text(describe_phase(snapshot)))
    for key, name in (("loss", "tuning loss"), ("search_loss", "search loss"), ("kept", "kept")):
        values = [float(line[key]) for line in snapshot.metrics if isinstance(line.get(key), int | float)]
        if values:
            last_value = f"{values[-1]:.1%}" if key == "kept" else f"{values[-1]:.3f}"
            rows.add_row(name, f"{last_value:<8} {sparkline(values)}")
    cuts = [line for line in snapshot.metrics if is_cut(line)]
    if cuts:
        words = ", ".join(f"step {line['step']}: {line.get('kept', 0):.1%}" for line in cuts)
        rows.add_row("cuts", f"{words} kept")
    speed = [f"{last['tokens_per_s']:,.0f} tokens/s"] if "tokens_per_s" in last else []
    speed += [f"{last['memory_mb'] / 1e3:.2f} GB"] if "memory_mb" in last else []
    rows.add_row("speed", ", ".join(speed) or "–")
    blocks: list[RenderableType] = [rows]
    if snapshot.validation:
        blocks += [Text(""), _validation_table(snapshot.validation[-5:])]
    for line in [line for line in snapshot.validation if isinstance(line.get("broken"), list) and line["broken"]][-3:]:
        broken = "; ".join(map(str, line["broken"]))
        blocks.append(plain_text(f"step {line['step']}, limits broken: {broken}", style="red"))
    return Panel(Group(*blocks), title=plain_text(snapshot.name), title_align="left", width=100)


def describe_phase(snapshot: RunSnapshot) -> str:
    """What the run does, or how it ended and what to do."""
    if snapshot.manifest.failed:
        return f"ended: {snapshot.manifest.failed}"
    if snapshot.is_finished:
        return "ended; the report is written"
    if snapshot.is_stopped:
        return "stopped: no process works on it; continue it with `prunetune run ... --resume`"
    if snapshot.idle_seconds > STOPPED_AFTER_SECONDS:
        minutes = f"{snapshot.idle_seconds / 60:.0f} minutes"
        return f"nothing written for {minutes}: probably stopped; continue it with `prunetune run ... --resume`"
    if snapshot.step >= snapshot.total_steps:
        return "cut, check and evaluate"
    return str(snapshot.metrics[-1].get("phase", "")) if snapshot.metrics else "before the first step"


def _validation_table(lines: Sequence[JsonObject]) -> Table:
    names = [name for name in ("valid.accuracy", "guard.perplexity", "guard.accuracy") if name in lines[-1]]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("valid-\nation", "phase", "kept", "valid\nnll", *(name.replace(".", "\n") for name in names)):
        table.add_column(name, justify="left" if name == "phase" else "right", no_wrap=name != "phase")
    for line in lines:
        scores = [f"{line[name]:.4g}" if isinstance(line.get(name), int | float) else "–" for name in ("nll", *names)]
        table.add_row(str(line["step"]), plain_text(str(line.get("phase", ""))), f"{line.get('kept', 0):.1%}", *scores)
    return table


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A line of at most `width` bars, each the mean of equally many values, from lowest to highest."""
    size = max(1, -(-len(values) // width))
    means = [sum(values[at : at + size]) / len(values[at : at + size]) for at in range(0, len(values), size)]
    finite = [value for value in means if value == value and abs(value) != float("inf")]
    if not finite:
        return ""
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] if value in finite else " " for value in means)
