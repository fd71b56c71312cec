"""What the loop works on, and who listens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from accelerate import Accelerator

from prunetune.config.recipe import RunConfig
from prunetune.config.score_limits import ScoreLimit
from prunetune.data.batches import BatchStream
from prunetune.data.encoding import Example
from prunetune.plan import Plan
from prunetune.pruning.sites import Site
from prunetune.search.select import PlanConstraints
from prunetune.train.checkpoints import CheckpointStore, TrainingState
from prunetune.train.losses import Teacher
from prunetune.train.parallel.ranks import SINGLE_PROCESS, Ranks
from prunetune.train.schedule import Schedule

StepRecord = dict[str, Any]


class Observer(Protocol):
    """Hears of every step and validation."""

    def step(self, record: StepRecord) -> None:
        """A tuning step is done."""

    def validation(self, record: StepRecord) -> None:
        """The decided sub-network was scored."""


class Monitor(Protocol):
    """Looks at the sub-network decided now from outside the loop: what a validation scores beside the loss on valid."""

    @property
    def limits(self) -> tuple[ScoreLimit, ...]:
        """Limits on the scores."""

    @property
    def needs_dense_scores(self) -> bool:
        """Whether the dense model is scored before the first step."""

    @property
    def good_checkpoints(self) -> CheckpointStore:
        """Of the states that a gate can go back to."""

    def score(self, model: Any) -> dict[str, float]:
        """Metrics by name, of the model as it is: gated by whoever calls, or cut."""

    def record_decision(self, record: StepRecord, plan: Plan) -> None:
        """This plan was validated, with this outcome."""


@dataclass(frozen=True)
class TrainingJob:
    """Everything the loop is given."""

    model: Any  # dense, on its device, frozen; adapters are added to it
    sites: tuple[Site, ...]
    constraints: PlanConstraints
    train_stream: BatchStream
    search_stream: BatchStream
    valid_examples: tuple[Example, ...]
    pad_id: int
    config: RunConfig  # in which `teaching.by_size` has decided
    schedule: Schedule
    checkpoints: CheckpointStore
    observer: Observer
    accelerator: Accelerator
    teacher: Teacher | None = None
    monitor: Monitor | None = None
    ranks: Ranks = SINGLE_PROCESS
    given_plan: Plan | None = None  # given for baselines and for further sizes: no search, only cut and tune
    start_state: TrainingState | None = None  # of a larger size, whose weights are gone on with
