"""TensorBoard, Weights & Biases, MLflow and trackio hear of a run through accelerate's trackers; off by default.

A tracker looks on: one that is down, slow to answer or broken never stops a run.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from prunetune.config.recipe import RunConfig, to_mapping
from prunetune.errors import MissingPackage
from prunetune.runs.folder import RunFolder, flatten_options

log = logging.getLogger(__name__)

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
# A server that is down is given up on in seconds, not in the minutes that these packages would wait.
TIMEOUT_VARIABLES = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "WANDB_INIT_TIMEOUT": "20",
}
TrackedRecord = Mapping[str, Any]


def require_trackers(names: Sequence[str]) -> None:
    """Raises `MissingPackage` for a tracker that is not installed, before anything is made."""
    for name in names:
        if find_spec(PACKAGES[name]) is None:
            raise MissingPackage(
                f"track: {name} is not installed; run: pip install 'prunetune[track]', or {PACKAGES[name]}"
            )


class Trackers:
    """Those trackers that answer; one that fails is let go of with one line."""

    def __init__(self, trackers: Sequence[Any] = ()) -> None:
        self.active = list(trackers)

    def log(self, record: TrackedRecord, prefix: str) -> None:
        """Numbers of a record, at its step."""
        values = {
            f"{prefix}/{name}": float(value)
            for name, value in record.items()
            if isinstance(value, int | float)
            and not isinstance(value, bool)
            and name != "step"
            and math.isfinite(value)
        }
        for tracker in list(self.active):
            self._call_or_drop(tracker, "log", values, step=record["step"])

    def close(self) -> None:
        """Everything was said."""
        for tracker in list(self.active):
            self._call_or_drop(tracker, "finish")

    def _call_or_drop(self, tracker: Any, what: str, *args: Any, **kwargs: Any) -> None:
        try:
            getattr(tracker, what)(*args, **kwargs)
        except Exception as broken:
            self.active.remove(tracker)
            log.warning("track: %s failed (%s); the run goes on without it", tracker.name, _one_line(broken))


@contextmanager
def start_trackers(config: RunConfig, folder: RunFolder, *, cpu: bool) -> Iterator[Trackers]:
    """The trackers that `track` names, for the length of the block; `cpu`: whether the run keeps off the GPU."""
    if config.report_to:
        from accelerate import PartialState

        PartialState(cpu=cpu)  # its trackers ask it which process they are in
        for name, value in TIMEOUT_VARIABLES.items():
            os.environ.setdefault(name, value)
    trackers = Trackers(
        [tracker for name in config.report_to if (tracker := _start_or_warn(name, config, folder)) is not None]
    )
    try:
        yield trackers
    finally:
        trackers.close()


def _start_or_warn(name: str, config: RunConfig, folder: RunFolder) -> Any:
    try:
        return _start(name, config, folder)
    except Exception as broken:
        log.warning("track: %s does not start (%s); the run goes on without it", name, _one_line(broken))
        return None


def _start(name: str, config: RunConfig, folder: RunFolder) -> Any:
    from accelerate import tracking as kinds

    place = folder.path / "trackers"
    place.mkdir(parents=True, exist_ok=True)
    kind = {
        "tensorboard": kinds.TensorBoardTracker,
        "wandb": kinds.WandBTracker,
        "mlflow": kinds.MLflowTracker,
        "trackio": kinds.TrackioTracker,
    }[name]
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"logging_dir": str(place)},
        "wandb": {"name": folder.path.name, "dir": str(place)},
        "mlflow": {"experiment_name": "prunetune", "run_name": folder.path.name, "logging_dir": str(place / "mlflow")},
        "trackio": {"name": folder.path.name},
    }
    tracker = kind(**({} if name == "mlflow" else {"run_name": "prunetune"}), **options[name])
    tracker.start()
    plain = {
        key: str(value) if isinstance(value, list) else value
        for key, value in flatten_options(to_mapping(config)).items()
    }
    tracker.store_init_configuration(plain)
    return tracker


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
