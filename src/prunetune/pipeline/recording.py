"""What a run records: steps and scores to its folder, console and trackers; times, failures, report and history."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prunetune.errors import LimitBroken
from prunetune.manifest import EnvironmentFacts
from prunetune.pipeline.prepare import RunContext, data_and_model_facts
from prunetune.report import write_report
from prunetune.report.run_folder import read_run
from prunetune.report.scores import headline_table
from prunetune.runs import history
from prunetune.runs.folder import TUNING_STAGE, RunFolder, run_lock
from prunetune.runs.trackers import Trackers, start_trackers
from prunetune.train.job import Observer
from prunetune.utils import environment
from prunetune.utils.files import write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecorder:
    """Writes the records of a training run to its folder and passes them to the console and to trackers."""

    context: RunContext
    trackers: Trackers

    def step(self, record: dict[str, Any]) -> None:
        """Record a tuning step."""
        record = record | {"memory_mb": environment.peak_memory_mb(self.context.device)}
        self.context.folder.append_record("metrics.jsonl", record)
        self.context.console.step(record)
        self.trackers.log(record, "train")

    def validation(self, record: dict[str, Any]) -> None:
        """Record the scores of a validation."""
        self.context.folder.append_record("validation.jsonl", record)
        self.context.console.validation(record)
        self.trackers.log(record, "validation")


@contextmanager
def record_training(context: RunContext) -> Iterator[Observer]:
    """The observer of the training in the block, which is timed; on other ranks than 0 nothing is recorded."""
    if not context.ranks.is_main:
        yield context.console
        return
    with (
        record_timing(context.folder, TUNING_STAGE),
        start_trackers(context.reported_config, context.folder, cpu=context.device.type == "cpu") as trackers,
    ):
        yield RunRecorder(context, trackers)


@contextmanager
def record_timing(folder: RunFolder, stage: str) -> Iterator[None]:
    """Add the seconds that the block took to the stage's in the manifest, which earlier processes may have begun."""
    started = time.monotonic()
    try:
        yield
    finally:
        timings = folder.read_manifest().timings
        seconds = (timings.get(stage) or 0) + time.monotonic() - started
        folder.update_manifest(timings={**timings, stage: seconds})


def record_origin(context: RunContext, command: str, **facts: Any) -> None:
    """Write what the run is made of: machine, versions, command, data, dense model, limits, and `facts`.

    What changed of machine and versions since the run was last started is logged, and both are kept.
    """
    folder, limits = context.folder, context.constraints.limits.limits if context.constraints.limits else ()
    table = next((limit.latency_table for limit in limits if limit.latency_table), None)
    if table and not folder.latency_table_file.exists():
        write_text(folder.latency_table_file, table.to_json() + "\n")
    described = environment.describe_environment(context.device, context.dtype, command, context.config.seed)
    now = EnvironmentFacts(**{name: described[name] for name in ("commit", "versions", "device", "dtype")})
    environments = folder.read_manifest().known_environments
    if environments and (changes := now.changes_since(environments[-1])):
        log.warning("%s was last worked on with other versions: %s; its manifest.json keeps both", folder.path, changes)
    folder.update_manifest(
        **described,
        **data_and_model_facts(context),
        environments=environments if now in environments[-1:] else (*environments, now),
        cost_limits={limit.kind: limit.limit for limit in limits},
        **facts,
    )


@contextmanager
def run_lifecycle(context: RunContext, command: str, *, is_final: bool = True) -> Iterator[None]:
    """Lock the run folder for the block; whatever ends the block, the report and the history then show it.

    The trackers get the scores and the report of a run that has them, unless another block follows (not `is_final`).
    """
    folder, redaction = context.folder, context.config.report.redaction
    with run_lock(folder), history.record_status(folder), redaction.errors():
        try:
            yield
            folder.update_manifest(failed="")
        except LimitBroken as failed:
            folder.update_manifest(failed=str(failed))
            raise
        finally:
            write_report(folder.path)
            if is_final and context.config.report_to:
                _send_result(context)


def _send_result(context: RunContext) -> None:
    """Send final scores, the table of scores and the report to the trackers, if there are scores."""
    folder, config = context.folder, context.reported_config
    evaluations = read_run(folder.path).evaluations
    if "pruned" not in evaluations:
        return
    headings, rows = headline_table(evaluations)
    lines = [[heading.removeprefix(">") for heading in headings], ["---"] * len(headings), *rows]
    table = "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
    with start_trackers(config, folder, cpu=context.device.type == "cpu") as trackers:
        trackers.log_result(history.final_scores(folder), table, folder.path / "report.html", config.train.steps)


def raise_if_limits_broken(context: RunContext) -> None:
    """Raises `LimitBroken` if the finished run is outside a limit on scores or gain; model and report are kept."""
    manifest = context.folder.read_manifest()
    reasons = [
        limit.explanation or f"{limit.condition}, limit {limit.limit:.4g}, found {limit.measured:.4g}"
        for limit in (*manifest.limits.limits, *manifest.gain.limits)
        if not limit.is_met
    ]
    if context.config.budget.has_quality:
        reasons += [
            f"budget.{budget.budget} ({budget.words}) is not met: no smaller model keeps the quality"
            for budget in manifest.budgets
            if budget.counted is not None and budget.limit is not None and budget.counted > budget.limit * (1 + 1e-9)
        ]
    if reasons:
        raise LimitBroken(
            f"{context.folder.path} ended outside a limit: {'; and '.join(reasons)}; "
            "model and report are written: look at them before the model is used"
        )
