"""Experiment trackers: a run's numbers go to TensorBoard, Weights & Biases, MLflow and trackio, through accelerate.

Off by default. A tracker that is down, slow to answer or broken never stops a run. At the end of a run its final scores
follow, and where the tracker takes them the table of scores and the report. What they show of rows is decided before.
"""

import logging
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from prunetune.config.recipe import RunConfig, to_mapping
from prunetune.errors import MissingPackage
from prunetune.runs.folder import RunFolder, flatten_options
from prunetune.utils.failures import typed_line
from prunetune.utils.json_lines import JsonObject
from prunetune.utils.optional import is_installed

log = logging.getLogger(__name__)

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
# So that a server that is down costs seconds, not the minutes that these packages would wait.
TIMEOUT_VARIABLES = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "WANDB_INIT_TIMEOUT": "20",
}


def require_trackers(names: Sequence[str]) -> None:
    """Raises `MissingPackage` for a tracker that is not installed; called before anything is written."""
    for name in names:
        if not is_installed(PACKAGES[name]):
            raise MissingPackage(f"report_to: {name} is not installed; run: pip install {PACKAGES[name]}")


def _send_table_and_page(tracker: Any, table: str, report: Path, step: int) -> None:
    if tracker.name == "tensorboard":
        tracker.tracker.add_text("final/scores", table, step)
    elif tracker.name == "wandb":
        tracker.log({"final/report": import_module("wandb").Html(str(report))}, step=step)
    elif tracker.name == "mlflow":
        import_module("mlflow").log_text(table, "scores.md")
        tracker.log_artifact(str(report))


class Trackers:
    """The trackers that work; one that fails is dropped with a warning of one line."""

    def __init__(self, trackers: Sequence[Any] = ()) -> None:
        self.active = list(trackers)

    def log(self, record: JsonObject, prefix: str) -> None:
        """Send the finite numbers of a record at its step, named `prefix`/NAME."""
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
        is_sent = {name: not isinstance(value, bool) and math.isfinite(value) for name, value in numbers.items()}
        values = {f"{prefix}/{name}": float(value) for name, value in numbers.items() if is_sent[name]}
        for tracker in list(self.active):
            self._call_or_drop(tracker, "log", values, step=record["step"])

    def log_result(self, scores: Mapping[str, float], table: str, report: Path, step: int) -> None:
        """Send final scores as final/NAME, and to the trackers that take them their table (Markdown) and the page."""
        self.log({**scores, "step": step}, "final")
        for tracker in list(self.active):
            self._call_or_drop(tracker, _send_table_and_page, tracker, table, report, step)

    def close(self) -> None:
        """Finish every tracker."""
        for tracker in list(self.active):
            self._call_or_drop(tracker, "finish")

    def _call_or_drop(self, tracker: Any, method: str | Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            (getattr(tracker, method) if isinstance(method, str) else method)(*args, **kwargs)
        except Exception as broken:
            self.active.remove(tracker)
            log.warning("report_to: %s failed (%s); the run continues without it", tracker.name, typed_line(broken))


@contextmanager
def start_trackers(config: RunConfig, folder: RunFolder, *, cpu: bool) -> Iterator[Trackers]:
    """The trackers that `report_to` names, for the length of the block; `cpu`: whether the run uses no GPU."""
    if config.report_to:
        from accelerate import PartialState

        PartialState(cpu=cpu)  # its trackers ask it which process they are in
        for name, value in TIMEOUT_VARIABLES.items():
            os.environ.setdefault(name, value)
    trackers = Trackers()
    for name in config.report_to:
        try:
            trackers.active.append(_start(name, config, folder))
        except Exception as broken:
            log.warning("report_to: %s does not start (%s); the run continues without it", name, typed_line(broken))
    try:
        yield trackers
    finally:
        trackers.close()


def _start(name: str, config: RunConfig, folder: RunFolder) -> Any:
    from accelerate import tracking

    logs, run_name = folder.path / "trackers", folder.path.name
    logs.mkdir(parents=True, exist_ok=True)
    id_file = logs / f"{name}.id"  # a process that goes on with the run goes on with the tracker's
    known = id_file.read_text(encoding="utf-8") if id_file.exists() else ""
    run_id = known or uuid.uuid4().hex
    if name == "tensorboard":
        tracker: Any = tracking.TensorBoardTracker(run_name="prunetune", logging_dir=str(logs))
    elif name == "wandb":
        tracker = tracking.WandBTracker("prunetune", name=run_name, dir=str(logs), id=run_id, resume="allow")
    elif name == "mlflow":
        mlflow_logs = str(logs / "mlflow")
        tracker = tracking.MLflowTracker("prunetune", mlflow_logs, run_id=known or None, run_name=run_name)
    else:
        tracker = tracking.TrackioTracker("prunetune", name=run_name, resume="allow")
    tracker.start()
    if known:
        return tracker
    id_file.write_text(tracker.active_run.info.run_id if name == "mlflow" else run_id, encoding="utf-8")
    options = flatten_options(to_mapping(config))
    tracker.store_init_configuration(
        {option: str(value) if isinstance(value, list) else value for option, value in options.items()}
    )
    return tracker
