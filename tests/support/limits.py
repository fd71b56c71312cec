"""Helpers of tests of limits: a monitored tiny run, and a driver that restarts it after a roll-back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.config.score_limits import ScoreLimit
from prunetune.data.batches import BatchStream
from prunetune.data.encoding import Example
from prunetune.plan import Plan
from prunetune.pruning.sites import find_sites
from prunetune.search.plan_rules import PlanConstraints
from prunetune.train.adapters import trainable_parameters
from prunetune.train.checkpoints import Checkpoints, CheckpointStore
from prunetune.train.job import TrainingJob
from prunetune.train.loop import tune_and_prune
from prunetune.train.losses import mean_loss
from prunetune.train.schedule import build_schedule
from prunetune.train.validation import RolledBack
from support.models import tiny

RECIPE: dict[str, Any] = {
    "budget": {"keep": 0.4, "align": 8},
    "train": {"steps": 12, "batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 1, "validate_every": 1},
    "lora": {"rank": 4},
    "search": {"share": 0.5, "settle": 0.25, "init_batches": 2, "batch_size": 4, "anneal": 1.0},
}


def config_of(**changes: Any) -> RunConfig:
    return from_mapping(merge_mappings(RECIPE, changes))


def examples(count: int = 24, seed: int = 0) -> tuple[Example, ...]:
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        prompt = torch.randint(3, 8, (2 + index % 5,), generator=rng).tolist()
        rows.append(Example((1, *prompt, *[prompt[-1]] * 3, 2), len(prompt) + 1, f"row {index}"))
    return tuple(rows)


def closed(model: Any) -> float:
    """The share removed, measured at the consumers: what hooks and cuts take from an all-ones input."""
    sites = find_sites(tiny())
    kept, whole = 0.0, 0.0
    for site in sites:
        consumer = model.get_submodule(site.consumer.module)
        seen = torch.ones(1, consumer.in_features)
        for hook in consumer._forward_pre_hooks.values():
            (seen,) = hook(consumer, (seen,))
        kept += float(seen.sum())
        whole += site.units * site.consumer.rows_per_unit
    return 1 - kept / whole


def on_guard(model: Any) -> float:
    return mean_loss(model, examples(6, seed=9), 0, 16384)


@dataclass
class Looker:
    """A monitor whose score is a function of the model as it is."""

    limits: tuple[ScoreLimit, ...]
    good_checkpoints: CheckpointStore
    score_function: Callable[[Any], float] = closed
    needs_dense_scores: bool = True
    plans: dict[int, Plan] = field(default_factory=dict)

    def score(self, model: Any) -> dict[str, float]:
        return {"guard.nll": self.score_function(model)}

    def record_decision(self, record: dict[str, Any], plan: Plan) -> None:
        self.plans[record["step"]] = plan


@dataclass
class Notes:
    """An observer that keeps all records."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)

    def step(self, record: dict[str, Any]) -> None:
        self.steps.append(record)

    def validation(self, record: dict[str, Any]) -> None:
        self.validations.append(record)


@dataclass
class Run:
    """Results of a run by `drive`."""

    plan: Plan
    job: TrainingJob
    notes: Notes
    watch: Looker
    roll_backs: int

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in trainable_parameters(self.job.model).items()}

    @property
    def seen(self) -> dict[str, Any]:
        state = self.job.checkpoints.latest()
        assert state is not None
        return state.validation_history


def drive(
    config: RunConfig,
    folder: Path,
    *gates: str,
    score: Callable[[Any], float] = closed,
    watched: bool = True,
    keeper: CheckpointStore | None = None,
) -> Run:
    """Run the loop, and again after each roll-back, as the pipeline does."""
    notes, kept = Notes(), keeper or Checkpoints(folder / "checkpoints")
    watch = Looker(tuple(ScoreLimit.parse(gate) for gate in gates), Checkpoints(folder / "good"), score)
    for roll_backs in range(100):
        job = job_of(config, notes, kept, watch if watched else None)
        try:
            return Run(tune_and_prune(job), job, notes, watch, roll_backs)
        except RolledBack:
            continue
    raise AssertionError("roll-backs do not end")


def job_of(config: RunConfig, notes: Notes, keeper: CheckpointStore, watch: Looker | None) -> TrainingJob:
    model = tiny().requires_grad_(False)
    return TrainingJob(
        model=model,
        sites=find_sites(model),
        constraints=PlanConstraints(config.layout, config.budget.align),
        train_stream=BatchStream(examples(), config.train.batch_size, 1),
        search_stream=BatchStream(examples(seed=1), config.search.batch_size, 2),
        valid_examples=examples(4, seed=2),
        pad_id=0,
        config=config,
        schedule=build_schedule(config),
        checkpoints=keeper,
        observer=notes,
        accelerator=Accelerator(cpu=True),
        monitor=watch,
    )


def identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
