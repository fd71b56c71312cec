"""Trackers look on: they hear numbers, and nothing that is wrong with one stops a run."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from prunetune.config.recipe import from_mapping
from prunetune.errors import ConfigError, MissingPackage
from prunetune.runs import trackers
from prunetune.runs.folder import RunFolder
from prunetune.runs.trackers import Trackers, require_trackers, start_trackers


class Tracker:
    """Keeps what it hears; breaks where told to."""

    name = "fake"

    def __init__(self, breaks: str = "") -> None:
        self.breaks, self.heard, self.finished = breaks, [], False  # type: ignore[var-annotated]

    def log(self, values: dict[str, float], step: int) -> None:
        if self.breaks == "log":
            raise ConnectionError("no route\nto host")
        self.heard.append((step, values))

    def finish(self) -> None:
        if self.breaks == "finish":
            raise TimeoutError("slow")
        self.finished = True


RECORD: dict[str, Any] = {
    "step": 3, "phase": "search", "loss": 1.5, "kept": 1, "search_loss": math.nan, "ok": True, "widths": {"a": 1},
}  # fmt: skip


def test_numbers_are_heard_at_their_step() -> None:
    tracker = Tracker()
    heard = Trackers([tracker])
    heard.log(RECORD, "train")
    heard.close()
    assert tracker.heard == [(3, {"train/loss": 1.5, "train/kept": 1.0})]
    assert tracker.finished


@pytest.mark.parametrize("breaks", ["log", "finish"])
def test_one_that_breaks_is_said_once_and_let_go(breaks: str, caplog: pytest.LogCaptureFixture) -> None:
    broken, sound = Tracker(breaks), Tracker()
    heard = Trackers([broken, sound])
    with caplog.at_level(logging.WARNING):
        heard.log(RECORD, "train")
        heard.log(RECORD, "train")
        heard.close()
    assert len(sound.heard) == 2
    assert sound.finished
    assert len(caplog.records) == 1
    assert "the run goes on without it" in caplog.text


def test_one_that_does_not_start_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError("down")

    monkeypatch.setattr(trackers, "_start", refuse)
    with (
        caplog.at_level(logging.WARNING),
        start_trackers(from_mapping({"report_to": "mlflow"}), RunFolder(tmp_path), cpu=True) as t,
    ):
        t.log(RECORD, "train")
    assert "mlflow does not start (OSError: down); the run goes on without it" in caplog.text


def test_a_package_that_is_not_there_is_one_line_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(
        MissingPackage, match=r"wandb is not installed; run: pip install 'prunetune\[track\]'"
    ) as refused:
        require_trackers(["wandb"])
    assert "\n" not in str(refused.value)
    require_trackers([])


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'; known are tensorboard"):
        from_mapping({"report_to": ["tensorbord"]})


def test_tensorboard_keeps_the_curve(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with start_trackers(from_mapping({"report_to": "tensorboard"}), RunFolder(tmp_path), cpu=True) as heard:
        assert len(heard.active) == 1
        for step in (1, 2, 3):
            heard.log({**RECORD, "step": step, "loss": 1.0 / step}, "train")
    events = EventAccumulator(str(tmp_path / "trackers" / "prunetune"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == pytest.approx({step: 1.0 / step for step in (1, 2, 3)})
