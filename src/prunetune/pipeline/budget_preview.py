"""What budgets would mean, before anything is trained: dense, at some shares of the parameters, and at the least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from prunetune.bench.latency.tables import checked_header, in_cache, measured
from prunetune.config.quantities import shown, within
from prunetune.config.recipe import BUDGETS, WorkloadConfig
from prunetune.cost.deployment import most
from prunetune.cost.latency_table import Table
from prunetune.cost.layer_shapes import Anatomy, anatomy_of
from prunetune.cost.limits import TIMED, Limits, costs_of
from prunetune.errors import ConfigError
from prunetune.plan import Plan
from prunetune.pruning.units import Site
from prunetune.search.feasibility import even
from prunetune.search.nested_sites import Nest
from prunetune.search.plan_rules import Shape
from prunetune.search.select import feasible_keep, floor_widths, select

SHOWN = (0.7, 0.6, 0.5)  # shares that may remain
STORED = 2  # bytes of a weight in 16 bits


@dataclass(frozen=True)
class Holdings:
    """Parameters of a dense model by what reads them."""

    everything: int
    prunable: int
    table: int  # the input embedding, where it is not the head: looked up, never multiplied
    head: int  # the output matrix, tied or not: read in every step, for one token of a prompt


@dataclass(frozen=True)
class Preview:
    """A model that keeps a share of its prunable parameters; prefill and decode: times faster, at best."""

    keep: float
    parameters: int
    weight_bytes: int
    prefill: float  # matrices' FLOPs per token of a prompt, attention between tokens left out
    decode: float  # bytes of weights that a step of one short sequence reads


def preview(dense: Holdings, keep: float) -> Preview:
    """Of the budget met to the last parameter; a real plan keeps up to one block less."""
    gone = round((1 - keep) * dense.prunable)
    read = dense.everything - dense.table
    blocks = read - dense.head
    left = dense.everything - gone
    return Preview(keep, left, STORED * left, blocks / (blocks - gone), read / (read - gone))


UNTIMED = "no table for this device yet: --measure makes one, in a minute or two on a GPU"
NOT_FEASIBLE = "-"  # or not known: a time that noise in the table made nothing, or less


def budget_lines(
    structure: Any,
    sites: tuple[Site, ...],
    shape: Shape,
    workload: WorkloadConfig,
    device: torch.device,
    *,
    measure: bool = False,
) -> list[str]:
    """A table of every kind of budget under this workload; `measure` times the device where no table is kept."""
    anatomy = anatomy_of(structure, sites)
    try:
        table: Table | None = _table(structure.config, sites, workload, device, shape.align, measure=measure)
        why = UNTIMED
    except ConfigError as untimed:
        if measure:
            raise
        table, why = None, str(untimed)
    plans = _plans(sites, shape)
    lines = [
        f"budgets of {workload.batch} x {workload.prompt} + {workload.generate} tokens, {workload.cached} in the "
        f"cache, {workload.dtype}, weights {workload.weights}, layout {shape.layout} (even plans):",
        f"{'budget':<11}" + "".join(f"{name:>11}" for name in plans),
    ]
    return [*lines, *(_row(kind, anatomy, workload, table, plans, why) for kind in BUDGETS)]


def _table(
    config: Any, sites: tuple[Site, ...], workload: WorkloadConfig, device: torch.device, align: int, *, measure: bool
) -> Table | None:
    header = checked_header(config, sites, workload, device, align)
    found = in_cache(header)
    return measured(config, sites, workload, device, align, header) if found is None and measure else found


def _plans(sites: Sequence[Site], shape: Shape) -> dict[str, dict[str, int] | None]:
    """{heading: units kept by site}; None where that is not feasible. Shares of parameters, whatever the budget is."""
    nest, shape = Nest(sites), replace(shape, limits=None)
    least = feasible_keep(sites, shape)
    found: dict[str, dict[str, int] | None] = {"dense": {site.name: site.units for site in sites}}
    for keep in SHOWN:
        feasible = keep >= least
        found[f"keep {keep:.2f}"] = select(even(sites), sites, keep, shape).widths() if feasible else None
    return found | {"least": nest.counts(floor_widths(nest, shape), nest.sites)}


def _row(
    kind: str,
    anatomy: Anatomy,
    workload: WorkloadConfig,
    table: Table | None,
    plans: dict[str, dict[str, int] | None],
    why: str,
) -> str:
    if kind in TIMED and table is None:
        return f"{kind:<11}  {why}"
    try:
        costs = costs_of(kind, anatomy, workload, table)
    except ConfigError as uncounted:
        return f"{kind:<11}  {uncounted}"
    tokens = workload.batch * workload.generate

    def words(heading: str, counts: dict[str, int] | None) -> str:
        if counts is None:
            return NOT_FEASIBLE
        found = most(costs, counts)
        if not found > 0:
            return NOT_FEASIBLE
        found = tokens / found if kind == "throughput" else found
        return within(found, kind) if heading == "least" else shown(found, kind)

    return f"{kind:<11}" + "".join(f"{words(heading, counts):>11}" for heading, counts in plans.items())


def limit_lines(limits: Limits, plan: Plan) -> Iterator[str]:
    """What a plan takes of every budget that a run was given."""
    for cap in limits.caps:
        cost = cap.cost(plan.widths())
        below = cost < 0.99 * cap.limit and not cap.is_slack
        yield (
            f"budget.{cap.kind} {cap.words(cap.limit)}: an even plan takes {cap.words(cost)}, "
            f"dense {cap.words(cap.dense)}"
            + (f"; {1 - cost / cap.limit:.1%} within, its widths are that coarse" if below else "")
            + ("; the dense model meets it" if cap.is_slack else "")
        )
