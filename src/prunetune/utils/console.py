"""What a run shows while it runs: a live bar in a terminal, plain lines elsewhere; both keep the records."""

from __future__ import annotations

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

log = logging.getLogger(__name__)

ConsoleRecord = dict[str, Any]


class PlainConsole:
    """Lines of a log, every `every` steps."""

    def __init__(self, log_every: int) -> None:
        self.log_every = log_every
        self.total = 0
        self.stage_start: tuple[int, float] | None = None  # the first step of the stage that was seen, and when

    def stage(self, name: str, total: int) -> None:
        """A stage of so many steps begins."""
        self.total, self.stage_start = total, None
        log.info("%s", name)

    def step(self, record: ConsoleRecord) -> None:
        """A tuning step is done."""
        step, now = record["step"], time.monotonic()
        self.stage_start = self.stage_start or (step, now)
        if step % self.log_every == 0 or step in (1, self.total):
            log.info("step %d/%d %s%s", step, self.total, format_step(record), self._format_time_left(step, now))

    def _format_time_left(self, step: int, now: float) -> str:
        """The time left at the mean pace so far, from a minute on."""
        first, since = self.stage_start or (step, now)
        left = (now - since) / max(1, step - first) * (self.total - step)
        return f", about {left / 60:.0f} min left" if left >= 60 else ""

    def validation(self, record: ConsoleRecord) -> None:
        """The decided sub-network was scored."""
        kept = 100 * record["kept"]
        log.info(
            "step %d validation nll %.4f%s at %.1f%% kept",
            record["step"],
            record["nll"],
            format_validation_scores(record),
            kept,
        )

    def evaluation_progress(self, task: str, done: int, total: int) -> None:
        """An evaluation has come so far."""
        if done == total:
            log.info("evaluated %s", task)

    def close(self) -> None:
        """Nothing to leave behind."""


class SilentConsole:
    """Says nothing: rank 0 speaks for all."""

    def stage(self, name: str, total: int) -> None:
        """Nothing."""

    def step(self, record: ConsoleRecord) -> None:
        """Nothing."""

    def validation(self, record: ConsoleRecord) -> None:
        """Nothing."""

    def evaluation_progress(self, task: str, done: int, total: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class LiveConsole:
    """A progress bar with the time left and the memory held."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self.progress = Progress(*columns, console=RichConsole(stderr=True))
        self.task: TaskID | None = None
        self.validation_text = ""

    def stage(self, name: str, total: int) -> None:
        """A stage of so many steps begins."""
        self._finish()
        self.progress.start()
        self.task = self.progress.add_task(name, total=total or None, text="")

    def step(self, record: ConsoleRecord) -> None:
        """A tuning step is done."""
        self._update(record["step"], f"{format_step(record)} {self.validation_text}")

    def validation(self, record: ConsoleRecord) -> None:
        """The decided sub-network was scored."""
        self.validation_text = f"valid {record['nll']:.3f}{format_validation_scores(record)}"

    def evaluation_progress(self, task: str, done: int, total: int) -> None:
        """An evaluation has come so far."""
        self._update(done, task, total)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._finish()
        self.progress.stop()

    def _update(self, done: int, text: str, total: int | None = None) -> None:
        if self.task is not None:
            known = {} if total is None else {"total": total}
            self.progress.update(self.task, completed=done, text=text, **known)  # type: ignore[arg-type]

    def _finish(self) -> None:
        if self.task is not None:
            total = self.progress.tasks[-1].total or 1
            self.progress.update(self.task, total=total, completed=total)
        self.task = None


def format_step(record: ConsoleRecord) -> str:
    """One step in a few words."""
    parts = [record["phase"], f"loss {record['loss']:.3f}", f"kept {100 * record['kept']:.1f}%"]
    if "memory_mb" in record:
        parts.append(f"{record['memory_mb'] / 1e3:.2f} GB")
    if "tokens_per_s" in record:
        parts.append(f"{record['tokens_per_s']:.0f} tok/s")
    return " ".join(parts)


def format_validation_scores(record: ConsoleRecord) -> str:
    """What a validation scored beside the loss on valid, in a few words."""
    names = ("valid.accuracy", "guard.perplexity", "guard.accuracy")
    return "".join(f", {name} {record[name]:.4g}" for name in names if name in record)


def make_console(log_every: int) -> PlainConsole | LiveConsole:
    """Live in a terminal, plain elsewhere."""
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
