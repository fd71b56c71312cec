"""Budgets before training: what the dense, some smaller, and the smallest feasible model would cost under each kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from prunetune.bench.latency.tables import checked_header, load_cached_table, measure_table
from prunetune.config.quantities import format_amount, format_amount_rounded_to_limit
from prunetune.config.recipe import BUDGET_KINDS, WorkloadConfig
from prunetune.cost.budget_limits import TIMED_BUDGETS, BudgetLimits, costs_for_budget
from prunetune.cost.deployment import max_cost
from prunetune.cost.latency_table import LatencyTable
from prunetune.cost.layer_shapes import ModelShape, model_shape
from prunetune.errors import ConfigError
from prunetune.plan import Plan
from prunetune.pruning.units import Site
from prunetune.search.feasibility import uniform_scores
from prunetune.search.nested_sites import NestedSites
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.select import min_feasible_keep, min_widths, select
from prunetune.utils.tables import table_lines

PREVIEW_SHARES = (0.7, 0.6, 0.5)  # shares that may remain
BYTES_PER_WEIGHT = 2  # in 16 bits


@dataclass(frozen=True)
class ParamCounts:
    """Parameters of a dense model by what reads them."""

    total: int
    prunable: int
    embedding: int  # the input embedding, where it is not the head: looked up, never multiplied
    lm_head: int  # the output matrix, tied or not: read in every step, for one token of a prompt


@dataclass(frozen=True)
class BudgetPreview:
    """A model that keeps a share of its prunable parameters; prefill and decode: times faster, at best."""

    keep: float
    parameters: int
    weight_bytes: int
    prefill_speedup: float  # matrices' FLOPs per token of a prompt, attention between tokens left out
    decode_speedup: float  # bytes of weights that a step of one short sequence reads


def preview_budget(dense: ParamCounts, keep: float) -> BudgetPreview:
    """A model that meets the budget exactly; a real plan keeps up to one block of units less."""
    pruned = round((1 - keep) * dense.prunable)
    multiplied = dense.total - dense.embedding
    blocks = multiplied - dense.lm_head
    kept = dense.total - pruned
    return BudgetPreview(
        keep,
        parameters=kept,
        weight_bytes=BYTES_PER_WEIGHT * kept,
        prefill_speedup=blocks / (blocks - pruned),
        decode_speedup=multiplied / (multiplied - pruned),
    )


NO_LATENCY_TABLE = "no table for this device yet: --measure makes one, in a minute or two on a GPU"
NOT_FEASIBLE = "-"  # also for a time that noise in the latency table made zero or negative


def budget_table_lines(
    meta_model: Any,
    sites: tuple[Site, ...],
    constraints: PlanConstraints,
    workload: WorkloadConfig,
    device: torch.device,
    *,
    measure: bool = False,
) -> list[str]:
    """A table of every kind of budget under this workload; with `measure`, time the device if no table is cached."""
    dense_shape = model_shape(meta_model, sites)
    try:
        header = checked_header(meta_model.config, sites, workload, device, constraints.align)
        table, untimed_reason = load_cached_table(header), NO_LATENCY_TABLE
        if table is None and measure:
            table = measure_table(meta_model.config, sites, workload, device, constraints.align, header)
    except ConfigError as untimed:
        if measure:
            raise
        table, untimed_reason = None, str(untimed)
    widths_by_plan = _example_widths(sites, constraints)
    rows, uncounted = [], []
    for kind in BUDGET_KINDS:
        try:
            if kind in TIMED_BUDGETS and table is None:
                raise ConfigError(untimed_reason)
            rows.append([kind, *_costs(kind, dense_shape, workload, table, widths_by_plan)])
        except ConfigError as reason:
            uncounted.append(f"{kind:<11} {reason}")
    return [
        f"budgets of {workload.batch} x {workload.prompt} + {workload.generate} tokens, {workload.cached_tokens} in "
        f"the cache, {workload.dtype}, weights {workload.weights}, layout {constraints.layout} (even plans):",
        *table_lines(["budget", *(f">{plan}" for plan in widths_by_plan)], rows),
        *uncounted,
    ]


def _example_widths(sites: Sequence[Site], constraints: PlanConstraints) -> dict[str, dict[str, int] | None]:
    """{heading: units kept by site}, None if not feasible; shares are of parameters, whatever the budget's kind."""
    nested_sites, constraints = NestedSites(sites), replace(constraints, limits=None)
    min_keep = min_feasible_keep(sites, constraints)
    widths: dict[str, dict[str, int] | None] = {"dense": {site.name: site.units for site in sites}}
    for keep in PREVIEW_SHARES:
        plan = select(uniform_scores(sites), sites, keep, constraints) if keep >= min_keep else None
        widths[f"keep {keep:.2f}"] = plan.widths() if plan else None
    return widths | {"least": nested_sites.kept_unit_counts(min_widths(nested_sites, constraints), nested_sites.sites)}


def _costs(
    kind: str,
    dense_shape: ModelShape,
    workload: WorkloadConfig,
    table: LatencyTable | None,
    widths_by_plan: dict[str, dict[str, int] | None],
) -> list[str]:
    """What each plan costs in a kind of budget, as text; raises `ConfigError` where it cannot be counted."""
    costs = costs_for_budget(kind, dense_shape, workload, table)
    cells = []
    for plan, widths in widths_by_plan.items():
        cost = 0.0 if widths is None else max_cost(costs, widths)
        if not cost > 0:
            cells.append(NOT_FEASIBLE)
            continue
        amount = workload.batch * workload.generate / cost if kind == "throughput" else cost
        # "least" is what users copy into a recipe, so it is rounded to the side that is feasible.
        cells.append((format_amount_rounded_to_limit if plan == "least" else format_amount)(amount, kind))
    return cells


def budget_usage_lines(limits: BudgetLimits, plan: Plan) -> Iterator[str]:
    """One line for each budget of a run: its limit, and what a plan and the dense model cost under it."""
    for cap in limits.limits:
        cost = cap.cost(plan.widths())
        below = cost < 0.99 * cap.limit and not cap.is_met_by_dense
        yield (
            f"budget.{cap.kind} {cap.format_cost(cap.limit)}: an even plan takes {cap.format_cost(cost)}, "
            f"dense {cap.format_cost(cap.dense_cost)}"
            + (f"; {1 - cost / cap.limit:.1%} within, its widths are that coarse" if below else "")
            + ("; the dense model meets it" if cap.is_met_by_dense else "")
        )
