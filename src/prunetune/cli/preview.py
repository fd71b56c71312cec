"""What is printed before anything is trained: by `prunetune sites`, and by `prunetune run --dry-run`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prunetune.config.recipe import RunConfig, WorkloadConfig
from prunetune.utils.tables import table_lines

if TYPE_CHECKING:
    from prunetune.pipeline.prepare import RunContext
    from prunetune.pruning.units import Site
    from prunetune.search.plan_rules import PlanConstraints

DEFAULT_WORKLOAD = WorkloadConfig()


def render_sites(
    model: str,
    *,
    layout: str,
    align: int,
    trust_remote_code: bool,
    units: Sequence[str] = ("kv-groups", "mlp-channels"),
    workload: WorkloadConfig = DEFAULT_WORKLOAD,
    device: str = "auto",
    measure: bool = False,
) -> str:
    """Sites, units, shares, legal widths, and what budgets would mean for a model; no weights are read.

    `measure` times the device for a latency table, where none is kept. Raises `PlanError` where layout uniform could
    not be written for this architecture.
    """
    from prunetune.model.loading import pick_device
    from prunetune.pipeline.plan_constraints import budget_table_lines
    from prunetune.pruning.units import prunable_params
    from prunetune.search.select import min_feasible_keep

    meta_model, sites, constraints = _open_sites(model, layout, align, units, trust_remote_code=trust_remote_code)
    smallest_keep = min_feasible_keep(sites, constraints)
    total_params = sum(parameter.numel() for parameter in meta_model.parameters())
    lines = [
        f"{model}: {meta_model.config.model_type}, {total_params / 1e6:,.1f} M parameters, "
        f"{prunable_params(sites) / 1e6:,.1f} M of them prunable",
        "",
        *table_lines(
            (">sites", "kind", ">units", ">parameters/unit", ">share", "legal widths"), _site_rows(sites, constraints)
        ),
        *_other_unit_lines(meta_model, units),
        "",
        *_preview_lines(meta_model, prunable_params(sites), total_params, smallest_keep),
        "",
        *budget_table_lines(meta_model, sites, constraints, workload, pick_device(device), measure=measure),
        "",
        f"smallest feasible budget.keep, layout {layout}: {smallest_keep:.3f}",
    ]
    return "\n".join(lines)


def describe_sites(
    model: str, layout: str, align: int, units: Sequence[str], *, trust_remote_code: bool
) -> dict[str, Any]:
    """What `render_sites` shows but the budgets, as values for JSON: a list of all sites, and the smallest keep."""
    from prunetune.pruning.units import prunable_params
    from prunetune.search.plan_rules import min_width
    from prunetune.search.select import min_feasible_keep

    meta_model, sites, constraints = _open_sites(model, layout, align, units, trust_remote_code=trust_remote_code)
    rows = [
        {"name": site.name, "kind": site.kind, "units": site.units, "unit_params": site.unit_params}
        | {"units_per_group": site.units_per_group, "min_units_per_group": min_width(site, constraints)}
        for site in sites
    ]
    return {
        "model": model,
        "model_type": meta_model.config.model_type,
        "params": sum(parameter.numel() for parameter in meta_model.parameters()),
        "prunable_params": prunable_params(sites),
        "min_keep": min_feasible_keep(sites, constraints),
        "align": constraints.align,
        "sites": rows,
    }


def _open_sites(
    model: str, layout: str, align: int, units: Sequence[str], *, trust_remote_code: bool
) -> tuple[Any, tuple[Site, ...], PlanConstraints]:
    """The model on the meta device, its sites, and the rules of plans for it."""
    from prunetune.export.checkpoint import kv_groups_validator, mlp_width_option
    from prunetune.model.loading import load_meta_model
    from prunetune.pruning.sites import find_sites
    from prunetune.search.plan_rules import PlanConstraints, default_align

    meta_model = load_meta_model(model, trust_remote_code=trust_remote_code)
    sites = find_sites(meta_model, units)
    if layout == "uniform" and any(site.kind == "mlp" for site in sites):
        mlp_width_option(meta_model.config)  # raises where the architecture has none
    return (
        meta_model,
        sites,
        PlanConstraints(layout, align or default_align(sites), 0, kv_groups_validator(meta_model.config)),
    )


def _site_rows(sites: Sequence[Site], constraints: PlanConstraints) -> list[tuple[str, ...]]:
    """One row for all sites that are alike."""
    from prunetune.pruning.units import prunable_params
    from prunetune.search.plan_rules import min_width

    # A hidden channel crosses the units of all other sites, so that its parameters are theirs, too.
    alike = Counter(
        (
            site.kind,
            site.units,
            site.units_per_group,
            site.total_unit_params + site.outer_params if site.kind == "hidden-channels" else site.unit_params,
            min_width(site, constraints),
        )
        for site in sites
    )
    return [
        (
            str(count),
            kind,
            str(units),
            f"{unit_params:,}",
            "all" if kind == "hidden-channels" else f"{count * units * unit_params / prunable_params(sites):.1%}",
            _legal_widths(kind, lowest, units_per_group, units // units_per_group, constraints),
        )
        for (kind, units, units_per_group, unit_params, lowest), count in alike.items()
    ]


def _legal_widths(kind: str, lowest: int, highest: int, groups: int, constraints: PlanConstraints) -> str:
    """The numbers of units that each of the site's groups may keep."""
    if kind == "attention":
        is_free = constraints.layout != "uniform"
        legal = [str(width) for width in range(lowest, highest + 1) if is_free or constraints.allows_groups(width)]
        return f"{', '.join(legal)} KV groups"
    if kind == "hidden-channels":
        return f"multiples of {lowest} from {lowest} to {highest}, the same in all layers"
    if kind in ("mlp", "expert-channels"):
        per_expert = f" in each of {groups} experts" if kind == "expert-channels" else ""
        return f"multiples of {constraints.align} from {lowest} to {highest}{per_expert}"
    if kind == "query-heads":
        return f"{lowest} to {highest} in each of {groups} KV groups"
    if kind == "experts":
        return f"{lowest} to {highest} experts"
    return "kept" if lowest else "kept or removed"


def _other_unit_lines(meta_model: Any, units: Sequence[str]) -> list[str]:
    """The kinds of unit that this model cannot lose, and those that `budget.units` could name too."""
    from prunetune.pruning.sites import unprunable_kinds
    from prunetune.pruning.units import KIND_BY_NAME

    unprunable = unprunable_kinds(meta_model, tuple(KIND_BY_NAME))
    lines = [f"{kind}: not prunable here: {reason}" for kind, reason in unprunable.items()]
    further = [name for name, kind in KIND_BY_NAME.items() if name not in units and kind not in unprunable]
    return [*lines, *(["", f"budget.units may name too: {', '.join(further)}"] if further else [])]


def _preview_lines(meta_model: Any, prunable_params: int, total_params: int, smallest_keep: float) -> list[str]:
    """Size and best possible speed-up at some shares; no speed-up of mixtures, where few experts see a token."""
    from prunetune.pipeline.plan_constraints import PREVIEW_SHARES, ParamCounts, preview_budget

    embedding, head = meta_model.get_input_embeddings().weight, meta_model.get_output_embeddings().weight
    dense = ParamCounts(total_params, prunable_params, 0 if head is embedding else embedding.numel(), head.numel())
    is_mixture = any(".experts." in name for name, _ in meta_model.named_parameters())
    columns = 4 if is_mixture else 6
    rows: list[tuple[str, ...]] = []
    for keep in PREVIEW_SHARES:
        preview = preview_budget(dense, keep)
        cells = (
            f"{keep:.2f}",
            f"{preview.parameters / 1e6:,.1f} M",
            f"{preview.parameters / total_params:.0%}",
            f"{preview.weight_bytes / 1e9:.2f} GB",
            f"x{preview.prefill_speedup:.2f}",
            f"x{preview.decode_speedup:.2f}",
        )
        rows.append(cells[:columns] if keep >= smallest_keep else (cells[0], "not feasible"))
    headings = (">keep", ">parameters", ">of all", ">in 16 bits", ">at best: prefill", ">decode")
    return table_lines(headings[:columns], rows)


def render_dry_run(config: RunConfig, *, resume: bool = False) -> str:
    """Sizes, rows, time, disk and budgets of a run, whose model and data are opened and checked as the run would.

    Writes nothing but a latency table into the cache, where a budget needs one. Raises what the run would raise.
    """
    from prunetune.model.loading import load_meta_model
    from prunetune.pipeline.monitor import make_monitor
    from prunetune.pipeline.plan_constraints import budget_table_lines, budget_usage_lines
    from prunetune.pipeline.prepare import disk_bytes_needed, prepare
    from prunetune.pipeline.time_estimate import describe_time
    from prunetune.pruning.units import removed_params
    from prunetune.pruning.vocabulary import prune_model
    from prunetune.runs.trackers import require_trackers
    from prunetune.search.select import select, uniform_scores
    from prunetune.utils.console import make_console

    require_trackers(config.report_to)
    console = make_console(config.train.log_every)
    try:
        context = prepare(config, resume=resume, console=console)
        make_monitor(context)  # raises for limits that could never act
    finally:
        console.close()
    constraints = context.constraints
    plan = select(uniform_scores(context.sites), context.sites, context.config.budget.keep, constraints)
    dense_params = context.dense_params
    pruned_params = dense_params - removed_params(context.sites, plan)
    meta_model = load_meta_model(config.model, trust_remote_code=config.trust_remote_code)
    kept = context.vocabulary
    if kept is not None:
        prune_model(meta_model, kept)
    lines = [
        *(
            [
                f"vocabulary: {kept.rows:,} of {kept.original_rows:,} tokens stay, {dense_params / 1e6:,.1f} of "
                f"{kept.original_params / 1e6:,.1f} M parameters"
            ]
            if kept
            else []
        ),
        f"{config.model}: {dense_params / 1e6:,.1f} M parameters -> {pruned_params / 1e6:,.1f} M with an even plan of "
        f"layout {config.layout}",
        *(budget_usage_lines(constraints.limits, plan) if constraints.limits else ()),
        *_data_lines(context),
        describe_time(context, meta_model),
        "disk: at most {:.2f} GB of checkpoints and {:.2f} GB of models".format(
            *(size / 1e9 for size in disk_bytes_needed(meta_model, context.sites, context.config))
        ),
        "",
        *budget_table_lines(meta_model, context.sites, constraints, config.workload, context.device),
        "",
        f"nothing was written; the run would go to {config.out}",
    ]
    return "\n".join(lines)


def _data_lines(context: RunContext) -> list[str]:
    """Rows by split, the longest of them, what of train carries loss, and how often the steps go through it."""
    counts = {name: len(split.examples) for name, split in context.encoded.items()}
    longest = max(split.longest for split in context.encoded.values())
    train = context.encoded["train"].examples
    tokens = max(1, sum(len(example.token_ids) for example in train))
    share = sum(example.loss_tokens for example in train) / tokens
    steps, size = context.config.train.steps, context.config.train.batch_size
    return [
        f"rows: {', '.join(f'{count:,} {name}' for name, count in counts.items())}; the longest has {longest:,} tokens",
        f"loss on {share:.0%} of the tokens of train (data.loss={context.config.data.loss})",
        f"{steps:,} steps of {size} examples: {steps * size / max(1, counts['train']):.1f} times the rows of train",
    ]
