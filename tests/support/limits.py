"""Helpers of tests of limits: a monitored tiny run, and a driver that restarts it after a roll-back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.config.score_limits import QUALITY, STAGE_SCORE, ScoreLimit
from prunetune.data.batches import BatchStream
from prunetune.pipeline.monitor import score_limits
from prunetune.pipeline.prepare import resolve_auto
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
from support.loop import RecordingObserver, examples
from support.models import tiny

RECIPE: dict[str, Any] = {
    "budget": {"keep": 0.4, "align": 8},
    "train": {"steps": 12, "batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 1, "validate_every": 1},
    "lora": {"rank": 4},
    # Cuts before the steps 1, 3, 5 and 7; or the search of a generator, to step 6, settled at step 9.
    "search": {"cuts": 4, "span": 0.75, "share": 0.5, "settle": 0.25, "init_batches": 2, "batch_size": 4},
}


def config_of(**changes: Any) -> RunConfig:
    return from_mapping(merge_mappings(RECIPE, changes))


def removed_share(model: Any) -> float:
    """The share removed, measured at the consumers: what hooks and cuts remove from an input of ones."""
    sites = find_sites(tiny())
    kept, total = 0.0, 0.0
    for site in sites:
        total += site.units * site.consumer.rows_per_unit
        consumer = dict(model.named_modules()).get(site.consumer.module)
        if consumer is None:  # removed whole
            continue
        inputs = torch.ones(1, consumer.in_features)
        for hook in consumer._forward_pre_hooks.values():
            (inputs,) = hook(consumer, (inputs,))
        kept += float(inputs.sum())
    return 1 - kept / total


def guard_nll(model: Any) -> float:
    return mean_loss(model, examples(6, seed=9), 0, 16384)


@dataclass
class FakeMonitor:
    """A monitor whose score is a function of the current model."""

    limits: tuple[ScoreLimit, ...]
    good_checkpoints: CheckpointStore
    score_function: Callable[[Any], float] = removed_share
    needs_dense_scores: bool = True
    plans: dict[int, Plan] = field(default_factory=dict)

    def score(self, model: Any, *, is_judged: bool) -> dict[str, float]:
        removed = self.score_function(model)
        kept = 1 - removed
        quality = {QUALITY: kept, f"{STAGE_SCORE}accuracy": kept, f"{STAGE_SCORE}nll": 2 - kept} if is_judged else {}
        return {"guard.nll": removed} | quality

    def record_decision(self, record: dict[str, Any], plan: Plan) -> None:
        self.plans[record["step"]] = plan


@dataclass
class MonitoredRun:
    """Results of a run by `run_with_limits`."""

    plan: Plan
    job: TrainingJob
    observer: RecordingObserver
    monitor: FakeMonitor
    roll_backs: int

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in trainable_parameters(self.job.model).items()}

    @property
    def history(self) -> dict[str, Any]:
        state = self.job.checkpoints.latest()
        assert state is not None
        return state.validation_history


def run_with_limits(
    config: RunConfig,
    folder: Path,
    *limits: str,
    score: Callable[[Any], float] = removed_share,
    monitored: bool = True,
    store: CheckpointStore | None = None,
) -> MonitoredRun:
    """Run the loop, and again after each roll-back, as the pipeline does."""
    observer, store = RecordingObserver(), store or Checkpoints(folder / "checkpoints")
    all_limits = (*map(ScoreLimit.parse, limits), *score_limits(config))
    monitor = FakeMonitor(all_limits, Checkpoints(folder / "good"), score)
    for roll_backs in range(100):
        job = job_of(config, observer, store, monitor if monitored else None)
        try:
            return MonitoredRun(tune_and_prune(job), job, observer, monitor, roll_backs)
        except RolledBack:
            continue
    raise AssertionError("roll-backs do not end")


def job_of(
    config: RunConfig,
    observer: RecordingObserver,
    store: CheckpointStore,
    monitor: FakeMonitor | None,
    good: CheckpointStore | None = None,
) -> TrainingJob:
    model = tiny().requires_grad_(False)
    sites = find_sites(model)
    config = resolve_auto(config, sites)
    return TrainingJob(
        model=model,
        sites=sites,
        constraints=PlanConstraints(config.layout, config.budget.align),
        train_stream=BatchStream(examples(), config.train.batch_size, 1),
        search_stream=BatchStream(examples(seed=1), config.search.batch_size, 2),
        valid_examples=examples(4, seed=2),
        pad_id=0,
        config=config,
        schedule=build_schedule(config),
        checkpoints=store,
        observer=observer,
        monitor=monitor,
        good_checkpoints=good or (monitor.good_checkpoints if monitor else None),
    )
