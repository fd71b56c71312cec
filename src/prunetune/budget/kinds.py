"""The budgets of a recipe as costs with their limits."""

from __future__ import annotations

from collections.abc import Mapping

from prunetune.amounts import Amount
from prunetune.budget.anatomy import Anatomy
from prunetune.budget.costs import Cost, Flops, Memory, Weights, total
from prunetune.budget.latency import Latency, Table
from prunetune.budget.limits import Cap
from prunetune.config import WorkloadConfig

TIMED = ("latency", "throughput")  # that need a table


def cost_of(kind: str, anatomy: Anatomy, workload: WorkloadConfig, table: Table | None = None) -> Cost:
    """What a budget of this kind counts; raises `ConfigError` where the model is not counted so."""
    if kind == "flops":
        return Flops(anatomy, workload)
    if kind == "memory":
        return Memory(anatomy, workload)
    if kind == "file":
        return Weights(anatomy, workload)
    assert table is not None, f"{kind} needs a table"
    return Latency(anatomy, workload, table, "mix" if kind == "throughput" else workload.phase)


def cap_of(kind: str, amount: Amount, cost: Cost, workload: WorkloadConfig) -> Cap:
    """The limit on a cost that an amount of this kind sets."""
    dense = total(cost, cost.anatomy.dense())
    if kind != "throughput":
        return Cap(kind, cost, amount.of(dense), dense)
    tokens = float(workload.batch * workload.generate)
    return Cap(kind, cost, tokens / amount.of(tokens / dense), dense, tokens)


def caps_of(
    amounts: Mapping[str, Amount], anatomy: Anatomy, workload: WorkloadConfig, table: Table | None = None
) -> tuple[Cap, ...]:
    """All budgets that are given beside `budget.keep`."""
    return tuple(
        cap_of(kind, amount, cost_of(kind, anatomy, workload, table), workload) for kind, amount in amounts.items()
    )
