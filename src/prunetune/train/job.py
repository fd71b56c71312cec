"""What the loop works on, and who listens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from accelerate import Accelerator

from prunetune.config.limits import Gate
from prunetune.config.recipe import RunConfig
from prunetune.data.batches import Stream
from prunetune.data.templates import Example
from prunetune.plan import Plan
from prunetune.pruning.sites import Site
from prunetune.search.select import Shape
from prunetune.train.checkpoints import Keeper, State
from prunetune.train.losses import Teacher
from prunetune.train.parallel.ranks import ALONE, Ranks
from prunetune.train.schedule import Schedule

Record = dict[str, Any]


class Observer(Protocol):
    """Hears of every step and validation."""

    def step(self, record: Record) -> None:
        """A tuning step is done."""

    def validation(self, record: Record) -> None:
        """The decided sub-network was scored."""


class Watch(Protocol):
    """Looks at the sub-network decided now from outside the loop: what a validation scores beside the loss on valid."""

    @property
    def gates(self) -> tuple[Gate, ...]:
        """Limits on the scores."""

    @property
    def reference(self) -> bool:
        """Whether the dense model is scored before the first step."""

    @property
    def good(self) -> Keeper:
        """Of the states that a gate can go back to."""

    def scores(self, model: Any) -> dict[str, float]:
        """Metrics by name, of the model as it is: gated by whoever calls, or cut."""

    def decided(self, record: Record, plan: Plan) -> None:
        """This plan was validated, with this outcome."""


@dataclass(frozen=True)
class Job:
    """Everything the loop is given."""

    model: Any  # dense, on its device, frozen; adapters are added to it
    sites: tuple[Site, ...]
    shape: Shape
    train: Stream
    search: Stream
    valid: tuple[Example, ...]
    pad_id: int
    config: RunConfig  # in which `teaching.by_size` has decided
    schedule: Schedule
    checkpoints: Keeper
    observer: Observer
    accelerator: Accelerator
    teacher: Teacher | None = None
    watch: Watch | None = None
    ranks: Ranks = ALONE
    plan: Plan | None = None  # given for baselines and for further sizes: no search, only cut and tune
    start: State | None = None  # of a larger size, whose weights are gone on with
