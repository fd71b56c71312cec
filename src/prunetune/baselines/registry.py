"""The list of two-stage methods: what one is given, what it returns, and the decorator that adds it to the list."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunetune.cost.budget_limits import BudgetLimits
from prunetune.data.batches import Batch
from prunetune.plan import Plan
from prunetune.pruning.units import Site
from prunetune.search.select import Scores

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Calibration:
    """What every method is given: the dense model, its sites, and batches to measure it on."""

    model: Any  # frozen, in eval mode, on its device, without adapters
    sites: tuple[Site, ...]
    batches: tuple[Batch, ...]  # padded on the right; on the CPU or the model's device
    seed: int = 0
    limits: BudgetLimits | None = None  # budgets other than a share of the parameters

    def unit_price(self, site: Site) -> float:
        """What a unit of this site and all that it contains take of the budget: parameters, or prices under limits."""
        prices = self.limits.prices_with_children if self.limits else None
        return prices[site.name] if prices else site.total_unit_params


@dataclass(frozen=True)
class Baseline:
    """One two-stage method; calling it scores the units: {site: float32 [U] on the CPU}, higher ones are kept."""

    name: str  # in compare.methods
    score: Callable[[Calibration], Scores]
    source: str  # the paper and section it follows
    needs_gradients: bool = False
    # Biases that make up for what the plan removes: {consumer: float32 [H] on the CPU}, for `cut.add_biases`.
    biases: Callable[[Calibration, Plan], Mapping[str, Tensor]] | None = None

    @property
    def description(self) -> str:
        """One line: the first of the function's docstring."""
        return (self.score.__doc__ or "").strip().partition("\n")[0]

    def __call__(self, calibration: Calibration) -> Scores:
        with torch.set_grad_enabled(self.needs_gradients):
            return self.score(calibration)


BASELINES: dict[str, Baseline] = {}  # by name, in the order of tables


def baseline(
    name: str,
    *,
    source: str,
    needs_gradients: bool = False,
    biases: Callable[[Calibration, Plan], Mapping[str, Tensor]] | None = None,
) -> Callable[[Callable[[Calibration], Scores]], Baseline]:
    """Decorator that adds a scoring function to the methods of `prunetune compare`.

    Raises `ValueError` if the name is taken, or is not of lower-case letters, digits and single dashes.
    """
    if name in BASELINES or not NAME.fullmatch(name):
        raise ValueError(f"baseline {name!r}: a new name of lower-case letters, digits and dashes is needed")

    def register(score: Callable[[Calibration], Scores]) -> Baseline:
        BASELINES[name] = Baseline(name, score, source, needs_gradients, biases)
        return BASELINES[name]

    return register
