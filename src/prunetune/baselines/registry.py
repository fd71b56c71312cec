"""The list of two-stage methods: what one is given, what it returns, and the decorator that adds it to the list."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunetune.config.recipe import RunConfig
from prunetune.data.batches import Batch
from prunetune.errors import ConfigError
from prunetune.plan import Plan
from prunetune.pruning.units import Site
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.select import Scores, select

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
DEFAULT_BATCHES = 16  # that a method measures on, if the recipe's search.init_batches is 0


def _no_training_loss(step: int, gates: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    raise ConfigError("this baseline reads the training loss: run it by `prunetune compare`, or set gate_gradients")


@dataclass(frozen=True)
class Calibration:
    """What every method is given: the dense model, its sites, batches to measure it on, the recipe and its budget."""

    model: Any  # frozen, in eval mode, on its device, without adapters
    sites: tuple[Site, ...]
    batches: tuple[Batch, ...]  # padded on the right; on the CPU or the model's device
    config: RunConfig = field(default_factory=RunConfig)  # of this seed and budget, every `auto` resolved
    constraints: PlanConstraints = field(default_factory=PlanConstraints)
    # (step, gates) -> gradient at the gates, {site: [U]} each, of the recipe's training loss (answers and, where there
    # is a teacher, its logits, hidden states and texts) on the search split's batch of that step; weights are frozen.
    gate_gradients: Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]] = _no_training_loss

    @property
    def seed(self) -> int:
        """The seed of this cell of the comparison."""
        return self.config.seed

    @property
    def num_batches(self) -> int:
        """Batches of `gate_gradients` that a method measures on: search.init_batches."""
        return self.config.search.init_batches or DEFAULT_BATCHES

    def unit_price(self, site: Site) -> float:
        """What a unit of this site and all that it contains take of the budget: parameters, or prices under limits."""
        return self.constraints.unit_price(site)

    def select(self, scores: Scores) -> Plan:
        """The plan of the highest scores within the budget; raises `PlanError` if no plan is."""
        return select(scores, self.sites, self.config.budget.keep, self.constraints)

    def open_gates(self) -> dict[str, Tensor]:
        """Gates of one on every unit: {site: float32 [U]} on the model's device."""
        device = next(self.model.parameters()).device
        return {site.name: torch.ones(site.units, device=device) for site in self.sites}


@dataclass(frozen=True)
class Baseline:
    """One two-stage method. It returns scores, {site: float32 [U]} on the CPU, or a plan; higher scores are kept."""

    name: str  # in compare.methods
    function: Callable[[Calibration], Scores | Plan]
    source: str  # the paper and section it follows
    needs_gradients: bool = False
    # Changes the weights of the dense model, in place, to make up for what the plan will remove; called before the cut.
    compensate: Callable[[Calibration, Plan], None] | None = None

    @property
    def description(self) -> str:
        """One line: the first of the function's docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]

    def __call__(self, calibration: Calibration) -> Scores | Plan:
        """Run the function, with autograd on only where it `needs_gradients`."""
        with torch.set_grad_enabled(self.needs_gradients):
            return self.function(calibration)


BASELINES: dict[str, Baseline] = {}  # by name, in the order of tables


def baseline(
    name: str,
    *,
    source: str,
    needs_gradients: bool = False,
    compensate: Callable[[Calibration, Plan], None] | None = None,
) -> Callable[[Callable[[Calibration], Scores | Plan]], Baseline]:
    """Decorator that adds a function to the methods of `prunetune compare`; it returns scores or a plan.

    Raises `ValueError` if the name is taken, or is not of lower-case letters, digits and single dashes.
    """
    if name in BASELINES or not NAME.fullmatch(name):
        raise ValueError(f"baseline {name!r}: a new name of lower-case letters, digits and dashes is needed")

    def register(function: Callable[[Calibration], Scores | Plan]) -> Baseline:
        BASELINES[name] = Baseline(name, function, source, needs_gradients, compensate)
        return BASELINES[name]

    return register
