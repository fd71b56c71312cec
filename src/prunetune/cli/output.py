"""What commands print: a run's outcome, and what a model's sites allow."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunetune.config.recipe import RunConfig, WorkloadConfig
from prunetune.evaluation.results import Evaluation, headline_metric, recovery
from prunetune.report.speed import interleaved_ratio, separate_ratio

DEFAULT_WORKLOAD = WorkloadConfig()


def render_run(folder: Path) -> str:
    """Sizes, scores beside the dense model, and where to look."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if "sizes" in manifest:
        return _render_sizes(folder, manifest)
    dense, pruned, check = manifest["model"], manifest["pruned"], manifest["selfcheck"]
    removed = 1 - pruned["decoder_params"] / dense["decoder_params"]
    lines = [
        f"decoder parameters  {_millions(dense, pruned, 'decoder_params')}  ({100 * removed:.1f}% removed)",
        f"all parameters      {_millions(dense, pruned, 'params')}",
        f"self-check          {check['max_relative']:.1e} relative (limit {check['limit']:.0e})",
        *_measured_budget_lines(manifest.get("budgets", [])),
        *_validation_limit_lines(manifest.get("gates", {}), manifest.get("validation", {})),
        *_limits(manifest.get("gain", {})),
        *_speed_lines(manifest),
    ]
    return "\n".join(
        [
            *lines,
            "",
            *_score_table_lines(folder),
            "",
            f"checkpoint {folder / 'model'}",
            f"report     {folder / 'report.html'}",
        ]
    )


def _speed_lines(manifest: dict[str, Any]) -> list[str]:
    """Beside the dense model: measured in turns where the run did that, and one by one."""
    turns = {kind: interleaved_ratio(manifest, kind) for kind in ("throughput", "prefill", "decode")}
    lines = [f"{f'{kind} in turns':<19} {times}" for kind, times in turns.items() if times]
    for kind in ("prefill", "decode"):
        if times := separate_ratio(manifest, kind):
            before, after = (manifest["speed"][name][f"{kind}_tokens_per_s"] for name in ("dense", "pruned"))
            lines.append(f"{kind:<8} tokens/s   {before:,.0f} -> {after:,.0f}  {times}")
    return lines


def _measured_budget_lines(budgets: list[dict[str, Any]]) -> list[str]:
    return [
        f"{budget['budget']:<19} {budget['words']}"
        + (f"; measured {100 * budget['error']:+.1f}% off that" if "error" in budget else "")
        for budget in budgets
    ]


def _validation_limit_lines(limits: dict[str, Any], validation: dict[str, Any]) -> list[str]:
    """What gates did, what the budget became, and what watching cost."""
    lines = [
        f"gate                step {event['step']}: {event['did']} ({event['gates'][0]})"
        for event in limits.get("events", [])
    ]
    lines += _limits(limits)
    if limits and (limits["kept"] or 0) > limits["keep_asked"]:
        lines.append(
            f"budget              {limits['kept']:.1%} remains, {limits['keep_asked']:.0%} was asked for: a gate held it"
        )
    if validation.get("share") is not None:
        lines.append(
            f"validation          every {validation['every']} steps, {validation['share']:.1%} of the tuning time"
        )
    return lines


def _limits(gates: dict[str, Any]) -> list[str]:
    return [
        f"gate                {limit['gate']}: {limit['found']:.4g}, limit {limit['limit']:.4g}"
        f"{'' if limit['held'] else ', OUTSIDE'}"
        for limit in gates.get("limits", [])
        if limit["found"] is not None
    ]


def _render_sizes(folder: Path, manifest: dict[str, Any]) -> str:
    """A line a size: what it keeps, its mean scores, its speed beside the dense model's."""
    lines = [f"{'keep':>6}  {'parameters':>11}  {'speed':>20}  {'scores (means over tasks)':<40}  checkpoint"]
    for place in manifest["sizes"]:
        file = folder / place / "manifest.json"
        own = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if "pruned" not in own:
            lines.append(f"{Path(place).name:>6}  not made")
            continue
        speed = str(interleaved_ratio(own, "throughput") or "–")
        params = f"{own['pruned']['params'] / 1e6:,.1f} M"
        scores = _format_mean_scores(folder / place / "evaluation" / "pruned.json")
        lines.append(f"{Path(place).name:>6}  {params:>11}  {speed:>20}  {scores:<40}  {folder / place / 'model'}")
    return "\n".join([*lines, "", f"report     {folder / 'report.html'}"])


def _format_mean_scores(file: Path) -> str:
    found = Evaluation.from_json(file.read_text(encoding="utf-8"))
    metrics = dict.fromkeys(headline_metric(result) for result in found.tasks.values())
    scores = {metric: found.mean(metric) for metric in metrics}
    return ", ".join(f"{metric} {score.value:.3f} ±{score.se:.3f}" for metric, score in scores.items())


def _millions(dense: dict[str, Any], pruned: dict[str, Any], key: str) -> str:
    return f"{dense[key] / 1e6:,.1f} M -> {pruned[key] / 1e6:,.1f} M"


def _score_table_lines(folder: Path) -> list[str]:
    files = {name: folder / "evaluation" / f"{name}.json" for name in ("dense", "tuned", "pruned")}
    found = {
        name: Evaluation.from_json(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()
    }
    titles = {"dense": "dense", "tuned": "dense tuned", "pruned": "pruned"}
    recovered = "recovery" if "tuned" in found else "of dense"
    lines = [f"{'task':<20} {'metric':<11}" + "".join(f"{titles[name]:>18}" for name in found) + f"{recovered:>10}"]
    reference = found.get("tuned", found.get("dense"))
    for task, result in found["pruned"].tasks.items():
        metric = headline_metric(result)
        cells = "".join(
            f"{scored.tasks[task].scores[metric].value:>10.3f} ±{scored.tasks[task].scores[metric].se:.3f}"
            for scored in found.values()
        )
        share = recovery(result.scores[metric], reference.tasks[task].scores[metric], metric) if reference else 0.0
        shown = f"{100 * share:.0f}%" if math.isfinite(share) else "–"  # of a reference of 0
        lines.append(f"{task:<20} {metric:<11} {cells} {shown:>9}")
    return lines


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
    """Sites, units, shares, legal shapes, and what budgets would mean for a model, from its configuration.

    `measure` times the device for a latency table, where none is kept.
    """
    from prunetune.cost.parameters import prunable_params
    from prunetune.export.stock_config import kv_groups_validator, mlp_width_option
    from prunetune.model.loading import load_meta_model, pick_device
    from prunetune.pipeline.budget_preview import budget_table_lines
    from prunetune.pruning.sites import find_sites
    from prunetune.search.select import PlanConstraints, default_align, min_feasible_keep

    structure = load_meta_model(model, trust_remote_code=trust_remote_code)
    sites = find_sites(structure, units)
    if layout == "uniform" and any(site.kind == "mlp" for site in sites):
        mlp_width_option(structure.config)  # refuses where no file could say it
    shape = PlanConstraints(layout, align or default_align(sites), 0, kv_groups_validator(structure.config))
    everything = sum(parameter.numel() for parameter in structure.parameters())
    lines = [
        f"{model}: {structure.config.model_type}, {everything / 1e6:,.1f} M parameters, "
        f"{prunable_params(sites) / 1e6:,.1f} M of them prunable",
        "",
        f"{'sites':>5}  {'kind':<16} {'units':>6}  {'parameters/unit':>15}  {'share':>6}  legal widths",
        *_site_rows(sites, shape),
        *_other_unit_lines(structure, units),
    ]
    least = min_feasible_keep(sites, shape)
    lines += ["", *_preview_lines(structure, prunable_params(sites), everything, least)]
    place = pick_device(device)
    lines += ["", *budget_table_lines(structure, sites, shape, workload, place, measure=measure)]
    return "\n".join([*lines, "", f"smallest feasible budget.keep, layout {layout}: {least:.3f}"])


def render_dry_run(config: RunConfig, *, resume: bool = False) -> str:
    """Open model and data as a run would, refuse what it would refuse, and say what the budgets mean; writes nothing
    but a latency table into the cache, where a budget needs one."""
    from prunetune.model.loading import load_meta_model
    from prunetune.pipeline.budget_preview import budget_table_lines, budget_usage_lines
    from prunetune.pipeline.monitor import make_monitor
    from prunetune.pipeline.prepare import prepare
    from prunetune.pruning.sites import kept_params
    from prunetune.runs.trackers import require_trackers
    from prunetune.search.feasibility import uniform_scores
    from prunetune.search.select import select
    from prunetune.utils.console import make_console

    require_trackers(config.report_to)
    console = make_console(config.train.log_every)
    try:
        setting = prepare(config, resume=resume, console=console)
        make_monitor(setting)  # refuses gates that could never act
    finally:
        console.close()
    plan = select(uniform_scores(setting.sites), setting.sites, setting.config.budget.keep, setting.constraints)
    gone = sum(site.params for site in setting.sites) - kept_params(setting.sites, plan)
    structure = load_meta_model(config.model, trust_remote_code=config.trust_remote_code)
    lines = [
        f"{config.model}: {setting.dense_params / 1e6:,.1f} M parameters -> {(setting.dense_params - gone) / 1e6:,.1f} M "
        f"with an even plan of layout {config.layout}",
        *(budget_usage_lines(setting.constraints.limits, plan) if setting.constraints.limits else ()),
        *_data_lines(setting),
        "",
        *budget_table_lines(structure, setting.sites, setting.constraints, config.workload, setting.device),
    ]
    return "\n".join([*lines, "", f"nothing was written; the run would go to {config.out}"])


def _data_lines(context: Any) -> list[str]:
    """Rows by split, the longest of them, and how often the steps go through train."""
    counts = {name: len(part.examples) for name, part in context.encoded.items()}
    longest = max(part.longest for part in context.encoded.values())
    steps, size = context.config.train.steps, context.config.train.batch_size
    return [
        f"rows: {', '.join(f'{count:,} {name}' for name, count in counts.items())}; the longest has {longest:,} tokens",
        f"{steps:,} steps of {size} examples: {steps * size / max(1, counts['train']):.1f} times the rows of train",
    ]


def _preview_lines(meta_model: Any, prunable_params: int, total_params: int, smallest_keep: float) -> list[str]:
    """What some budgets would mean; no gain in time of mixtures, where a token's experts are what counts."""
    from prunetune.pipeline.budget_preview import PREVIEW_SHARES, ParamCounts, preview_budget

    table, head = meta_model.get_input_embeddings().weight, meta_model.get_output_embeddings().weight
    dense = ParamCounts(total_params, prunable_params, 0 if head is table else table.numel(), head.numel())
    mixture = any(".experts." in name for name, _ in meta_model.named_parameters())
    lines = [f"{'keep':>5}  {'parameters':>11}  {'in 16 bits':>10}" + ("" if mixture else "  at best: prefill  decode")]
    for keep in PREVIEW_SHARES:
        found = preview_budget(dense, keep)
        times = "" if mixture else f"            x{found.prefill_speedup:.2f}   x{found.decode_speedup:.2f}"
        sizes = f"{found.parameters / 1e6:>9,.1f} M  {found.weight_bytes / 1e9:>7.2f} GB{times}"
        lines.append(f"{keep:>5.2f}  {'not feasible' if keep < smallest_keep else sizes}")
    return lines


def _site_rows(sites: Sequence[Any], constraints: Any) -> list[str]:
    """One row for all sites that are alike."""
    from prunetune.cost.parameters import prunable_params
    from prunetune.search.select import min_width

    alike = Counter(
        (site.kind, site.units_per_group, site.parent_groups, site.unit_params, min_width(site, constraints))
        for site in sites
    )
    return [
        f"{count:>5}  {kind:<16} {length * lanes:>6}  {price:>15,}  "
        f"{100 * count * length * lanes * price / prunable_params(sites):>5.1f}%  {_legal(kind, low, length, lanes, constraints)}"
        for (kind, length, lanes, price, low), count in alike.items()
    ]


def _legal(kind: str, low: int, length: int, lanes: int, constraints: Any) -> str:
    """The numbers of units that a site may keep."""
    if kind == "attention":
        is_free = constraints.layout != "uniform"
        return (
            f"{', '.join(str(g) for g in range(low, length + 1) if is_free or constraints.allows_groups(g))} KV groups"
        )
    if kind in ("mlp", "expert-channels"):
        each = f" in each of {lanes} experts" if kind == "expert-channels" else ""
        return f"multiples of {constraints.align} from {low} to {length}{each}"
    if kind == "query-heads":
        return f"{low} to {length} in each of {lanes} KV groups"
    if kind == "experts":
        return f"{low} to {length} experts"
    return "stays" if low else "stays or goes"


def _other_unit_lines(meta_model: Any, units: Sequence[str]) -> list[str]:
    """What `units` could name, and what this model cannot lose."""
    from prunetune.pruning.sites import unprunable_kinds
    from prunetune.pruning.units import KIND_BY_NAME

    whole = unprunable_kinds(meta_model, tuple(KIND_BY_NAME))
    lines = [f"{'':>5}  {kind:<16} stays whole: {reason}" for kind, reason in whole.items()]
    further = [name for name, kind in KIND_BY_NAME.items() if name not in units and kind not in whole]
    return [*lines, *(["", f"budget.units may name too: {', '.join(further)}"] if further else [])]
