"""Trackers get the finite numbers of a run, and no error of one stops a run."""

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
from prunetune.utils import optional


class Tracker:
    """Records what it is sent; fails in the method named."""

    name = "fake"

    def __init__(self, breaks: str = "") -> None:
        self.breaks, self.logged, self.finished = breaks, [], False  # type: ignore[var-annotated]

    def log(self, values: dict[str, float], step: int) -> None:
        if self.breaks == "log":
            raise ConnectionError("no route\nto host")
        self.logged.append((step, values))

    def finish(self) -> None:
        if self.breaks == "finish":
            raise TimeoutError("slow")
        self.finished = True


RECORD: dict[str, Any] = {
    "step": 3, "phase": "search", "loss": 1.5, "kept": 1, "search_loss": math.nan, "ok": True, "widths": {"a": 1},
}  # fmt: skip


def test_finite_numbers_are_logged_at_their_step() -> None:
    tracker = Tracker()
    active = Trackers([tracker])
    active.log(RECORD, "train")
    active.close()
    assert tracker.logged == [(3, {"train/loss": 1.5, "train/kept": 1.0})]
    assert tracker.finished


@pytest.mark.parametrize("breaks", ["log", "finish"])
def test_broken_tracker_is_dropped_with_one_warning(breaks: str, caplog: pytest.LogCaptureFixture) -> None:
    broken, sound = Tracker(breaks), Tracker()
    active = Trackers([broken, sound])
    with caplog.at_level(logging.WARNING):
        active.log(RECORD, "train")
        active.log(RECORD, "train")
        active.close()
    assert len(sound.logged) == 2
    assert sound.finished
    assert len(caplog.records) == 1
    assert "the run continues without it" in caplog.text


def test_tracker_that_does_not_start_costs_a_warning(
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
    assert "mlflow does not start (OSError: down); the run continues without it" in caplog.text


def test_missing_package_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "find_spec", lambda _: None)
    with pytest.raises(MissingPackage, match=r"wandb is not installed; run: pip install wandb") as refused:
        require_trackers(["wandb"])
    assert "\n" not in str(refused.value)
    require_trackers([])


def test_unknown_tracker_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'; known are tensorboard"):
        from_mapping({"report_to": ["tensorbord"]})


def test_tensorboard_holds_the_curve(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with start_trackers(from_mapping({"report_to": "tensorboard"}), RunFolder(tmp_path), cpu=True) as active:
        assert len(active.active) == 1
        for step in (1, 2, 3):
            active.log({**RECORD, "step": step, "loss": 1.0 / step}, "train")
    events = EventAccumulator(str(tmp_path / "trackers" / "prunetune"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == pytest.approx({step: 1.0 / step for step in (1, 2, 3)})


TABLE = "| task | pruned |\n| --- | --- |\n| a\\|b | 0.75 |"
SCORES = {"accuracy": 0.75, "nll": math.nan}


def test_result_of_a_run_goes_on_with_its_curve(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, folder = from_mapping({"report_to": "tensorboard"}), RunFolder(tmp_path)
    with start_trackers(config, folder, cpu=True) as active:
        active.log({**RECORD, "step": 1, "loss": 1.0}, "train")
    with start_trackers(config, folder, cpu=True) as active:
        active.log_result(SCORES, TABLE, tmp_path / "report.html", 9)
    events = EventAccumulator(str(tmp_path / "trackers" / "prunetune"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("final/accuracy")] == [(9, 0.75)]
    assert [event.step for event in events.Scalars("train/loss")] == [1]
    (text,) = events.Tensors("final/scores/text_summary")
    assert text.tensor_proto.string_val == [TABLE.encode()]


def test_tracker_that_takes_a_table_or_a_page_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    class Package:
        """Of wandb and mlflow what is called."""

        @staticmethod
        def Html(page: str) -> str:
            return page

        @staticmethod
        def log_text(text: str, name: str) -> None:
            sent.append((name, text))

    class Taking(Tracker):
        def log_artifact(self, path: str) -> None:
            sent.append(path)

    monkeypatch.setattr(trackers, "import_module", lambda _: Package)
    wandb, mlflow, trackio = Taking(), Taking(), Taking()
    wandb.name, mlflow.name, trackio.name = "wandb", "mlflow", "trackio"
    Trackers([wandb, mlflow, trackio]).log_result(SCORES, TABLE, tmp_path / "report.html", 9)
    page = str(tmp_path / "report.html")
    assert wandb.logged == [(9, {"final/accuracy": 0.75}), (9, {"final/report": page})]
    assert sent == [("scores.md", TABLE), page]
    assert trackio.logged == [(9, {"final/accuracy": 0.75})]


def test_tracker_that_refuses_a_page_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Tracker()
    broken.name = "wandb"
    with caplog.at_level(logging.WARNING):
        Trackers([broken]).log_result(SCORES, TABLE, tmp_path / "report.html", 9)
    assert "wandb failed (" in caplog.text
