"""The gain: how much smaller and faster a run's model is than the dense one, and why if a required margin is missed.

The dense and a pruned model are timed in turns in this process, so that what slows the machine slows both. Several
sizes are timed one pair after the other, which needs no more memory than tuning did.
"""

import gc
import json
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from prunetune.bench.measure_models import measure_in_process
from prunetune.bench.models import context_length
from prunetune.bench.options import BenchOptions
from prunetune.bench.result import BenchedModel
from prunetune.bench.runner_protocol import OutOfMemory
from prunetune.bench.tile_alignment import SHOWN, TILE, misaligned_widths
from prunetune.config.recipe import RequireConfig, RunConfig
from prunetune.manifest import FigureFacts, GainFacts, LimitFacts, SpeedupFacts
from prunetune.pipeline.prepare import RunContext
from prunetune.plan import Plan
from prunetune.pruning.units import Site, UnitKind
from prunetune.runs.folder import RunFolder
from prunetune.utils.files import write_text

log = logging.getLogger(__name__)
SPEED_METRICS = ("throughput", "prefill", "decode")
SHORT_REQUEST = {"prompt": 256, "generate": 17, "runs": 5}  # at most, where no margin is required


def measure_gain(run_folder: RunFolder, folders: Sequence[RunFolder], context: RunContext) -> None:
    """Time each folder's model in turns with its dense model, for its manifest; all rounds go to `bench.json`.

    Where no margin is required and both models do not fit into memory at once, their speed is not measured.
    """
    benches, options = [], gain_bench_options(context.config)
    for folder in folders:
        context.console.stage(f"bench: dense and {folder.path.name} in turns", 0)
        gc.collect()  # free the models that were open before
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            bench, plan = measure_in_process([str(folder.path)], options), Plan.load(folder.plan_file)
        except OutOfMemory as failed:
            if context.config.require.has_requirements:
                raise
            log.warning("the speed of %s was not measured: %s", folder.path, failed)
            continue
        benches.append(bench.to_dict())
        gain = judge_gain(bench.models[0], bench.models[-1], context.config.require, plan, context.sites)
        folder.update_manifest(gain=gain)
    write_text(run_folder.bench_file, json.dumps(benches, indent=2) + "\n")


def gain_bench_options(config: RunConfig) -> BenchOptions:
    """As the recipe's `require` says, and shorter for one size of which no margin is required.

    A model of short context gets a shorter prompt, then a shorter answer.
    """
    require, context = config.require, context_length(config.model, trust_remote_code=config.trust_remote_code)
    if not require.has_requirements and not config.budget.sizes:
        require = replace(require, **{name: min(most, getattr(require, name)) for name, most in SHORT_REQUEST.items()})
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
) -> GainFacts:
    """The gain of one model, and of each required margin whether it is met or why not."""
    cell, dense_cell = model.cells[0], dense.cells[0]
    ratios = {name: cell.ratios[name] for name in SPEED_METRICS if name in cell.ratios}
    speedups = {name: SpeedupFacts(median=ratio.median, min=ratio.min, max=ratio.max) for name, ratio in ratios.items()}
    smaller = 1 - model.facts.parameters / dense.facts.parameters
    faster = ratios[requirements.speed].median if requirements.speed in ratios else None
    limits = []
    if requirements.smaller:
        limit = _limit_facts("smaller", requirements.smaller, smaller)
        limits.append(limit if limit.is_met else _explain_not_smaller(limit, dense, plan, sites))
    if requirements.faster:
        limit = replace(_limit_facts("faster", requirements.faster, faster), figure=requirements.speed)
        limits.append(limit if limit.is_met else _explain_not_faster(limit, model, plan, sites))
    both = [name for name in SPEED_METRICS if name in cell.figures and name in dense_cell.figures]
    return GainFacts(
        smaller=smaller,
        speedups=speedups,
        figures={
            name: FigureFacts(dense=dense_cell.figures[name].median, pruned=cell.figures[name].median) for name in both
        },
        counted=dict(cell.counted),
        limits=tuple(limits),
        misaligned_widths=tuple(map(str, misaligned_widths(plan, sites))),
    )


def _limit_facts(name: str, limit: float, measured: float | None) -> LimitFacts:
    is_met = measured is not None and measured >= limit
    return LimitFacts(condition=f"require.{name} >= {limit:g}", limit=limit, measured=measured, is_met=is_met)


def _explain_not_faster(limit: LimitFacts, model: BenchedModel, plan: Plan, sites: Sequence[Site]) -> LimitFacts:
    start, cell = f"{limit.condition}: {limit.figure}", model.cells[0]
    if limit.measured is None or limit.limit is None:
        return replace(limit, explanation=f"{start} could not be measured ({cell.failed or 'no figure'})")
    # As many digits, two or more, as show that it is below the limit.
    digits = next(digits for digits in range(2, 20) if round(limit.measured, digits) < limit.limit or digits == 19)
    missed = f"{start} is {limit.measured:.{digits}f} times the dense model's"
    labels = {"prefill": "by FLOPs the prefill", "decode": "by bytes a decode step"}
    known = [f"{labels[name]} can gain x{bound:.2f} at most" for name, bound in cell.counted.items() if name in labels]
    upper_bounds = f"; {', '.join(known)}: lower budget.keep, or ask for what is possible" if known else ""
    misaligned = misaligned_widths(plan, sites)
    if not misaligned:
        reason = f"{missed}; all widths are multiples of {TILE}, so none is to blame{upper_bounds}"
    else:
        more = f" and {len(misaligned) - SHOWN} more" if len(misaligned) > SHOWN else ""
        widths = "; ".join(map(str, misaligned[:SHOWN]))
        reason = f"{missed}; {widths}{more}: set budget.align to {TILE}{upper_bounds}"
    return replace(limit, explanation=reason)


def _explain_not_smaller(limit: LimitFacts, dense: BenchedModel, plan: Plan, sites: Sequence[Site]) -> LimitFacts:
    prunable = sum(site.params for site in sites)
    params: dict[int, list[int]] = {}  # layer -> prunable parameters kept, and of the dense model
    for site in (site for site in sites if site.kind is not UnitKind.HIDDEN_CHANNEL):
        kept, total = params.setdefault(site.layer, [0, 0])
        params[site.layer] = [kept + len(plan.kept[site.name]) * site.unit_params, total + site.params]
    shares = {layer: kept / max(1, total) for layer, (kept, total) in params.items()}
    fullest = sorted(shares, key=lambda layer: -shares[layer])[:SHOWN]
    named = ", ".join(f"layer {layer} ({shares[layer]:.0%})" for layer in fullest)
    unprunable = 1 - prunable / dense.facts.parameters
    reason = (
        f"{limit.condition}: {limit.measured:.1%} of all parameters are pruned; {unprunable:.0%} (embeddings, head, "
        f"norms) cannot be, and of the rest most is kept in {named}: lower budget.keep"
    )
    return replace(limit, explanation=reason)
