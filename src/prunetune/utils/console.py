"""What a run shows while it runs: a live bar in a terminal, plain lines elsewhere; both keep the records."""

from __future__ import annotations

import logging
import sys
import time
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

Record = dict[str, Any]


class PlainConsole:
    """Lines of a log, every `every` steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.total = 0
        self.begun: tuple[int, float] | None = None  # the first step of the stage that was seen, and when

    def stage(self, name: str, total: int) -> None:
        """A stage of so many steps begins."""
        self.total, self.begun = total, None
        log.info("%s", name)

    def step(self, record: Record) -> None:
        """A tuning step is done."""
        step, now = record["step"], time.monotonic()
        self.begun = self.begun or (step, now)
        if step % self.every == 0 or step in (1, self.total):
            log.info("step %d/%d %s%s", step, self.total, summary(record), self._left(step, now))

    def _left(self, step: int, now: float) -> str:
        """The time left at the mean pace so far, from a minute on."""
        first, since = self.begun or (step, now)
        left = (now - since) / max(1, step - first) * (self.total - step)
        return f", about {left / 60:.0f} min left" if left >= 60 else ""

    def validation(self, record: Record) -> None:
        """The decided sub-network was scored."""
        kept = 100 * record["kept"]
        log.info("step %d validation nll %.4f%s at %.1f%% kept", record["step"], record["nll"], watched(record), kept)

    def passed(self, task: str, done: int, total: int) -> None:
        """An evaluation has come so far."""
        if done == total:
            log.info("evaluated %s", task)

    def close(self) -> None:
        """Nothing to leave behind."""


class Quiet:
    """Says nothing: rank 0 speaks for all."""

    def stage(self, name: str, total: int) -> None:
        """Nothing."""

    def step(self, record: Record) -> None:
        """Nothing."""

    def validation(self, record: Record) -> None:
        """Nothing."""

    def passed(self, task: str, done: int, total: int) -> None:
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
        self.note = ""

    def stage(self, name: str, total: int) -> None:
        """A stage of so many steps begins."""
        self._finish()
        self.progress.start()
        self.task = self.progress.add_task(name, total=total or None, text="")

    def step(self, record: Record) -> None:
        """A tuning step is done."""
        self._update(record["step"], f"{summary(record)} {self.note}")

    def validation(self, record: Record) -> None:
        """The decided sub-network was scored."""
        self.note = f"valid {record['nll']:.3f}{watched(record)}"

    def passed(self, task: str, done: int, total: int) -> None:
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


def summary(record: Record) -> str:
    """One step in a few words."""
    parts = [record["phase"], f"loss {record['loss']:.3f}", f"kept {100 * record['kept']:.1f}%"]
    if "memory_mb" in record:
        parts.append(f"{record['memory_mb'] / 1e3:.2f} GB")
    if "tokens_per_s" in record:
        parts.append(f"{record['tokens_per_s']:.0f} tok/s")
    return " ".join(parts)


def watched(record: Record) -> str:
    """What a validation scored beside the loss on valid, in a few words."""
    names = ("valid.accuracy", "guard.perplexity", "guard.accuracy")
    return "".join(f", {name} {record[name]:.4g}" for name in names if name in record)


def console_for(every: int) -> PlainConsole | LiveConsole:
    """Live in a terminal, plain elsewhere."""
    return LiveConsole() if sys.stderr.isatty() else PlainConsole(every)
