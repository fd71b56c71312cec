"""How long a run took, whatever ended its processes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from prunetune.errors import ModelError
from prunetune.pipeline import stages
from prunetune.pipeline.monitor import outcome
from prunetune.runs.folder import TUNING, RunFolder
from prunetune.train.checkpoints import Checkpoints, State


def test_timings_hold_what_ended_early_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for error in (KeyboardInterrupt, ModelError):
        with suppress(error), stages.timed(folder, TUNING):
            raise error
    first = folder.manifest()["timings"][TUNING]
    with stages.timed(folder, TUNING):
        pass
    assert folder.manifest()["timings"][TUNING] > first > 0


def test_a_killed_process_s_seconds_are_those_of_its_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.note(timings={TUNING: 1.5, "evaluate": 2.0})
    Checkpoints(folder.checkpoints).save(State(3, seconds=7.0))
    assert outcome(SimpleNamespace(folder=folder)) == {"timings": {TUNING: 7.0, "evaluate": 2.0}}  # type: ignore[arg-type]
