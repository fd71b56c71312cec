"""Shared by tests of train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from prunetune.config.fields import merged
from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.data.batches import Stream
from prunetune.data.templates import Example
from prunetune.plan import Plan
from prunetune.pruning.sites import find_sites
from prunetune.search.select import Shape
from prunetune.train.adapters import adapters, add_adapters
from prunetune.train.checkpoints import Checkpoints, Forgetful, Keeper, State
from prunetune.train.job import Job
from prunetune.train.schedule import given_plan, schedule_of
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
    "search": {"share": 0.4, "settle": 0.3, "evidence": 2, "batch_size": 4},
}


def config_of(changes: dict[str, Any] | None = None) -> RunConfig:
    return from_mapping(merged(RECIPE, changes or {}))


def examples(count: int = 24, seed: int = 0) -> tuple[Example, ...]:
    """Prompts of random tokens; the answer repeats the last one three times: soon learnt."""
    rng = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        prompt = torch.randint(3, 8, (2 + index % 5,), generator=rng).tolist()
        made.append(Example((1, *prompt, *[prompt[-1]] * 3, 2), len(prompt) + 1, f"row {index}"))
    return tuple(made)


class Notes:
    """Keeps all that the loop says."""

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
    keeper: Keeper | None = None,
    plan: Plan | None = None,
    model: Any = None,
) -> Job:
    model = tiny(family) if model is None else model
    model.requires_grad_(False)
    return Job(
        model=model,
        sites=find_sites(model),
        shape=Shape(config.layout, config.budget.align),
        train=Stream(examples(), config.train.batch_size, 1),
        search=Stream(examples(seed=1), config.search.batch_size, 2),
        valid=examples(4, seed=2),
        pad_id=0,
        config=config,
        schedule=given_plan(config) if plan else schedule_of(config),
        checkpoints=keeper or Forgetful(),
        observer=Notes(),
        accelerator=Accelerator(cpu=True),
        plan=plan,
    )


def weights_of(job: Job) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapters(job.model).items()}


def identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def losses(job: Job) -> list[float]:
    return [record["loss"] for record in job.observer.steps]  # type: ignore[attr-defined]


def search_losses(job: Job) -> list[float]:
    """0 where the search is over."""
    return [record.get("search_loss", 0.0) for record in job.observer.steps]  # type: ignore[attr-defined]


class Every:
    """Keeps each state in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def at(self, step: int) -> Checkpoints:
        return Checkpoints(self.folder / str(step))

    def save(self, state: State) -> None:
        self.at(state.step).save(state)

    def latest(self) -> State | None:
        return None


def tuned(model: Any) -> Any:
    """A model with random adapters on every linear."""
    model.requires_grad_(False)
    add_adapters(model, find_sites(model), config_of().lora, seed=0)
    rng = torch.Generator().manual_seed(1)
    for parameter in adapters(model).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=rng))
    return model
