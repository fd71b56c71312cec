"""The required gain: how much smaller and faster a run's model is than the dense one, and why if a margin is missed.

The dense and a pruned model are timed in turns in this process, so that what slows the machine slows both. Several
sizes are timed one pair after the other, which needs no more memory than tuning did.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prunetune.bench.api import measure_in_process
from prunetune.bench.models import context_length
from prunetune.bench.options import BenchOptions
from prunetune.bench.result import BenchedModel
from prunetune.bench.tile_alignment import SHOWN, TILE, misaligned_widths
from prunetune.config.recipe import RequireConfig, RunConfig
from prunetune.manifest import GainFacts
from prunetune.pipeline.prepare import RunContext
from prunetune.plan import Plan
from prunetune.pruning.units import Site
from prunetune.runs.folder import RunFolder
from prunetune.utils.files import write_text

SPEED_METRICS = ("throughput", "prefill", "decode")
GainRecord = dict[str, Any]


def measure_gain(run_folder: RunFolder, folders: Sequence[RunFolder], context: RunContext) -> None:
    """Time each folder's model in turns with its dense model, for its manifest; all rounds go to `bench.json`."""
    benches, options = [], gain_bench_options(context.config)
    for folder in folders:
        context.console.stage(f"bench: dense and {folder.path.name} in turns", 0)
        gc.collect()  # free the models that were open before
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
        found = measure_in_process([str(folder.path)], options)
        benches.append(found.to_dict())
        plan = Plan.load(folder.plan_file)
        gain = judge_gain(found.models[0], found.models[-1], context.config.require, plan, context.sites)
        folder.update_manifest(gain=GainFacts.from_dict(gain))
    write_text(run_folder.bench_file, json.dumps(benches, indent=2) + "\n")


def gain_bench_options(config: RunConfig) -> BenchOptions:
    """As the recipe's `require` says; a model of short context gets a shorter prompt, then a shorter answer."""
    require, context = config.require, context_length(config.model, trust_remote_code=config.trust_remote_code)
    generate = min(require.generate, max(2, context // 2)) if context else require.generate
    prompt = max(1, min(require.prompt, context - generate)) if context else require.prompt
    return BenchOptions(
        prompt=prompt,
        generate=generate,
        batch=str(require.batch),
        runs=require.runs,
        device=config.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )


def judge_gain(
    dense: BenchedModel, model: BenchedModel, requirements: RequireConfig, plan: Plan, sites: Sequence[Site]
) -> GainRecord:
    """The gain of one model, and of each required margin whether it is met or why not; JSON-ready."""
    cell = model.cells[0]
    ratios = {name: cell.ratios[name] for name in SPEED_METRICS if name in cell.ratios}
    speed = {name: {"median": ratio.median, "min": ratio.min, "max": ratio.max} for name, ratio in ratios.items()}
    smaller = 1 - model.facts.parameters / dense.facts.parameters
    faster = speed[requirements.speed]["median"] if requirements.speed in speed else None
    limits = [_limit_verdict("smaller", requirements.smaller, smaller)] if requirements.smaller else []
    if requirements.faster:
        limits.append(_limit_verdict("faster", requirements.faster, faster) | {"figure": requirements.speed})
    for limit in limits:
        if not limit["held"]:
            limit["says"] = _explain_missed(limit, dense, model, plan, sites)
    return {
        "smaller": smaller,
        "speed": speed,
        "figures": {name: {"dense": dense.cells[0].figures[name].median, "pruned": cell.figures[name].median}
                    for name in SPEED_METRICS if name in cell.figures and name in dense.cells[0].figures},
        "counted": dict(cell.counted),
        "limits": limits,
        "uneven": [str(width) for width in misaligned_widths(plan, sites)],
    }  # fmt: skip


def _limit_verdict(name: str, limit: float, measured: float | None) -> GainRecord:
    held = measured is not None and measured >= limit
    return {"gate": f"require.{name} >= {limit:g}", "limit": limit, "found": measured, "held": held}


def _explain_missed(
    limit: GainRecord, dense: BenchedModel, model: BenchedModel, plan: Plan, sites: Sequence[Site]
) -> str:
    if "figure" not in limit:
        return _explain_not_smaller(limit, dense, plan, sites)
    if limit["found"] is None:
        return f"{limit['gate']}: {limit['figure']} could not be measured ({model.cells[0].failed or 'no figure'})"
    measured = _format_below_limit(limit["found"], limit["limit"])
    missed = f"{limit['gate']}: {limit['figure']} is {measured} times the dense model's"
    misaligned, upper_bounds = misaligned_widths(plan, sites), _format_upper_bounds(model.cells[0].counted)
    if not misaligned:
        return f"{missed}; all widths are multiples of {TILE}, so none is to blame{upper_bounds}"
    more = f" and {len(misaligned) - SHOWN} more" if len(misaligned) > SHOWN else ""
    return f"{missed}; {'; '.join(map(str, misaligned[:SHOWN]))}{more}: set budget.align to {TILE}{upper_bounds}"


def _format_below_limit(measured: float, limit: float) -> str:
    """`measured` with as many digits, two or more, as show that it is below `limit`."""
    digits = next(digits for digits in range(2, 20) if round(measured, digits) < limit or digits == 19)
    return f"{measured:.{digits}f}"


def _format_upper_bounds(counted: Mapping[str, float]) -> str:
    """The largest speed-ups that FLOPs and bytes allow."""
    labels = {"prefill": "by FLOPs the prefill", "decode": "by bytes a decode step"}
    known = [f"{labels[name]} can gain x{value:.2f} at most" for name, value in counted.items() if name in labels]
    return f"; {', '.join(known)}: lower budget.keep, or ask for what is possible" if known else ""


def _explain_not_smaller(limit: GainRecord, dense: BenchedModel, plan: Plan, sites: Sequence[Site]) -> str:
    prunable = sum(site.params for site in sites)
    params: dict[int, list[int]] = {}  # layer -> prunable parameters kept, and of the dense model
    for site in sites:
        kept, total = params.setdefault(site.layer, [0, 0])
        params[site.layer] = [kept + len(plan.kept[site.name]) * site.unit_params, total + site.params]
    shares = {layer: kept / max(1, total) for layer, (kept, total) in params.items()}
    fullest = sorted(shares, key=lambda layer: -shares[layer])[:SHOWN]
    named = ", ".join(f"layer {layer} ({shares[layer]:.0%})" for layer in fullest)
    unprunable = 1 - prunable / dense.facts.parameters
    return (
        f"{limit['gate']}: {limit['found']:.1%} of all parameters are pruned; {unprunable:.0%} (embeddings, head, "
        f"norms) cannot be, and of the rest most is kept in {named}: lower budget.keep"
    )
