"""Progress of a run on standard error: a live bar in a terminal, plain log lines elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

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
    """Prints nothing; for ranks other than 0."""

    def stage(self, *_: Any, **__: Any) -> None:
        """Print nothing."""

    step = validation = evaluation_progress = close = stage


class LiveConsole:
    """A progress bar with the time left, the loss and the memory in use."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        self.progress = Progress(*columns, console=RichConsole(stderr=True))
        self.task: TaskID | None = None
        self.validation_text = ""

    def stage(self, name: str, total: int) -> None:
        self._finish()
        self.progress.start()
        self.task = self.progress.add_task(name, total=total or None, text="")

    def step(self, record: JsonObject) -> None:
        self._update(record["step"], f"{format_step(record)} {self.validation_text}")

    def validation(self, record: JsonObject) -> None:
        self.validation_text = f"valid {record['nll']:.3f}{format_validation_scores(record)}"

    def evaluation_progress(self, task: str, done: int, total: int) -> None:
        self._update(done, task, total)

    def close(self) -> None:
        """Finish the bar and restore the terminal."""
        self._finish()
        self.progress.stop()

    def _update(self, done: int, text: str, total: int | None = None) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=done, total=total, text=printable(text))  # None: as it was

    def _finish(self) -> None:
        if self.task is not None:
            total = self.progress.tasks[-1].total or 1
            self.progress.update(self.task, total=total, completed=total)
        self.task = None


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


def make_console(log_every: int) -> PlainConsole | LiveConsole:
    """A live console in a terminal, a plain one elsewhere."""
    return LiveConsole() if sys.stderr.isatty() else PlainConsole(log_every)


@contextmanager
def evaluation_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function for the block that shows how far an evaluation is: task, items done, items in all."""
    console = make_console(1)
    console.stage("evaluate", 1)
    try:
        yield console.evaluation_progress
    finally:
        console.close()
