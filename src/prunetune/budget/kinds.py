"""The budgets of a recipe as costs with their limits."""

from __future__ import annotations

from collections.abc import Mapping

from prunetune.amounts import Amount
from prunetune.budget.anatomy import Anatomy
from prunetune.budget.costs import Costs, Flops, Memory, Weights, most
from prunetune.budget.latency import Table, latencies
from prunetune.budget.limits import Cap
from prunetune.config import WorkloadConfig

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
