"""What plans a run may choose: constraints of model, layout and recipe, limits from budgets, and what plans cost."""

import logging
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from prunetune.bench.latency.tables import (
    checked_header,
    get_latency_table,
    load_cached_table,
    load_kept_table,
    measure_table,
)
from prunetune.config.quantities import format_amount, format_amount_rounded_to_limit
from prunetune.config.recipe import BUDGET_KINDS, RunConfig, WorkloadConfig
from prunetune.cost.budget_limits import TIMED_BUDGETS, BudgetLimits, costs_for_budget, make_budget_limits
from prunetune.cost.deployment import max_cost
from prunetune.cost.layer_shapes import model_shape
from prunetune.errors import ConfigError, PrunetuneError
from prunetune.export.checkpoint import kv_groups_validator, mlp_width_option, write_checkpoint
from prunetune.model.config_checks import is_multimodal
from prunetune.model.loading import quiet_transformers
from prunetune.model.per_layer_classes import register_family
from prunetune.plan import Plan
from prunetune.pruning.cut import cut
from prunetune.pruning.families import FAMILIES, INSIDE_WRAPPERS, MODEL_TYPE_PREFIX, head_counts
from prunetune.pruning.family_check import TOLERANCE, half_plan, small_logits
from prunetune.pruning.sites import find_sites
from prunetune.pruning.tiny_models import tiny_config, tiny_model
from prunetune.pruning.units import Site, UnitKind, effective_layout, hidden_site
from prunetune.runs.folder import RunFolder
from prunetune.search.plan_rules import EXPERT_ROW_ALIGN, PlanConstraints, default_align
from prunetune.search.select import min_counts, min_feasible_keep, select, uniform_scores, with_limits
from prunetune.utils.failures import first_line
from prunetune.utils.tables import table_lines

log = logging.getLogger(__name__)


def make_plan_constraints(
    config: RunConfig,
    sites: tuple[Site, ...],
    model_config: Any,
    shared: PlanConstraints | None = None,
) -> PlanConstraints:
    """What plans are legal for this model and layout; `shared` are those of another recipe for the same model.

    Raises `ConfigError` for constraints under which no checkpoint can be written.
    """
    budget, layers, kinds = config.budget, {site.layer for site in sites}, {site.kind for site in sites}
    align, protected = budget.align or default_align(sites), budget.protected_layers()
    if protected - layers:
        raise ConfigError(
            f"budget.protect names layer {min(protected - layers)}, and there are {len(layers)}, counted from 0"
        )
    if UnitKind.EXPERT_CHANNEL in kinds and align % EXPERT_ROW_ALIGN:
        raise ConfigError(
            f"budget.align {align} does not fit expert-channels, whose kernels need multiples of {EXPERT_ROW_ALIGN}: "
            f"set it to {max(EXPERT_ROW_ALIGN, align - align % EXPERT_ROW_ALIGN)}"
        )
    if hidden_site(sites):
        obstacles = {
            "search.method generator prices every unit by itself": config.search.method == "generator",
            "lora.quantize stores a linear along the one axis that a cut shortens": config.lora.quantize != "off",
        }
        if obstacle := next((reason for reason, is_there in obstacles.items() if is_there), ""):
            raise ConfigError(f"budget.units: hidden-channels cross all other units, and {obstacle}: leave one out")
    layout = effective_layout(config.layout, sites)
    if is_multimodal(model_config) and layout != "uniform":
        raise ConfigError(
            f"layout per-layer is not written inside a multimodal model ({model_config.model_type}): set layout uniform"
        )
    check_layout(model_config.get_text_config(), budget.units, layout)
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
    return PlanConstraints(
        config.layout,
        align,
        budget.min_groups,
        shared.allows_groups if shared else kv_groups_validator(model_config),
        min_share=budget.min_share,
        min_experts=budget.min_experts,
        min_queries=budget.min_queries,
        protected=protected,
        tensor_parallel=budget.tensor_parallel,
        budget_of=budget.of,
        limits=shared.limits if shared else None,
        model_params=shared.model_params if shared else 0,
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


def check_layout(config: Any, units: Collection[str], layout: str) -> None:
    """Raises `ConfigError` where a small model of this configuration, cut and built again in the layout, is another.

    Architectures with an entry in `FAMILIES` are not tried: the tests hold them.
    """
    config = config.get_text_config()
    is_result = config.model_type.startswith(MODEL_TYPE_PREFIX)  # of an earlier run, that has been tried
    if is_result or config.model_type in FAMILIES or config.model_type in INSIDE_WRAPPERS:
        return
    from transformers import AutoModelForCausalLM

    small = tiny_config(config)
    heads = head_counts(small)
    try:
        model = tiny_model(small)
        sites = find_sites(model, units)
        plan = half_plan(sites)
        if layout == "uniform" and not kv_groups_validator(small)(heads.kv_heads // 2):
            kept = {site.name: tuple(range(site.units)) for site in sites if site.kind is UnitKind.KV_GROUP}
            plan = Plan(dict(plan.kept) | kept, plan.units)
        expected = small_logits(cut(model, plan, sites=sites))
        register_family(small.model_type)
        no_tokenizer = SimpleNamespace(save_pretrained=lambda folder: None, eos_token_id=None)
        with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
            folder = Path(scratch) / "model"
            write_checkpoint(model, no_tokenizer, plan, sites, folder, layout=layout, card="")
            opened = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, trust_remote_code=False).eval()
        difference = float((small_logits(opened) - expected).abs().max() / expected.abs().max())
    except PrunetuneError:
        raise
    except Exception as error:  # each class fails in its own way
        raise _refusal(config, layout, units, first_line(error)) from error
    if not difference <= TOLERANCE:
        raise _refusal(config, layout, units, f"it differs by {difference:.1e}")


def _refusal(config: Any, layout: str, units: Collection[str], reason: str) -> ConfigError:
    other = "per-layer" if layout == "uniform" else "uniform"
    return ConfigError(
        f"layout {layout} cannot hold {', '.join(units)} of {config.model_type!r}, as a small model built again shows "
        f"({reason}): use --layout {other}, or other budget.units"
    )


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
    # {heading: units kept by site}, None if not feasible; shares are of parameters, whatever the budget's kind.
    unlimited = replace(constraints, limits=None)
    least = min_counts(sites, unlimited)
    widths_by_plan: dict[str, dict[str, int] | None] = {"dense": {site.name: site.units for site in sites}}
    for keep in PREVIEW_SHARES:
        is_feasible = keep >= min_feasible_keep(sites, unlimited)
        plan = select(uniform_scores(sites), sites, keep, unlimited) if is_feasible else None
        widths_by_plan[f"keep {keep:.2f}"] = plan.widths() if plan else None
    widths_by_plan["least"] = least
    rows, uncounted = [], []
    for kind in BUDGET_KINDS:
        try:
            if kind in TIMED_BUDGETS and table is None:
                raise ConfigError(untimed_reason)
            costs, cells = costs_for_budget(kind, dense_shape, workload, table), [kind]
            for heading, widths in widths_by_plan.items():
                cost = 0.0 if widths is None else max_cost(costs, widths)
                amount = workload.batch * workload.generate / cost if kind == "throughput" and cost > 0 else cost
                # "least" is what users copy into a recipe, so it is rounded to the side that is feasible.
                formatted = (format_amount_rounded_to_limit if heading == "least" else format_amount)(amount, kind)
                cells.append(formatted if cost > 0 else NOT_FEASIBLE)
            rows.append(cells)
        except ConfigError as reason:
            uncounted.append(f"{kind:<11} {reason}")
    return [
        f"budgets of {workload.batch} x {workload.prompt} + {workload.generate} tokens, {workload.cached_tokens} in "
        f"the cache, {workload.dtype}, weights {workload.weights}, layout {constraints.layout} (even plans):",
        *table_lines(["budget", *(f">{plan}" for plan in widths_by_plan)], rows),
        *uncounted,
    ]


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
