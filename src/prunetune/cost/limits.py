"""Several budgets at once: what each costs the dense model and how much it may be, and how both become one price.

A run moves along one coordinate, `keep`: 1 is the dense model, and `Limits.keep` the point where every limit holds as
it was stated. In between, limits fall in a straight line from what the dense model costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prunetune.config.quantities import Amount, shown
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.deployment import Cost, Costs, Flops, Memory, Weights, most
from prunetune.cost.latency_table import Table, latencies
from prunetune.cost.layer_shapes import Anatomy, Counts

TIMED = ("latency", "throughput")  # that need a table


def costs_of(kind: str, anatomy: Anatomy, workload: WorkloadConfig, table: Table | None = None) -> Costs:
    """What a budget of this kind counts; raises `ConfigError` where the model is not counted so."""
    if kind == "flops":
        return (Flops(anatomy, workload),)
    if kind == "memory":
        return (Memory(anatomy, workload),)
    if kind == "file":
        return (Weights(anatomy, workload),)
    assert table is not None, f"{kind} needs a table"
    return latencies(anatomy, workload, table, "mix" if kind == "throughput" else workload.phase)


def cap_of(kind: str, amount: Amount, costs: Costs, workload: WorkloadConfig) -> Cap:
    """The limit on costs that an amount of this kind sets."""
    dense = most(costs, costs[0].anatomy.dense())
    if kind != "throughput":
        return Cap(kind, costs, amount.of(dense), dense)
    tokens = float(workload.batch * workload.generate)
    return Cap(kind, costs, tokens / amount.of(tokens / dense), dense, tokens)


def caps_of(
    amounts: Mapping[str, Amount], anatomy: Anatomy, workload: WorkloadConfig, table: Table | None = None
) -> tuple[Cap, ...]:
    """All budgets that are given beside `budget.keep`."""
    return tuple(
        cap_of(kind, amount, costs_of(kind, anatomy, workload, table), workload) for kind, amount in amounts.items()
    )


@dataclass(frozen=True)
class Cap:
    """One budget."""

    kind: str  # of amounts.UNITS, which says in which unit
    costs: Costs  # of which the largest counts
    limit: float  # on the cost, which is seconds for a throughput, too
    dense: float
    tokens: float = 0.0  # of a batch of requests, where the kind is a throughput

    @property
    def is_slack(self) -> bool:
        """Whether the dense model meets it."""
        return self.dense <= self.limit

    def cost(self, counts: Counts) -> float:
        """Of a plan with so many units at each site."""
        return most(self.costs, counts)

    def relaxed(self, done: float) -> float:
        """The limit where the way from the dense model has come so far."""
        return max(self.limit, self.dense + done * (self.limit - self.dense))

    def amount(self, cost: float) -> float:
        """A cost as the budget counts it."""
        return self.tokens / cost if self.tokens else cost

    def words(self, cost: float) -> str:
        """The same for people."""
        return shown(self.amount(cost), self.kind)


@dataclass(frozen=True)
class Limits:
    """All budgets of a run beside or instead of `budget.keep`."""

    caps: tuple[Cap, ...]
    told: float = 1.0  # budget.keep, where it was given too
    keep: float = 0.0  # share of the prunable parameters that an even plan under all limits keeps
    share: float = 0.0  # the same of the units' prices
    prices: Mapping[str, float] | None = None  # site -> of one unit without what is inside, in parameters
    spans: Mapping[str, float] | None = None  # site -> of one unit with what is inside

    def done(self, keep: float) -> float:
        """How far `keep` is on the way from the dense model (0) to where all limits hold (1)."""
        return 1.0 if keep <= self.keep else (1 - keep) / (1 - self.keep)

    def at(self, keep: float) -> tuple[tuple[Cost, float], ...]:
        """What holds at this coordinate."""
        done = self.done(keep)
        return tuple((cost, cap.relaxed(done)) for cap in self.caps for cost in cap.costs)

    def params_at(self, keep: float) -> float:
        """Share of the prunable parameters that may remain at this coordinate."""
        return 1 - self.done(keep) * (1 - self.told)

    def share_at(self, keep: float) -> float:
        """Share of all units' prices that is to remain there, for a loss that pulls to it."""
        return 1 - self.done(keep) * (1 - self.share)
