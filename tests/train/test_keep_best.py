"""Laws of `train.keep_best` and `train.patience`: what is left of a run is its best validation after the last cut."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prunetune.compare.cell import NewestState
from prunetune.pruning.units import dense_plan
from prunetune.train.checkpoints import Checkpoints
from prunetune.train.job import TrainingJob
from prunetune.train.loop import tune_and_prune
from prunetune.train.validation import Validation
from support.loop import MemoryStore, RecordingObserver, config_of, identical, job_of, weights_of

BEST = 7  # step
TWELVE: dict[str, Any] = {"train": {"steps": 12, "validate_every": 1}}
METHODS: dict[str, dict[str, Any]] = {
    "progressive": {"search": {"cuts": 2, "span": 0.2}},
    "generator": {"search": {"method": "generator", "share": 0.2, "settle": 0.2}},
}
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def _valley(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss on valid falls up to the step BEST, and rises after it."""

    def scores(validation: Validation, *_: Any, **__: Any) -> tuple[dict[str, float], float]:
        return {"valid.nll": 1 + abs(validation.job.observer.steps[-1]["step"] - BEST) / 10, "valid.perplexity": 1}, 0.0  # type: ignore[attr-defined]

    monkeypatch.setattr(Validation, "_timed_scores", scores)


def tuned(method: str, store: Any = None, good: Any = None, observer: Any = None, **train: Any) -> TrainingJob:
    """A finished job."""
    config = config_of({**TWELVE, **METHODS[method]})
    job = job_of(replace(config, train=replace(config.train, **train)), store=store or MemoryStore())
    job = replace(job, good_checkpoints=good or NewestState(), observer=observer or job.observer)
    tune_and_prune(job)
    return job


def final_state(job: TrainingJob) -> Any:
    state = job.checkpoints.latest()
    assert state is not None
    return state


@every_method
def test_kept_weights_are_those_of_the_best_validation_after_the_last_cut(method: str) -> None:
    store = MemoryStore()
    plain = final_state(tuned(method, store))
    kept = tuned(method, keep_best=True)
    final = final_state(kept)
    assert identical(weights_of(kept), store.states[BEST].tensors["adapters"])
    assert identical(final.tensors["adapters"], weights_of(kept)), "what is exported is the model in memory"
    assert (final.step, final.plan, final.validation_history["last"]["valid.nll"]) == (12, plain.plan, 1)
    assert plain.validation_history["last"]["valid.nll"] == 1.5


def test_best_before_the_last_cut_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "BEST", 1)  # a cut comes before step 2; from there on the loss rises
    final = final_state(tuned("progressive", keep_best=True))
    assert final.validation_history["good"]["step"] == 2
    monkeypatch.setattr(sys.modules[__name__], "BEST", 3)  # a generator's decision is cut before step 5
    final = final_state(tuned("generator", keep_best=True))
    assert final.validation_history["good"]["step"] == 5


def test_given_plan_ends_with_its_best_validation_too() -> None:
    config = config_of({"train": {**TWELVE["train"], "keep_best": True}})
    plan, store = dense_plan(job_of(config).sites), MemoryStore()
    tune_and_prune(replace(job_of(config, plan=plan, store=store), good_checkpoints=NewestState()))
    assert identical(store.states[12].tensors["adapters"], store.states[BEST].tensors["adapters"])


@every_method
def test_patience_stops_after_so_many_validations_without_a_better_one(method: str) -> None:
    stopped = final_state(tuned(method, patience=3))
    assert (stopped.step, stopped.validation_history["last"]["valid.nll"]) == (BEST + 3, 1.3), "the last, not the best"
    both = final_state(tuned(method, patience=2, keep_best=True))
    assert (both.step, both.validation_history["last"]["valid.nll"]) == (BEST + 2, 1)


class Killed(Exception):
    """In place of a signal."""


class KilledObserver(RecordingObserver):
    """An observer that ends the run at a validation."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last

    def validation(self, record: dict[str, Any]) -> None:
        super().validation(record)
        if record["step"] == self.last:
            raise Killed


@every_method
def test_resumed_after_any_validation_ends_with_the_same_weights(method: str, tmp_path: Path) -> None:
    def stores(folder: Path) -> dict[str, Checkpoints]:
        return {"store": Checkpoints(folder / "checkpoints"), "good": Checkpoints(folder / "good")}

    changes: dict[str, Any] = {"keep_best": True, "patience": 3, "checkpoint_every": 4}
    whole = tuned(method, **stores(tmp_path / "whole"), **changes)
    for step in (3, BEST, 9):
        folder = tmp_path / f"{step}"
        with pytest.raises(Killed):
            tuned(method, **stores(folder), observer=KilledObserver(step), **changes)
        resumed = tuned(method, **stores(folder), **changes)
        assert final_state(resumed).step == final_state(whole).step == BEST + 3
        assert identical(weights_of(resumed), weights_of(whole)), step
    again = tuned(method, **stores(folder), observer=KilledObserver(0), **changes)
    assert identical(weights_of(again), weights_of(whole)), "a finished run resumes to itself"


def test_early_stop_waits_for_the_state_that_a_smaller_size_goes_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "BEST", 0)
    config = config_of({**TWELVE, "search": {"cuts": 2, "span": 0.6}})  # cuts before the steps 1 and 4
    config = replace(config, train=replace(config.train, patience=1))
    alone, sized = (job_of(config, store=MemoryStore()) for _ in range(2))
    branches = MemoryStore()
    tune_and_prune(alone)
    tune_and_prune(replace(sized, branch_checkpoints=branches))
    assert (final_state(alone).step, final_state(sized).step) == (5, sized.schedule.branch_step) == (5, 6)
    assert list(branches.states) == [6]
