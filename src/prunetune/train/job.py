"""What a training run works on, and the interfaces of those who record and watch it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from prunetune.config.recipe import RunConfig
from prunetune.config.score_limits import ScoreLimit
from prunetune.data.batches import BatchStream
from prunetune.data.encoding import Example
from prunetune.plan import Plan
from prunetune.pruning.units import Site, hidden_site
from prunetune.search.plan_rules import PlanConstraints
from prunetune.train.checkpoints import CheckpointStore, TrainingState
from prunetune.train.forward import Teacher
from prunetune.train.parallel.ranks import SINGLE_PROCESS, Ranks
from prunetune.train.schedule import Schedule
from prunetune.utils.json_lines import JsonObject


class Observer(Protocol):
    """Gets the record of every step and validation."""

    def step(self, record: JsonObject) -> None:
        """A tuning step is done."""

    def validation(self, record: JsonObject) -> None:
        """The decided sub-network was scored."""


class Monitor(Protocol):
    """What a validation scores besides the loss on the validation split, and the limits on these scores."""

    @property
    def limits(self) -> tuple[ScoreLimit, ...]:
        """Limits on the scores."""

    @property
    def needs_dense_scores(self) -> bool:
        """Whether the dense model is scored before the first step."""

    def score(self, model: Any, *, is_judged: bool) -> dict[str, float]:
        """Scores by metric of the model as it is, which the caller has gated or cut; if judged, its quality, too."""

    def record_decision(self, record: JsonObject, plan: Plan) -> None:
        """This plan was validated, with this outcome."""


@dataclass(frozen=True)
class TrainingJob:
    """Everything that `tune_and_prune` is given."""

    model: Any  # dense, on its device, frozen; adapters are added to it
    sites: tuple[Site, ...]
    constraints: PlanConstraints
    train_stream: BatchStream
    search_stream: BatchStream
    valid_examples: tuple[Example, ...]
    pad_id: int
    config: RunConfig  # `resolve_auto` has decided what depends on the model's size
    schedule: Schedule
    checkpoints: CheckpointStore
    observer: Observer
    teacher: Teacher | None = None
    monitor: Monitor | None = None
    good_checkpoints: CheckpointStore | None = None  # of states to roll back to, or to end with (keep_best)
    ranks: Ranks = SINGLE_PROCESS
    given_plan: Plan | None = None  # of a baseline: one cut, then tuning
    start_adapters: Mapping[str, Tensor] | None = None  # of the tuned dense model, to begin as it ended
    start_state: TrainingState | None = None  # of a larger size, from whose cut model this one goes on
    branch_checkpoints: CheckpointStore | None = None  # gets the state that a smaller size goes on from

    @property
    def uses_generator(self) -> bool:
        """Whether a generator decides (recipes/paper.yaml)."""
        return self.given_plan is None and self.config.search.method == "generator"

    @property
    def weight_owner(self) -> Any | None:
        """The model, if any, that owns frozen dense weights which the student shares after the cut: the teacher."""
        shares = self.teacher is not None and self.teacher.shares_weights and self.config.train.weights != "all"
        shares = shares and hidden_site(self.sites) is None  # views are of rows or columns, and these lose both
        return self.teacher.model if self.teacher and shares else None
