"""Budgets on FLOPs, memory, file size, latency and throughput: the limit of each, and how it tightens during a search.

A run moves along one coordinate: 1 is the dense model, and `BudgetLimits.feasible_keep` the point where every limit
holds as it was stated. In between, limits fall in a straight line from what the dense model costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prunetune.config.quantities import Amount, format_amount
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.deployment import Cost, Costs, FlopsCost, MemoryCost, WeightsCost, max_cost
from prunetune.cost.latency_table import LatencyCost, LatencyTable, latency_costs
from prunetune.cost.layer_shapes import ModelShape, UnitCounts

TIMED_BUDGETS = ("latency", "throughput")  # these need a latency table


def costs_for_budget(
    kind: str, dense_shape: ModelShape, workload: WorkloadConfig, table: LatencyTable | None = None
) -> Costs:
    """The costs that a budget of this kind limits; raises `ConfigError` where they are not counted for the model."""
    if kind == "flops":
        return (FlopsCost(dense_shape, workload),)
    if kind == "memory":
        return (MemoryCost(dense_shape, workload),)
    if kind == "file":
        return (WeightsCost(dense_shape, workload),)
    assert table is not None, f"{kind} needs a table"
    return latency_costs(dense_shape, workload, table, "mix" if kind == "throughput" else workload.phase)


def make_budget_limit(kind: str, amount: Amount, costs: Costs, workload: WorkloadConfig) -> BudgetLimit:
    """The limit that an amount of this kind sets."""
    dense = max_cost(costs, costs[0].dense_shape.dense_counts())
    if kind != "throughput":
        return BudgetLimit(kind, costs, amount.resolve(dense), dense)
    tokens = float(workload.batch * workload.generate)
    return BudgetLimit(kind, costs, tokens / amount.resolve(tokens / dense), dense, tokens)


def make_budget_limits(
    amounts: Mapping[str, Amount], dense_shape: ModelShape, workload: WorkloadConfig, table: LatencyTable | None = None
) -> tuple[BudgetLimit, ...]:
    """The limits of all budgets other than `budget.keep`."""
    return tuple(
        make_budget_limit(kind, amount, costs_for_budget(kind, dense_shape, workload, table), workload)
        for kind, amount in amounts.items()
    )


@dataclass(frozen=True)
class BudgetLimit:
    """A limit on one kind of cost."""

    kind: str  # "flops", "memory", "file", "latency" or "throughput"
    costs: Costs  # the largest counts
    limit: float  # on the cost; of a throughput, on the seconds of a batch
    dense_cost: float
    batch_tokens: float = 0.0  # tokens generated for a batch of requests, if the kind is "throughput"

    @property
    def latency_table(self) -> LatencyTable | None:
        """The measured times that it is based on, if it is a limit on time."""
        return next((cost.table for cost in self.costs if isinstance(cost, LatencyCost)), None)

    @property
    def is_met_by_dense(self) -> bool:
        return self.dense_cost <= self.limit

    def cost(self, counts: UnitCounts) -> float:
        return max_cost(self.costs, counts)

    def limit_at(self, progress: float) -> float:
        """The limit at a progress from 0 (the dense cost) to 1 (the limit as stated)."""
        return max(self.limit, self.dense_cost + progress * (self.limit - self.dense_cost))

    def to_amount(self, cost: float) -> float:
        """A cost in the budget's own quantity: of a throughput, tokens per second."""
        return self.batch_tokens / cost if self.batch_tokens else cost

    def format_cost(self, cost: float) -> str:
        return format_amount(self.to_amount(cost), self.kind)


@dataclass(frozen=True)
class BudgetLimits:
    """All limits of a run other than `budget.keep`, and the prices of units under them."""

    limits: tuple[BudgetLimit, ...]
    requested_keep: float = 1.0  # budget.keep, if it is given too
    feasible_keep: float = 0.0  # share of the prunable parameters that a uniform plan within all limits keeps
    feasible_price_share: float = 0.0  # share of the units' prices that this plan keeps
    prices: Mapping[str, float] | None = None  # site -> price of one unit, without the sites inside it, in parameters
    prices_with_children: Mapping[str, float] | None = None  # site -> price of one unit, with the sites inside it

    def progress(self, coordinate: float) -> float:
        """How far a coordinate is on the way from the dense model (0) to where all limits hold (1)."""
        return 1.0 if coordinate <= self.feasible_keep else (1 - coordinate) / (1 - self.feasible_keep)

    def cost_limits_at(self, coordinate: float) -> tuple[tuple[Cost, float], ...]:
        """The limits on costs that hold at this coordinate."""
        progress = self.progress(coordinate)
        return tuple((cost, limit.limit_at(progress)) for limit in self.limits for cost in limit.costs)

    def params_share_at(self, coordinate: float) -> float:
        """Share of the prunable parameters that may remain at this coordinate."""
        return 1 - self.progress(coordinate) * (1 - self.requested_keep)

    def price_share_at(self, coordinate: float) -> float:
        """Share of all units' prices that is to remain there, for a loss that pulls to it."""
        return 1 - self.progress(coordinate) * (1 - self.feasible_price_share)
