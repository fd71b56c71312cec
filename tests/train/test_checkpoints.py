"""Laws of checkpoints: whatever is changed in one, it is passed over, and it fits one base model only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune.errors import RunFolderError
from prunetune.model.provenance import ModelIdentity
from prunetune.train.checkpoints import Checkpoints, TrainingState
from support.models import random_plan, tiny

ODD: tuple[Any, ...] = (None, [], {}, 5, "x", True, math.nan, {"sha256": 5})
GROUPS = {name: {"w": torch.arange(4.0)} for name in ("adapters", "generator_optimizer")}


def state_at(step: int) -> TrainingState:
    history = {"last": {"valid.nll": math.nan}, "events": ({"step": 2},), "by_layer": {10: 1, 9: 2}}
    return TrainingState(step, random_plan(tiny()), True, GROUPS, history, {"skipped": 1}, 2.5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path_factory.mktemp("checkpoints"))
    for step in (3, 6):
        checkpoints.save(state_at(step))
    return checkpoints


def variants(value: Any) -> Iterator[Any]:
    """A JSON value with one entry, at any depth, left out or replaced."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, entry in items[:3]:
        copies = value.copy()
        del copies[key]
        yield copies
        for replaced in (*variants(entry), *(odd for odd in ODD if json.dumps(odd) != json.dumps(entry))):
            copies = value.copy()
            copies[key] = replaced
            yield copies
    if isinstance(value, dict):
        yield {**value, "later": 1}


def step_of(checkpoints: Checkpoints) -> int:
    state = checkpoints.latest()
    return state.step if state else 0


def test_state_is_read_as_it_was_saved(saved: Checkpoints) -> None:
    state, expected = saved.latest(), state_at(6)
    assert state is not None
    assert (state.step, state.plan, state.is_cut, state.seconds) == (6, expected.plan, True, 2.5)
    assert math.isnan(state.validation_history["last"]["valid.nll"])
    assert all(torch.equal(state.tensors[name]["w"], GROUPS[name]["w"]) for name in GROUPS)


def test_any_change_of_the_state_file_is_damage(saved: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    file = saved.folder / "step-0000006" / "state.json"
    written = file.read_text()
    values = json.loads(written)
    changed = [*ODD, *variants(values), values | {"step": 99}]
    assert len(changed) > 100
    try:
        for text in (*map(json.dumps, changed), "", "{", written[:-2], "[" * 100_000, "\udcff"):
            file.write_text(text, encoding="utf-8", errors="surrogateescape")
            caplog.clear()
            assert step_of(saved) == 3, text[:200]
            assert "step-0000006: a damaged checkpoint is passed over" in caplog.text
    finally:
        file.write_text(written)
    assert step_of(saved) == 6


def test_state_of_the_first_version_is_read_unless_it_is_damaged(tmp_path: Path) -> None:
    """Version 0.1.0 sealed the tensors alone."""
    checkpoints = Checkpoints(tmp_path)
    for step in (3, 6):
        checkpoints.save(state_at(step))
    file = tmp_path / "step-0000006" / "state.json"
    values = json.loads(file.read_text())
    del values["base"], values["sha256"]["state.json"]
    file.write_text(json.dumps(values))
    assert step_of(checkpoints) == 6
    for damage in ({"step": 99}, {"step": None}, {"sha256": 5}, {"plan": 7}, {"plan": {}}):
        file.write_text(json.dumps(values | damage))
        assert step_of(checkpoints) == 3, damage


def test_newest_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (9_999_999, 10_000_000):
        checkpoints.save(state_at(step))
    assert step_of(checkpoints) == 10_000_000


def test_checkpoint_of_another_base_model_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "dense" / "model.safetensors"
    weights.parent.mkdir()
    (weights.parent / "config.json").write_text("{}")
    weights.write_bytes(b"1234")
    folder, name = tmp_path / "checkpoints", str(weights.parent)
    Checkpoints(folder, ModelIdentity(name)).save(state_at(3))
    assert step_of(Checkpoints(folder, ModelIdentity(name))) == 3
    weights.write_bytes(b"1235")
    with pytest.raises(RunFolderError, match=r"step-0000003.*model\.safetensors changed.*--out") as refused:
        Checkpoints(folder, ModelIdentity(name)).latest()
    assert "\n" not in str(refused.value)
    assert step_of(Checkpoints(folder)) == 3  # by those who only report on a run
