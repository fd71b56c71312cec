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
from support.loop import MemoryStore, config_of, copied, job_of


def larger(weights: str, family: str) -> TrainingState:
    """The state of a size that was cut and tuned."""
    store = MemoryStore()
    tune_and_prune(job_of(config_of({"train": {"weights": weights}}), family=family, store=store))
    state = store.latest()
    assert state is not None
    return state


def smaller(state: TrainingState, weights: str, family: str, **train: Any) -> tuple[TrainingJob, Plan]:
    """The job of a smaller size inside it, and its plan."""
    config = config_of({"budget": {"keep": 0.4}, "train": {"weights": weights, "steps": 3, **train}})
    job = job_of(config, family=family)
    rng = torch.Generator().manual_seed(5)
    scores = {site.name: torch.randn(site.units, generator=rng) for site in job.sites}
    plan = select(scores, job.sites, 0.4, job.constraints, larger_plan=state.plan)
    return replace(job_of(config, family=family, plan=plan), start_state=copied(state)), plan
