"""Laws of the generator's trainer: its learning rate, its clipped gradient, and when it learns no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prunetune.train import generator_trainer
from prunetune.train.generator_trainer import CLIP, ENOUGH_STEPS, SMALL_BUDGET_LOSS, generator_learning_rate
from prunetune.train.loop import tune_and_prune
from support.loop import AllCheckpoints, config_of, identical, job_of, losses, weights_of

SEARCH = {"search": {"method": "generator", "share": 1.0, "settle": 0.0, "offset": 0.0}}


def test_learning_rate_is_a_fifth_in_the_last_fifth_of_the_search() -> None:
    rates = [generator_learning_rate(step, 750, 1e-3) for step in range(750)]
    assert rates[:600] == [1e-3] * 600
    assert rates[600:] == pytest.approx([2e-4] * 150)
    assert [generator_learning_rate(step, 1, 1e-3) for step in range(2)] == pytest.approx([2e-4] * 2)


def test_numbers_of_the_early_stop_and_the_clip_are_the_authors() -> None:
    assert (SMALL_BUDGET_LOSS, ENOUGH_STEPS, CLIP) == (0.005, 4000, 3.0)


def test_generator_learns_no_more_after_enough_steps_in_a_row_on_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(generator_trainer, "ENOUGH_STEPS", 3)
    monkeypatch.setattr(generator_trainer, "SMALL_BUDGET_LOSS", 9.0)
    every, config = AllCheckpoints(tmp_path), config_of(SEARCH)
    whole = job_of(config, store=every)
    plan = tune_and_prune(whole)
    steps = whole.observer.steps  # type: ignore[attr-defined]
    assert ["ratio_loss" in record for record in steps] == [True] * 3 + [False] * 7
    assert len({record["kept"] for record in steps[3:]}) == 1  # the decision is the final one from there on
    states = [every.at(step).latest() for step in (3, 9)]
    first, last = (state.tensors["generator"] for state in states if state is not None)
    assert identical(first, last)
    resumed = job_of(config, store=every.at(2))
    assert tune_and_prune(resumed) == plan
    assert identical(weights_of(resumed), weights_of(whole))
    assert losses(resumed) == losses(whole)[2:]


def test_a_step_off_budget_starts_the_count_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    every, job = AllCheckpoints(tmp_path), None
    monkeypatch.setattr(generator_trainer, "SMALL_BUDGET_LOSS", 0.1)
    job = job_of(config_of(SEARCH), store=every)
    tune_and_prune(job)
    count = 0
    for record in job.observer.steps[:-1]:  # type: ignore[attr-defined]
        count = count + 1 if record["ratio_loss"] <= 0.1 else 0
        state = every.at(record["step"]).latest()
        assert state is not None
        assert torch.equal(state.tensors["generator"]["steps_on_budget"], torch.tensor(count))
