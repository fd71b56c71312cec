"""What plans a run may choose: constraints of model, layout and recipe, and limits from budgets of other kinds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from prunetune.bench.latency.tables import checked_header, get_latency_table, load_kept_table
from prunetune.config.recipe import RunConfig
from prunetune.cost.budget_limits import TIMED_BUDGETS, make_budget_limits
from prunetune.cost.layer_shapes import model_shape
from prunetune.errors import ConfigError
from prunetune.export.layout_check import check_layout
from prunetune.export.stock_config import kv_groups_validator, mlp_width_option
from prunetune.model.config_checks import is_multimodal
from prunetune.pipeline.budget_preview import budget_usage_lines
from prunetune.pruning.families import MODEL_TYPE_PREFIX
from prunetune.pruning.units import Site, UnitKind, effective_layout
from prunetune.runs.folder import RunFolder
from prunetune.search.feasibility import uniform_scores, with_limits
from prunetune.search.plan_rules import EXPERT_ROW_ALIGN, PlanConstraints, default_align
from prunetune.search.select import select

log = logging.getLogger(__name__)


def make_plan_constraints(
    config: RunConfig, sites: tuple[Site, ...], model_config: Any, allows_groups: Callable[[int], bool] | None = None
) -> PlanConstraints:
    """What plans are legal for this model and layout; `allows_groups` if the legal counts of KV groups are known."""
    budget = config.budget
    align, protected = budget.align or default_align(sites), budget.protected_layers()
    _raise_if_not_representable(config, sites, align, protected, model_config)
    return PlanConstraints(
        config.layout,
        align,
        budget.min_groups,
        allows_groups or kv_groups_validator(model_config),
        min_share=budget.min_share,
        min_experts=budget.min_experts,
        min_queries=budget.min_queries,
        protected=protected,
        tensor_parallel=budget.tensor_parallel,
    )


def _raise_if_not_representable(
    config: RunConfig, sites: tuple[Site, ...], align: int, protected: frozenset[int], model_config: Any
) -> None:
    """Raises `ConfigError` for constraints under which no checkpoint can be written."""
    layers, kinds = {site.layer for site in sites}, {site.kind for site in sites}
    if protected - layers:
        raise ConfigError(
            f"budget.protect names layer {min(protected - layers)}, and there are {len(layers)}, counted from 0"
        )
    if UnitKind.EXPERT_CHANNEL in kinds and align % EXPERT_ROW_ALIGN:
        raise ConfigError(
            f"budget.align {align} does not fit expert-channels, whose kernels need multiples of {EXPERT_ROW_ALIGN}: "
            f"set it to {max(EXPERT_ROW_ALIGN, align - align % EXPERT_ROW_ALIGN)}"
        )
    if is_multimodal(model_config) and effective_layout(config.layout, sites) != "uniform":
        raise ConfigError(
            f"layout per-layer is not written inside a multimodal model ({model_config.model_type}): set layout uniform"
        )
    layout = effective_layout(config.layout, sites)
    check_layout(model_config.get_text_config(), config.budget.units, layout)
    if config.layout == "uniform":
        if model_config.model_type.startswith(MODEL_TYPE_PREFIX):
            raise ConfigError("layout uniform needs equal layers, and this model's differ: set layout per-layer")
        if UnitKind.MLP_CHANNEL in kinds:
            mlp_width_option(model_config)
        if protected and UnitKind.LAYER not in kinds:
            raise ConfigError(
                "budget.protect with layout uniform names layers that are kept, since all are equally wide: "
                "add layers to budget.units, or use layout per-layer"
            )


def apply_budgets(
    config: RunConfig,
    sites: tuple[Site, ...],
    constraints: PlanConstraints,
    meta_model: Any,
    device: torch.device,
    begun: RunFolder | None = None,
) -> tuple[RunConfig, PlanConstraints]:
    """Turn budgets other than `budget.keep` into limits of the constraints, and `budget.keep` into their coordinate.

    A run that has `begun` keeps the limits, and the latency table, that it began with. Raises `PlanError` for a budget
    that cannot be met, and `ConfigError` for one that cannot be counted or measured.
    """
    amounts = config.budget.amounts()
    if not amounts:
        return config, constraints
    workload, table, align = config.workload, None, constraints.align
    kept_limits = begun.read_manifest().cost_limits if begun else {}
    timed_budgets = [kind for kind in TIMED_BUDGETS if kind in amounts]
    if timed_budgets:
        if begun and (begun.latency_table_file.exists() or timed_budgets[0] in kept_limits):
            header = checked_header(meta_model.config, sites, workload, device, align)
            table = load_kept_table(begun.latency_table_file, header)
        else:
            table = get_latency_table(meta_model.config, sites, workload, device, align, config.budget.table)
    limits = make_budget_limits(amounts, model_shape(meta_model, sites), workload, table)
    limits = tuple(replace(limit, limit=kept_limits.get(limit.kind) or limit.limit) for limit in limits)
    constraints = with_limits(constraints, sites, limits, requested_keep=config.budget.keep)
    assert constraints.limits is not None
    feasible_keep = constraints.limits.feasible_keep
    uniform_plan = select(uniform_scores(sites), sites, feasible_keep, constraints)
    for line in budget_usage_lines(constraints.limits, uniform_plan):
        log.info(line)
    return replace(config, budget=replace(config.budget, keep=feasible_keep)), constraints
