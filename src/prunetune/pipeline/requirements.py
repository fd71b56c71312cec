"""The gain as a gate: a run says how much smaller and faster its model has to be, and it is measured before it ends.

The dense and a pruned model take turns in this process (`bench`), so that what slows the machine slows both; of several
sizes one pair after the other, which needs no more memory than tuning did. Where a margin is missed, the words say what
is to blame: widths, or what was never pruned.
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
from prunetune.pruning.sites import Site
from prunetune.runs.folder import RunFolder
from prunetune.utils.files import write_text

SPEED_METRICS = ("throughput", "prefill", "decode")
GainRecord = dict[str, Any]


def measure_gain(run_folder: RunFolder, folders: Sequence[RunFolder], context: RunContext) -> None:
    """Measure the models of run folders beside their dense model; each manifest gets its `gain`, `place` all runs."""
    benches, options = [], gain_bench_options(context.config)
    for folder in folders:
        context.console.stage(f"bench: dense and {folder.path.name} in turns", 0)
        gc.collect()  # what ran before gives its memory back
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
        found = measure_in_process([str(folder.path)], options)
        benches.append(found.to_dict())
        plan = Plan.load(folder.plan_file)
        gain = judge_gain(found.models[0], found.models[-1], context.config.require, plan, context.sites)
        folder.update_manifest(gain=GainFacts.from_dict(gain))
    write_text(run_folder.bench_file, json.dumps(benches, indent=2) + "\n")


def gain_bench_options(config: RunConfig) -> BenchOptions:
    """As `gain` says; a model of few positions gets a shorter prompt, then a shorter answer."""
    gain, context = config.require, context_length(config.model, trust_remote_code=config.trust_remote_code)
    generate = min(gain.generate, max(2, context // 2)) if context else gain.generate
    prompt = max(1, min(gain.prompt, context - generate)) if context else gain.prompt
    return BenchOptions(
        prompt=prompt,
        generate=generate,
        batch=str(gain.batch),
        runs=gain.runs,
        device=config.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )


def judge_gain(
    dense: BenchedModel, model: BenchedModel, requirements: RequireConfig, plan: Plan, sites: Sequence[Site]
) -> GainRecord:
    """The gain of one model, the margins that were asked, and what is to blame where one is missed; JSON-ready."""
    cell = model.cells[0]
    speed = {name: _ends(cell.ratios[name]) for name in SPEED_METRICS if name in cell.ratios}
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
        "uneven": [str(one) for one in misaligned_widths(plan, sites)],
    }  # fmt: skip


def _ends(found: Any) -> dict[str, float]:
    return {"median": found.median, "min": found.min, "max": found.max}


def _limit_verdict(name: str, limit: float, measured: float | None) -> GainRecord:
    held = measured is not None and measured >= limit
    return {"gate": f"gain.{name} >= {limit:g}", "limit": limit, "found": measured, "held": held}


def _explain_missed(
    limit: GainRecord, dense: BenchedModel, model: BenchedModel, plan: Plan, sites: Sequence[Site]
) -> str:
    if "figure" not in limit:
        return _explain_not_smaller(limit, dense, plan, sites)
    if limit["found"] is None:
        return f"{limit['gate']}: {limit['figure']} could not be measured ({model.cells[0].failed or 'no figure'})"
    words = f"{limit['gate']}: {limit['figure']} is {_format_below_limit(limit['found'], limit['limit'])} times the dense model's"
    blamed, promised = misaligned_widths(plan, sites), _format_upper_bounds(model.cells[0].counted)
    if blamed:
        more = f" and {len(blamed) - SHOWN} more" if len(blamed) > SHOWN else ""
        return f"{words}; {'; '.join(map(str, blamed[:SHOWN]))}{more}: set budget.align to {TILE}{promised}"
    return f"{words}; all widths are multiples of {TILE}, so none is to blame{promised}"


def _format_below_limit(measured: float, limit: float) -> str:
    """With as many digits, two or more, as show that it is less."""
    digits = next(digits for digits in range(2, 20) if round(measured, digits) < limit or digits == 19)
    return f"{measured:.{digits}f}"


def _format_upper_bounds(counted: Mapping[str, float]) -> str:
    """What counts alone would allow."""
    words = {"prefill": "by FLOPs the prefill", "decode": "by bytes a decode step"}
    known = [f"{words[name]} can gain x{value:.2f} at most" for name, value in counted.items() if name in words]
    return f"; {', '.join(known)}: lower budget.keep, or ask for what is possible" if known else ""


def _explain_not_smaller(limit: GainRecord, dense: BenchedModel, plan: Plan, sites: Sequence[Site]) -> str:
    prunable = sum(site.params for site in sites)
    shares: dict[int, list[int]] = {}
    for site in sites:
        kept, units = shares.setdefault(site.layer, [0, 0])
        shares[site.layer] = [kept + len(plan.kept[site.name]) * site.unit_params, units + site.params]
    fullest = sorted(shares, key=lambda layer: -shares[layer][0] / max(1, shares[layer][1]))[:SHOWN]
    named = ", ".join(f"layer {layer} ({shares[layer][0] / max(1, shares[layer][1]):.0%})" for layer in fullest)
    whole = 1 - prunable / dense.facts.parameters
    return (
        f"{limit['gate']}: {limit['found']:.1%} of all parameters are gone; {whole:.0%} of them (embeddings, head, "
        f"norms) cannot go, and of the rest most stays in {named}: lower budget.keep"
    )
