"""Helpers of tests of several sizes: a larger size as a run leaves it, and the job of a smaller one inside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prunetune.train.checkpoints import TrainingState
from prunetune.train.job import TrainingJob
from prunetune.train.loop import tune_and_prune
from support.loop import KEEP, MemoryStore, config_of, copied, job_of


def larger(weights: str, family: str) -> TrainingState:
    """The state of a size that was cut and tuned."""
    store = MemoryStore()
    tune_and_prune(job_of(config_of({"train": {"weights": weights}}), family=family, store=store))
    state = store.latest()
    assert state is not None
    return state


def smaller(state: TrainingState, weights: str, family: str, *, cuts: int = 1, **train: Any) -> TrainingJob:
    """The job of a smaller size inside it, which is cut further before its first step, or step by step."""
    changes = {"budget": {"keep": 0.4}, "train": {"weights": weights, "steps": 3, **train}, "search": {"cuts": cuts}}
    job = job_of(config_of(changes), family=family)
    return replace(job, start_state=copied(state), schedule=replace(job.schedule, start_keep=KEEP))
