"""Helpers of tests of the training loop: a tiny job, its examples, an observer and a checkpoint store."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.data.batches import BatchStream
from prunetune.data.encoding import Example
from prunetune.plan import Plan
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import DEFAULT_UNITS, Site
from prunetune.search.plan_rules import PlanConstraints
from prunetune.train.adapters import add_adapters, expand_tensors, trainable_parameters
from prunetune.train.checkpoints import Checkpoints, CheckpointStore, NullCheckpointStore, TrainingState
from prunetune.train.job import TrainingJob
from prunetune.train.schedule import build_schedule, one_cut_schedule
from support.models import tiny

KEEP = 0.6
RECIPE: dict[str, Any] = {
    "budget": {"keep": KEEP, "align": 8},
    "train": {
        "steps": 10,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "checkpoint_every": 1,
        "validate_every": 5,
        "weights": "adapters",
    },
    "lora": {"rank": 4},
    "search": {"share": 0.4, "settle": 0.3, "init_batches": 2, "batch_size": 4},
}
GENERATOR: dict[str, Any] = {"search": {"method": "generator"}}  # of the same recipe: searches 4 steps, settles 3


def config_of(changes: dict[str, Any] | None = None) -> RunConfig:
    return from_mapping(merge_mappings(RECIPE, changes or {}))


def examples(count: int = 24, seed: int = 0) -> tuple[Example, ...]:
    """Prompts of random tokens; the answer repeats the last one three times, which is learnt quickly."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        prompt = torch.randint(3, 8, (2 + index % 5,), generator=rng).tolist()
        rows.append(Example((1, *prompt, *[prompt[-1]] * 3, 2), len(prompt) + 1, f"row {index}"))
    return tuple(rows)


class RecordingObserver:
    """An observer that keeps all records."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []

    def step(self, record: dict[str, Any]) -> None:
        self.steps.append(record)

    def validation(self, record: dict[str, Any]) -> None:
        self.validations.append(record)


def job_of(
    config: RunConfig,
    *,
    family: str = "llama",
    store: CheckpointStore | None = None,
    plan: Plan | None = None,
    model: Any = None,
    units: Collection[str] = DEFAULT_UNITS,
) -> TrainingJob:
    model = tiny(family) if model is None else model
    model.requires_grad_(False)
    return TrainingJob(
        model=model,
        sites=find_sites(model, units),
        constraints=PlanConstraints(config.layout, config.budget.align),
        train_stream=BatchStream(examples(), config.train.batch_size, 1),
        search_stream=BatchStream(examples(seed=1), config.search.batch_size, 2),
        valid_examples=examples(4, seed=2),
        pad_id=0,
        config=config,
        schedule=one_cut_schedule(config) if plan else build_schedule(config),
        checkpoints=store or NullCheckpointStore(),
        observer=RecordingObserver(),
        given_plan=plan,
    )


def weights_of(job: TrainingJob) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(job.model).items()}


def load_into_dense(model: Any, state: TrainingState, sites: Sequence[Site]) -> None:
    """Put a checkpoint's adapters, or the weights they were merged into, on a dense model: zero for removed units."""
    assert state.plan is not None
    for name, weight in expand_tensors(model, state.tensors["adapters"], state.plan, sites).items():
        model.get_parameter(name).data = weight


def identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def losses(job: TrainingJob) -> list[float]:
    return [record["loss"] for record in job.observer.steps]  # type: ignore[attr-defined]


def search_losses(job: TrainingJob) -> list[float]:
    """Loss of the search at each step; 0 after the search."""
    return [record.get("search_loss", 0.0) for record in job.observer.steps]  # type: ignore[attr-defined]


class AllCheckpoints:
    """A checkpoint store that keeps every state, in a folder for each step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def at(self, step: int) -> Checkpoints:
        return Checkpoints(self.folder / str(step))

    def save(self, state: TrainingState) -> None:
        self.at(state.step).save(state)

    def latest(self) -> TrainingState | None:
        return None


class MemoryStore:
    """A checkpoint store in memory that keeps every state by its step; `latest` is the state to start from."""

    def __init__(self, start: TrainingState | None = None) -> None:
        self.states: dict[int, TrainingState] = {}
        self.start = start

    def save(self, state: TrainingState) -> None:
        self.states[state.step] = copied(state)

    def latest(self) -> TrainingState | None:
        state = self.states[max(self.states)] if self.states else self.start
        return state and copied(state)


def copied(state: TrainingState) -> TrainingState:
    """The state with tensors of its own: training writes into those that it loads."""
    tensors = {name: {key: value.clone() for key, value in own.items()} for name, own in state.tensors.items()}
    return replace(state, tensors=tensors)


def tuned(model: Any) -> Any:
    """A model with random adapters on every linear."""
    model.requires_grad_(False)
    add_adapters(model, find_sites(model), config_of().lora, seed=0)
    rng = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=rng))
    return model
