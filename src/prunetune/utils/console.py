"""Progress of a run on standard error: a live bar in a terminal, plain log lines elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column
from rich.text import Text

from prunetune.utils.json_lines import JsonObject, is_cut
from prunetune.utils.untrusted import printable

log = logging.getLogger(__name__)


class PlainConsole:
    """Log lines, one every `log_every` steps."""

    def __init__(self, log_every: int) -> None:
        self.log_every = log_every
        self.total = 0
        self.stage_start: tuple[int, float] | None = None  # first step of the stage, and its time

    def stage(self, name: str, total: int) -> None:
        self.total, self.stage_start = total, None
        log.info("%s", name)

    def step(self, record: JsonObject) -> None:
        step, now = record["step"], time.monotonic()
        self.stage_start = self.stage_start or (step, now)
        if is_cut(record):
            log.info("cut before step %d: %.1f%% kept", step, 100 * record["kept"])
        if step % self.log_every == 0 or step in (1, self.total):
            first_step, started = self.stage_start
            seconds_left = (now - started) / max(1, step - first_step) * (self.total - step)  # at the mean pace so far
            time_left = f", about {seconds_left / 60:.0f} min left" if seconds_left >= 60 else ""
            log.info("step %d/%d %s%s", step, self.total, format_step(record), time_left)

    def validation(self, record: JsonObject) -> None:
        scores, kept = format_validation_scores(record), 100 * record["kept"]
        log.info("step %d validation nll %.4f%s at %.1f%% kept", record["step"], record["nll"], scores, kept)

    def evaluation_progress(self, task: str, done: int, total: int) -> None:
        if done == total:
            log.info("evaluated %s", task)

    def close(self) -> None:
        """Nothing to restore."""


class SilentConsole:
    """Prints nothing; for --quiet, and for ranks other than 0."""

    def stage(self, *_: Any, **__: Any) -> None:
        """Print nothing."""

    step = validation = evaluation_progress = close = stage


class LiveConsole:
    """Two lines at the bottom of a terminal of any width: bar, step, time left and stage; below them the figures.

    Stages that are done, and log lines, stay above.
    """

    def __init__(self) -> None:
        console = RichConsole(stderr=True)
        columns = (BarColumn(max(8, min(40, console.width // 5))), _StepsColumn(), _StageColumn())
        self.progress = _TwoLines(*columns, console=console, expand=True, transient=True, speed_estimate_period=600)
        self.task: TaskID | None = None
        self.validation_text = ""

    def stage(self, name: str, total: int) -> None:
        self._finish()
        self.progress.start()
        self.task = self.progress.add_task(printable(name), total=total or None, text="")

    def step(self, record: JsonObject) -> None:
        self._update(record["step"], f"{format_step(record)} {self.validation_text}")

    def validation(self, record: JsonObject) -> None:
        self.validation_text = f"valid {record['nll']:.3f}{format_validation_scores(record)}"

    def evaluation_progress(self, task: str, done: int, total: int) -> None:
        self._update(done, task, total)

    def close(self) -> None:
        """Finish the stage and restore the terminal."""
        self._finish()
        self.progress.stop()

    def _update(self, done: int, text: str, total: int | None = None) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=done, total=total, text=printable(text))  # None: as it was

    def _finish(self) -> None:
        if self.task is not None:
            task = self.progress.tasks[-1]
            line = f"{format_seconds(task.elapsed or 0)} {task.description}"
            self.progress.console.print(Text(line, no_wrap=True, overflow="ellipsis"))
            self.progress.remove_task(self.task)
        self.task, self.validation_text = None, ""


class _StepsColumn(ProgressColumn):
    """ "120/3000 12:34 left", or the time so far where the number of steps is not known."""

    def get_table_column(self) -> Column:
        return Column(no_wrap=True)

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text(format_seconds(task.elapsed or 0))
        left = "" if task.finished else f" {format_seconds(task.time_remaining)} left"
        return Text(f"{task.completed:.0f}/{task.total:.0f}{left}")


class _StageColumn(ProgressColumn):
    """The name of the stage, in the columns that remain."""

    def get_table_column(self) -> Column:
        return Column(ratio=1, no_wrap=True, overflow="ellipsis")

    def render(self, task: Task) -> Text:
        return Text(task.description)


class _TwoLines(Progress):
    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(task.fields["text"], no_wrap=True, overflow="ellipsis", style="dim") for task in self.tasks)


def format_seconds(seconds: float | None) -> str:
    """ "1:02:03", "02:03", or "-:--" where it is not known."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes:02d}:{rest:02d}"


def format_step(record: JsonObject) -> str:
    """A step as text: phase, loss, share kept, memory and speed where they are known."""
    parts = [record["phase"], f"loss {record['loss']:.3f}", f"kept {100 * record['kept']:.1f}%"]
    if "memory_mb" in record:
        parts.append(f"{record['memory_mb'] / 1e3:.2f} GB")
    if "tokens_per_s" in record:
        parts.append(f"{record['tokens_per_s']:.0f} tok/s")
    return " ".join(parts)


def format_validation_scores(record: JsonObject) -> str:
    """The scores of a validation other than the loss on valid, as text."""
    names = ("valid.accuracy", "guard.perplexity", "guard.accuracy")
    return "".join(f", {name} {record[name]:.4g}" for name in names if name in record)


def make_console(log_every: int) -> PlainConsole | LiveConsole | SilentConsole:
    """A live console in a terminal, a plain one elsewhere; a silent one if logger "prunetune" is set above INFO."""
    if logging.getLogger("prunetune").level > logging.INFO:
        return SilentConsole()
    return LiveConsole() if sys.stderr.isatty() and RichConsole().is_interactive else PlainConsole(log_every)


@contextmanager
def show_stage(name: str) -> Iterator[PlainConsole | LiveConsole | SilentConsole]:
    """Show that the block, of a length not known, is at work."""
    with closing(make_console(1)) as console:
        console.stage(name, 0)
        yield console


@contextmanager
def evaluation_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function for the block that shows how far an evaluation is: task, items done, items in all."""
    with show_stage("evaluate") as console:
        yield console.evaluation_progress
