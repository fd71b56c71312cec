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

from prunetune.bench.api import measure_here
from prunetune.bench.models import context_of
from prunetune.bench.options import BenchOptions
from prunetune.bench.result import Benched
from prunetune.bench.widths import SHOWN, TILE, uneven
from prunetune.config.recipe import GainConfig, RunConfig
from prunetune.pipeline.prepare import Setting
from prunetune.plan import Plan
from prunetune.pruning.sites import Site
from prunetune.runs.folder import RunFolder
from prunetune.utils.files import write_text

SPEEDS = ("throughput", "prefill", "decode")
Record = dict[str, Any]


def gained(place: RunFolder, folders: Sequence[RunFolder], setting: Setting) -> None:
    """Measure the models of run folders beside their dense model; each manifest gets its `gain`, `place` all runs."""
    benches, options = [], options_for(setting.config)
    for folder in folders:
        setting.console.stage(f"bench: dense and {folder.path.name} in turns", 0)
        gc.collect()  # what ran before gives its memory back
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
        found = measure_here([str(folder.path)], options)
        benches.append(found.to_dict())
        plan = Plan.load(folder.plan)
        folder.note(gain=judged(found.models[0], found.models[-1], setting.config.gain, plan, setting.sites))
    write_text(place.bench, json.dumps(benches, indent=2) + "\n")


def options_for(config: RunConfig) -> BenchOptions:
    """As `gain` says; a model of few positions gets a shorter prompt, then a shorter answer."""
    gain, context = config.gain, context_of(config.model, trust_remote_code=config.trust_remote_code)
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


def judged(dense: Benched, model: Benched, gain: GainConfig, plan: Plan, sites: Sequence[Site]) -> Record:
    """The gain of one model, the margins that were asked, and what is to blame where one is missed; JSON-ready."""
    cell = model.cells[0]
    speed = {name: _ends(cell.ratios[name]) for name in SPEEDS if name in cell.ratios}
    smaller = 1 - model.facts.parameters / dense.facts.parameters
    faster = speed[gain.speed]["median"] if gain.speed in speed else None
    limits = [_limit("smaller", gain.smaller, smaller)] if gain.smaller else []
    if gain.faster:
        limits.append(_limit("faster", gain.faster, faster) | {"figure": gain.speed})
    for limit in limits:
        if not limit["held"]:
            limit["says"] = _missed(limit, dense, model, plan, sites)
    return {
        "smaller": smaller,
        "speed": speed,
        "figures": {name: {"dense": dense.cells[0].figures[name].median, "pruned": cell.figures[name].median}
                    for name in SPEEDS if name in cell.figures and name in dense.cells[0].figures},
        "counted": dict(cell.counted),
        "limits": limits,
        "uneven": [str(one) for one in uneven(plan, sites)],
    }  # fmt: skip


def _ends(found: Any) -> dict[str, float]:
    return {"median": found.median, "min": found.min, "max": found.max}


def _limit(name: str, limit: float, found: float | None) -> Record:
    held = found is not None and found >= limit
    return {"gate": f"gain.{name} >= {limit:g}", "limit": limit, "found": found, "held": held}


def _missed(limit: Record, dense: Benched, model: Benched, plan: Plan, sites: Sequence[Site]) -> str:
    if "figure" not in limit:
        return _not_smaller(limit, dense, plan, sites)
    if limit["found"] is None:
        return f"{limit['gate']}: {limit['figure']} could not be measured ({model.cells[0].failed or 'no figure'})"
    words = f"{limit['gate']}: {limit['figure']} is {_below(limit['found'], limit['limit'])} times the dense model's"
    blamed, promised = uneven(plan, sites), _promised(model.cells[0].counted)
    if blamed:
        more = f" and {len(blamed) - SHOWN} more" if len(blamed) > SHOWN else ""
        return f"{words}; {'; '.join(map(str, blamed[:SHOWN]))}{more}: set budget.align to {TILE}{promised}"
    return f"{words}; all widths are multiples of {TILE}, so none is to blame{promised}"


def _below(found: float, limit: float) -> str:
    """With as many digits, two or more, as show that it is less."""
    digits = next(digits for digits in range(2, 20) if round(found, digits) < limit or digits == 19)
    return f"{found:.{digits}f}"


def _promised(counted: Mapping[str, float]) -> str:
    """What counts alone would allow."""
    words = {"prefill": "by FLOPs the prefill", "decode": "by bytes a decode step"}
    known = [f"{words[name]} can gain x{value:.2f} at most" for name, value in counted.items() if name in words]
    return f"; {', '.join(known)}: lower budget.keep, or ask for what is possible" if known else ""


def _not_smaller(limit: Record, dense: Benched, plan: Plan, sites: Sequence[Site]) -> str:
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
