"""Check a finished model against its budgets: costs counted, and timed on the device for latency and throughput."""

import logging
from collections.abc import Callable
from typing import Any

from prunetune.bench.latency.request_timing import RUNS, time_requests
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.budget_limits import TIMED_BUDGETS, BudgetLimits
from prunetune.plan import Plan

log = logging.getLogger(__name__)
MAX_TABLE_ERROR = 0.05  # of the counted time, above which a warning says that the table is off


def verify_budgets(
    limits: BudgetLimits, plan: Plan, workload: WorkloadConfig, open_model: Callable[[], Any], runs: int = RUNS
) -> list[dict[str, Any]]:
    """One row for each budget, for the manifest; `open_model` opens the finished model if a budget is a time."""
    rows: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    for budget in limits.limits:
        counted = budget.cost(plan.widths())
        side = "at least" if budget.kind == "throughput" else "at most"
        row = {
            "budget": budget.kind,
            "limit": budget.to_amount(budget.limit),
            "dense": budget.to_amount(budget.dense_cost),
            "counted": budget.to_amount(counted),
            "words": f"{budget.format_cost(counted)} of {side} {budget.format_cost(budget.limit)}",
        }
        if budget.kind in TIMED_BUDGETS:
            seconds = seconds or time_requests([open_model()], workload, runs)[0]
            phase = "mix" if budget.kind == "throughput" else workload.phase
            mix = seconds["prefill"] + (workload.generate - 1) * seconds["decode"]
            measured = mix if phase == "mix" else seconds[phase]
            error = measured / counted - 1
            if abs(error) > MAX_TABLE_ERROR:
                log.warning(
                    "budget.%s: the finished model takes %s, %+.1f%% of what the table says; measure again on a quiet "
                    "machine", budget.kind, budget.format_cost(measured), 100 * error,
                )  # fmt: skip
            row |= {"measured": budget.to_amount(measured), "error": error}
        rows.append(row)
    return rows
