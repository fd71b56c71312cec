"""Several budgets at once: what each costs the dense model and how much it may be, and how both become one price.

A run moves along one coordinate: 1 is the dense model, and `BudgetLimits.feasible_keep` the point where every limit
holds as it was stated. In between, limits fall in a straight line from what the dense model costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prunetune.config.quantities import Amount, format_amount
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.deployment import Cost, Costs, FlopsCost, MemoryCost, WeightsCost, max_cost
from prunetune.cost.latency_table import LatencyTable, latency_costs
from prunetune.cost.layer_shapes import ModelShape, UnitCounts

TIMED_BUDGETS = ("latency", "throughput")  # that need a table


def costs_for_budget(
    kind: str, anatomy: ModelShape, workload: WorkloadConfig, table: LatencyTable | None = None
) -> Costs:
    """What a budget of this kind counts; raises `ConfigError` where the model is not counted so."""
    if kind == "flops":
        return (FlopsCost(anatomy, workload),)
    if kind == "memory":
        return (MemoryCost(anatomy, workload),)
    if kind == "file":
        return (WeightsCost(anatomy, workload),)
    assert table is not None, f"{kind} needs a table"
    return latency_costs(anatomy, workload, table, "mix" if kind == "throughput" else workload.phase)


def make_budget_limit(kind: str, amount: Amount, costs: Costs, workload: WorkloadConfig) -> BudgetLimit:
    """The limit on costs that an amount of this kind sets."""
    dense = max_cost(costs, costs[0].dense_shape.dense_counts())
    if kind != "throughput":
        return BudgetLimit(kind, costs, amount.resolve(dense), dense)
    tokens = float(workload.batch * workload.generate)
    return BudgetLimit(kind, costs, tokens / amount.resolve(tokens / dense), dense, tokens)


def make_budget_limits(
    amounts: Mapping[str, Amount], anatomy: ModelShape, workload: WorkloadConfig, table: LatencyTable | None = None
) -> tuple[BudgetLimit, ...]:
    """All budgets that are given beside `budget.keep`."""
    return tuple(
        make_budget_limit(kind, amount, costs_for_budget(kind, anatomy, workload, table), workload)
        for kind, amount in amounts.items()
    )


@dataclass(frozen=True)
class BudgetLimit:
    """One budget."""

    kind: str  # of amounts.UNITS, which says in which unit
    costs: Costs  # of which the largest counts
    limit: float  # on the cost, which is seconds for a throughput, too
    dense_cost: float
    batch_tokens: float = 0.0  # of a batch of requests, where the kind is a throughput

    @property
    def is_met_by_dense(self) -> bool:
        """Whether the dense model meets it."""
        return self.dense_cost <= self.limit

    def cost(self, counts: UnitCounts) -> float:
        """Of a plan with so many units at each site."""
        return max_cost(self.costs, counts)

    def limit_at(self, progress: float) -> float:
        """The limit where the way from the dense model has come so far."""
        return max(self.limit, self.dense_cost + progress * (self.limit - self.dense_cost))

    def to_amount(self, cost: float) -> float:
        """A cost as the budget counts it."""
        return self.batch_tokens / cost if self.batch_tokens else cost

    def format_cost(self, cost: float) -> str:
        """The same for people."""
        return format_amount(self.to_amount(cost), self.kind)


@dataclass(frozen=True)
class BudgetLimits:
    """All budgets of a run beside or instead of `budget.keep`."""

    limits: tuple[BudgetLimit, ...]
    requested_keep: float = 1.0  # budget.keep of the recipe; 1 where it is not given
    feasible_keep: float = 0.0  # share of the prunable parameters that an even plan under all limits keeps
    feasible_price_share: float = 0.0  # the same of the units' prices
    prices: Mapping[str, float] | None = None  # site -> of one unit without what is inside, in parameters
    prices_with_children: Mapping[str, float] | None = None  # site -> of one unit with what is inside

    def progress(self, coordinate: float) -> float:
        """How far a coordinate is on the way from the dense model (0) to where all limits hold (1)."""
        return 1.0 if coordinate <= self.feasible_keep else (1 - coordinate) / (1 - self.feasible_keep)

    def cost_limits_at(self, coordinate: float) -> tuple[tuple[Cost, float], ...]:
        """The limits on costs that hold at this coordinate."""
        progress = self.progress(coordinate)
        return tuple((cost, cap.limit_at(progress)) for cap in self.limits for cost in cap.costs)

    def params_share_at(self, coordinate: float) -> float:
        """Share of the prunable parameters that may remain at this coordinate."""
        return 1 - self.progress(coordinate) * (1 - self.requested_keep)

    def price_share_at(self, coordinate: float) -> float:
        """Share of all units' prices that is to remain there, for a loss that pulls to it."""
        return 1 - self.progress(coordinate) * (1 - self.feasible_price_share)
