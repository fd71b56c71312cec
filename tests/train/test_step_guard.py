"""Laws of recovery: a skipped batch changes no weight, smaller passes give the same step, both survive a resumption."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune.errors import ModelError
from prunetune.train.adapters import trainable_parameters
from prunetune.train.loop import tune_and_prune
from prunetune.train.passes import PaddedPasses
from prunetune.train.schedule import learning_rate
from support.loop import GENERATOR, AllCheckpoints, config_of, identical, job_of, losses, weights_of

Tune = Callable[..., Any]


def give_nan(monkeypatch: pytest.MonkeyPatch, calls: Sequence[int], *, gradient: bool = False) -> None:
    """Tuning passes of these numbers (from 1) give NaN, as the loss or in the gradient alone."""
    genuine, count = PaddedPasses.tune, [0]

    def tune(self: PaddedPasses, *arguments: Any) -> Any:
        result = genuine(self, *arguments)
        count[0] += 1
        if count[0] in calls:
            next(iter(trainable_parameters(self.model).values())).grad.fill_(math.nan)  # type: ignore[union-attr]
            return result if gradient else {**result, "loss": math.nan}
        return result

    monkeypatch.setattr(PaddedPasses, "tune", tune)


def rates(job: Any) -> list[float]:
    return [record["lr"] for record in job.observer.steps]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("at", [1, 6, 9])  # in each phase
def test_batch_with_nan_is_skipped_and_halves_learning_rates(
    gradient: bool, at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    give_nan(monkeypatch, [at], gradient=gradient)
    job = job_of(config_of())
    with caplog.at_level(logging.WARNING):
        tune_and_prune(job)
    assert all(weight.isfinite().all() for weight in weights_of(job).values())
    train = job.config.train
    assert rates(job) == [learning_rate(step, train) * (0.5 if step + 1 > at else 1) for step in range(10)]
    assert f"at step {at} (rows row" in caplog.text


def test_too_many_skipped_batches_fail_with_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    give_nan(monkeypatch, range(1, 11))
    with pytest.raises(ModelError, match=r"loss is nan at step 3 \(rows row .*2 batches were skipped before.*--resume"):
        tune_and_prune(job_of(config_of({"train": {"max_skipped": 2}})))


def test_nan_gate_gradients_do_not_change_the_generator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    genuine = PaddedPasses.gate_gradients

    def gate_gradients(self: PaddedPasses, *arguments: Any) -> Any:
        losses, gate_gradients = genuine(self, *arguments)
        return losses, {name: gradient * math.nan for name, gradient in gate_gradients.items()}

    monkeypatch.setattr(PaddedPasses, "gate_gradients", gate_gradients)
    store = AllCheckpoints(tmp_path)
    job = job_of(config_of(GENERATOR), store=store)
    tune_and_prune(job)
    first, last = store.at(1).latest(), store.at(10).latest()
    assert first is not None
    assert last is not None
    assert identical(first.tensors["generator"], last.tensors["generator"])
    assert all(weight.isfinite().all() for weight in last.tensors["generator"].values())
    assert last.guard_state["skipped"] == 4


def test_resumed_run_remembers_skipped_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    every = AllCheckpoints(tmp_path)
    with monkeypatch.context() as patched:
        give_nan(patched, [2])
        whole = job_of(config_of(), store=every)
        plan = tune_and_prune(whole)
    for step in (2, 5, 8):
        resumed = job_of(config_of(), store=every.at(step))
        assert tune_and_prune(resumed) == plan
        assert identical(weights_of(resumed), weights_of(whole))
        assert rates(resumed) == rates(whole)[step:]


def limit_memory(monkeypatch: pytest.MonkeyPatch, max_tokens: int, at: int = 1) -> None:
    """From tuning pass `at` on, larger passes than this run out of memory after they added to the gradients."""
    genuine, count = PaddedPasses.tune, [0]

    def tune(self: PaddedPasses, *arguments: Any) -> Any:
        count[0] += 1
        result = genuine(self, *arguments)
        if count[0] >= at and self.size.micro_tokens > max_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(PaddedPasses, "tune", tune)


def test_smaller_passes_give_the_same_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = {"train": {"micro_tokens": 16}}
    whole, every = job_of(config_of(small)), AllCheckpoints(tmp_path)
    plan = tune_and_prune(whole)
    limit_memory(monkeypatch, max_tokens=16)
    job = job_of(config_of({"train": {"micro_tokens": 64}}), store=every)
    with caplog.at_level(logging.WARNING):
        assert tune_and_prune(job) == plan
    assert "passes of 16 tokens" in caplog.text
    for name, weight in weights_of(job).items():
        torch.testing.assert_close(weight, weights_of(whole)[name], rtol=1e-3, atol=1e-4)
    resumed = job_of(config_of({"train": {"micro_tokens": 64}}), store=every.at(5))
    monkeypatch.undo()
    assert tune_and_prune(resumed) == plan
    assert identical(weights_of(resumed), weights_of(job))
    assert losses(resumed) == losses(job)[5:]


def test_example_too_large_for_memory_turns_recomputation_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, every = job_of(config_of()), AllCheckpoints(tmp_path)
    plan = tune_and_prune(whole)
    genuine = PaddedPasses.tune

    def tune(self: PaddedPasses, *arguments: Any) -> Any:
        result = genuine(self, *arguments)
        if not self.size.recompute:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(PaddedPasses, "tune", tune)
    job = job_of(config_of(), store=every)
    with caplog.at_level(logging.WARNING):
        assert tune_and_prune(job) == plan
    assert caplog.text.count("are recomputed") == 1
    for name, weight in weights_of(job).items():
        torch.testing.assert_close(weight, weights_of(whole)[name], rtol=1e-3, atol=1e-4)
    resumed = job_of(config_of(), store=every.at(5))
    assert tune_and_prune(resumed) == plan
    assert identical(weights_of(resumed), weights_of(job))
    with pytest.raises(torch.OutOfMemoryError):
        tune_and_prune(job_of(config_of({"train": {"checkpointing": "off"}})))


def test_example_too_large_even_with_recomputation_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, max_tokens=0)
    with pytest.raises(torch.OutOfMemoryError):
        tune_and_prune(job_of(config_of()))
