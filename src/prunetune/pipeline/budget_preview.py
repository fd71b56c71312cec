"""What budgets would mean, before anything is trained: dense, at some shares of the parameters, and at the least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from prunetune.bench.latency.tables import checked_header, load_cached_table, measure_table
from prunetune.config.quantities import format_amount, format_amount_rounded_to_limit
from prunetune.config.recipe import BUDGET_KINDS, WorkloadConfig
from prunetune.cost.deployment import max_cost
from prunetune.cost.latency_table import LatencyTable
from prunetune.cost.layer_shapes import ModelShape, model_shape
from prunetune.cost.limits import TIMED_BUDGETS, BudgetLimits, costs_for_budget
from prunetune.errors import ConfigError
from prunetune.plan import Plan
from prunetune.pruning.units import Site
from prunetune.search.feasibility import uniform_scores
from prunetune.search.nested_sites import NestedSites
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.select import min_feasible_keep, min_widths, select

PREVIEW_SHARES = (0.7, 0.6, 0.5)  # shares that may remain
STORED = 2  # bytes of a weight in 16 bits


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
    """Of the budget met to the last parameter; a real plan keeps up to one block less."""
    gone = round((1 - keep) * dense.prunable)
    read = dense.total - dense.embedding
    blocks = read - dense.lm_head
    left = dense.total - gone
    return BudgetPreview(keep, left, STORED * left, blocks / (blocks - gone), read / (read - gone))


NO_LATENCY_TABLE = "no table for this device yet: --measure makes one, in a minute or two on a GPU"
NOT_FEASIBLE = "-"  # or not known: a time that noise in the table made nothing, or less


def budget_table_lines(
    meta_model: Any,
    sites: tuple[Site, ...],
    constraints: PlanConstraints,
    workload: WorkloadConfig,
    device: torch.device,
    *,
    measure: bool = False,
) -> list[str]:
    """A table of every kind of budget under this workload; `measure` times the device where no table is kept."""
    anatomy = model_shape(meta_model, sites)
    try:
        table: LatencyTable | None = _table(
            meta_model.config, sites, workload, device, constraints.align, measure=measure
        )
        why = NO_LATENCY_TABLE
    except ConfigError as untimed:
        if measure:
            raise
        table, why = None, str(untimed)
    plans = _example_widths(sites, constraints)
    lines = [
        f"budgets of {workload.batch} x {workload.prompt} + {workload.generate} tokens, {workload.cached_tokens} in the "
        f"cache, {workload.dtype}, weights {workload.weights}, layout {constraints.layout} (even plans):",
        f"{'budget':<11}" + "".join(f"{name:>11}" for name in plans),
    ]
    return [*lines, *(_row(kind, anatomy, workload, table, plans, why) for kind in BUDGET_KINDS)]


def _table(
    config: Any, sites: tuple[Site, ...], workload: WorkloadConfig, device: torch.device, align: int, *, measure: bool
) -> LatencyTable | None:
    header = checked_header(config, sites, workload, device, align)
    found = load_cached_table(header)
    return measure_table(config, sites, workload, device, align, header) if found is None and measure else found


def _example_widths(sites: Sequence[Site], constraints: PlanConstraints) -> dict[str, dict[str, int] | None]:
    """{heading: units kept by site}; None where that is not feasible. Shares of parameters, whatever the budget is."""
    nest, constraints = NestedSites(sites), replace(constraints, limits=None)
    least = min_feasible_keep(sites, constraints)
    found: dict[str, dict[str, int] | None] = {"dense": {site.name: site.units for site in sites}}
    for keep in PREVIEW_SHARES:
        feasible = keep >= least
        found[f"keep {keep:.2f}"] = (
            select(uniform_scores(sites), sites, keep, constraints).widths() if feasible else None
        )
    return found | {"least": nest.kept_unit_counts(min_widths(nest, constraints), nest.sites)}


def _row(
    kind: str,
    anatomy: ModelShape,
    workload: WorkloadConfig,
    table: LatencyTable | None,
    widths_by_heading: dict[str, dict[str, int] | None],
    untimed_reason: str,
) -> str:
    if kind in TIMED_BUDGETS and table is None:
        return f"{kind:<11}  {untimed_reason}"
    try:
        costs = costs_for_budget(kind, anatomy, workload, table)
    except ConfigError as uncounted:
        return f"{kind:<11}  {uncounted}"
    tokens = workload.batch * workload.generate

    def words(heading: str, counts: dict[str, int] | None) -> str:
        if counts is None:
            return NOT_FEASIBLE
        found = max_cost(costs, counts)
        if not found > 0:
            return NOT_FEASIBLE
        found = tokens / found if kind == "throughput" else found
        return format_amount_rounded_to_limit(found, kind) if heading == "least" else format_amount(found, kind)

    return f"{kind:<11}" + "".join(f"{words(heading, counts):>11}" for heading, counts in widths_by_heading.items())


def budget_usage_lines(limits: BudgetLimits, plan: Plan) -> Iterator[str]:
    """What a plan takes of every budget that a run was given."""
    for cap in limits.limits:
        cost = cap.cost(plan.widths())
        below = cost < 0.99 * cap.limit and not cap.is_met_by_dense
        yield (
            f"budget.{cap.kind} {cap.format_cost(cap.limit)}: an even plan takes {cap.format_cost(cost)}, "
            f"dense {cap.format_cost(cap.dense_cost)}"
            + (f"; {1 - cost / cap.limit:.1%} within, its widths are that coarse" if below else "")
            + ("; the dense model meets it" if cap.is_met_by_dense else "")
        )
