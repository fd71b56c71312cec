"""What a finished model takes of its budgets: counted, and timed on the device where a budget is a time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from prunetune.bench.latency.request_timing import RUNS, seconds_of
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.limits import TIMED, Cap, Limits
from prunetune.plan import Plan

log = logging.getLogger(__name__)
TRUSTED = 0.05  # largest share that a table may be off


def proved(
    limits: Limits, plan: Plan, workload: WorkloadConfig, opened: Callable[[], Any], runs: int = RUNS
) -> list[dict[str, Any]]:
    """A row a budget, for the manifest; `opened` gives the finished model, where one is to be timed."""
    rows: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    for cap in limits.caps:
        counted = cap.cost(plan.widths())
        row = {
            "budget": cap.kind, "limit": cap.amount(cap.limit), "dense": cap.amount(cap.dense),
            "counted": cap.amount(counted), "words": f"{cap.words(counted)} of at most {cap.words(cap.limit)}",
        }  # fmt: skip
        if cap.kind == "throughput":
            row["words"] = f"{cap.words(counted)} of at least {cap.words(cap.limit)}"
        if cap.kind in TIMED:
            seconds = seconds or seconds_of([opened()], workload, runs)[0]
            row |= _timed(cap, counted, seconds, workload)
        rows.append(row)
    return rows


def _timed(cap: Cap, counted: float, seconds: dict[str, float], workload: WorkloadConfig) -> dict[str, Any]:
    phase = "mix" if cap.kind == "throughput" else workload.phase
    whole = seconds["prefill"] + (workload.generate - 1) * seconds["decode"]
    found = whole if phase == "mix" else seconds[phase]
    error = found / counted - 1
    if abs(error) > TRUSTED:
        log.warning(
            "budget.%s: the finished model takes %s, %+.1f%% of what the table says; measure again on a quiet machine",
            cap.kind, cap.words(found), 100 * error,
        )  # fmt: skip
    return {"measured": cap.amount(found), "error": error}
