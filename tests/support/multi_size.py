"""Helpers of tests of several sizes: a larger size as a run leaves it, and the job of a smaller one inside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from prunetune.plan import Plan
from prunetune.search.select import select
from prunetune.train.checkpoints import TrainingState
from prunetune.train.job import TrainingJob
from prunetune.train.loop import tune_and_prune
from support.loop import config_of, job_of


class MemoryStore:
    """A checkpoint store in memory: the newest state."""

    def __init__(self) -> None:
        self.state: TrainingState | None = None

    def save(self, state: TrainingState) -> None:
        self.state = replace(state, tensors={k: {n: t.clone() for n, t in v.items()} for k, v in state.tensors.items()})

    def latest(self) -> TrainingState | None:
        return self.state


def larger(weights: str, family: str) -> TrainingState:
    """The state of a size that was searched, cut and tuned."""
    store = MemoryStore()
    tune_and_prune(job_of(config_of({"train": {"weights": weights}}), family=family, store=store))
    assert store.state is not None
    return store.state


def smaller(state: TrainingState, weights: str, family: str, **train: Any) -> tuple[TrainingJob, Plan]:
    """The job of a smaller size inside it, and its plan."""
    config = config_of({"budget": {"keep": 0.4}, "train": {"weights": weights, "steps": 3, **train}})
    job = job_of(config, family=family)
    rng = torch.Generator().manual_seed(5)
    scores = {site.name: torch.randn(site.units, generator=rng) for site in job.sites}
    plan = select(scores, job.sites, 0.4, job.constraints, larger_plan=state.plan)
    return replace(job_of(config, family=family, plan=plan), start_state=state), plan
