"""What a finished model takes of its budgets: counted, and timed on the device where a budget is a time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from prunetune.bench.latency.request_timing import RUNS, time_requests
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.limits import TIMED_BUDGETS, BudgetLimit, BudgetLimits
from prunetune.plan import Plan

log = logging.getLogger(__name__)
TRUSTED = 0.05  # largest share that a table may be off


def verify_budgets(
    limits: BudgetLimits, plan: Plan, workload: WorkloadConfig, open_model: Callable[[], Any], runs: int = RUNS
) -> list[dict[str, Any]]:
    """A row a budget, for the manifest; `opened` gives the finished model, where one is to be timed."""
    rows: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    for cap in limits.limits:
        counted = cap.cost(plan.widths())
        row = {
            "budget": cap.kind, "limit": cap.to_amount(cap.limit), "dense": cap.to_amount(cap.dense_cost),
            "counted": cap.to_amount(counted), "words": f"{cap.format_cost(counted)} of at most {cap.format_cost(cap.limit)}",
        }  # fmt: skip
        if cap.kind == "throughput":
            row["words"] = f"{cap.format_cost(counted)} of at least {cap.format_cost(cap.limit)}"
        if cap.kind in TIMED_BUDGETS:
            seconds = seconds or time_requests([open_model()], workload, runs)[0]
            row |= _timed(cap, counted, seconds, workload)
        rows.append(row)
    return rows


def _timed(cap: BudgetLimit, counted: float, seconds: dict[str, float], workload: WorkloadConfig) -> dict[str, Any]:
    phase = "mix" if cap.kind == "throughput" else workload.phase
    whole = seconds["prefill"] + (workload.generate - 1) * seconds["decode"]
    found = whole if phase == "mix" else seconds[phase]
    error = found / counted - 1
    if abs(error) > TRUSTED:
        log.warning(
            "budget.%s: the finished model takes %s, %+.1f%% of what the table says; measure again on a quiet machine",
            cap.kind, cap.format_cost(found), 100 * error,
        )  # fmt: skip
    return {"measured": cap.to_amount(found), "error": error}
