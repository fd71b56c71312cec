"""Laws of a search that ends once its decisions stand still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prunetune.config import RunConfig
from prunetune.model.sites import kept_params
from prunetune.train import progress
from prunetune.train.loop import tune_and_prune
from test_train_loop import KEEP, Every, config_of, identical, job_of, losses, weights_of

STEPS, CALM = 20, 3


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "CALM", CALM)


def recipe(still: float, **search: Any) -> RunConfig:
    values = {"share": 0.6, "settle": 0.1, "anneal": 0.25, "still": still, **search}
    return config_of({"train": {"steps": STEPS, "checkpoint_every": 1}, "search": values})


def phases(job: Any) -> list[str]:
    return [record["phase"] for record in job.observer.steps]


def test_it_ends_once_nothing_moves_and_tuning_gets_the_rest() -> None:
    job = job_of(recipe(1.0))  # whatever moves counts as still
    plan = tune_and_prune(job)
    searched = job.schedule.anneal + CALM
    assert phases(job) == ["search"] * searched + ["settle"] * 2 + ["tune"] * (STEPS - searched - 2)
    assert kept_params(job.sites, plan) <= KEEP * sum(site.params for site in job.sites)


def test_it_takes_its_share_where_decisions_move_or_nobody_asked() -> None:
    asked, not_asked = job_of(recipe(1e-9, learning_rate=1.0)), job_of(recipe(0.0, learning_rate=1.0))
    assert tune_and_prune(asked) == tune_and_prune(not_asked)
    moved = [record.get("changed", 1.0) for record in asked.observer.steps][asked.schedule.anneal : 12]  # type: ignore[attr-defined]
    assert not any(all(one == 0 for one in moved[start : start + CALM]) for start in range(len(moved) - CALM + 1))
    assert phases(asked) == phases(not_asked) == ["search"] * 12 + ["settle"] * 2 + ["tune"] * 6


@pytest.mark.parametrize("gates", ["projected", "sampled"])
def test_resumed_at_any_step_equals_uninterrupted(gates: str, tmp_path: Path) -> None:
    config, every = recipe(0.9, gates=gates), Every(tmp_path)
    whole = job_of(config, keeper=every)
    plan = tune_and_prune(whole)
    assert phases(whole).count("search") < 12
    for step in range(1, STEPS):
        resumed = job_of(config, keeper=every.at(step))
        assert tune_and_prune(resumed) == plan
        assert losses(resumed) == losses(whole)[step:]
        changed = [[record.get("changed") for record in job.observer.steps] for job in (whole, resumed)]  # type: ignore[attr-defined]
        assert changed[1] == changed[0][step:]
        assert identical(weights_of(resumed), weights_of(whole))
