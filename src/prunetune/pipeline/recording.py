"""What a run tells while it goes on and when it ends: to its folder, the console, trackers, the report, the history."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prunetune.config.recipe import RunConfig
from prunetune.errors import LimitBroken
from prunetune.pipeline.prepare import RunContext
from prunetune.report import write_report
from prunetune.runs import history
from prunetune.runs.folder import RunFolder, run_lock
from prunetune.runs.trackers import Trackers
from prunetune.utils import environment


@dataclass(frozen=True)
class RunRecorder:
    """Keeps the records of a run in its folder and passes them on to the console and to trackers."""

    context: RunContext
    trackers: Trackers

    def step(self, record: dict[str, Any]) -> None:
        """A tuning step is done."""
        record = record | {"memory_mb": environment.peak_memory_mb(self.context.device)}
        self.context.folder.append_record("metrics.jsonl", record)
        self.context.console.step(record)
        self.trackers.log(record, "train")

    def validation(self, record: dict[str, Any]) -> None:
        """The decided sub-network was scored."""
        self.context.folder.append_record("validation.jsonl", record)
        self.context.console.validation(record)
        self.trackers.log(record, "validation")


@contextmanager
def run_lifecycle(folder: RunFolder, config: RunConfig, command: str) -> Iterator[None]:
    """However the block ends, the report and the history say so. No other process works on the run meanwhile."""
    with run_lock(folder), history.register_run(folder, config, command):
        try:
            yield
            folder.update_manifest(failed="")
        except LimitBroken as failed:
            folder.update_manifest(failed=str(failed))
            raise
        finally:
            write_report(folder.path)


def raise_if_limits_broken(context: RunContext) -> None:
    """Raises `GateFailed` where the run ended outside a gate; what it made is there."""
    manifest = context.folder.read_manifest()
    broken = [limit for limit in (*manifest.limits.limits, *manifest.gain.limits) if not limit.is_met]
    if broken:
        words = "; and ".join(
            limit.explanation or f"{limit.condition}, limit {limit.limit:.4g}, found {limit.measured:.4g}"
            for limit in broken
        )
        raise LimitBroken(
            f"{context.folder.path} ended outside a gate: {words}; "
            "model and report are there, to look at before they are used"
        )
