"""How long a run will tune, before it does: the FLOPs of its steps, over what a short product reaches on the device."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from prunetune.cost.training_flops import step_flops
from prunetune.cost.training_memory import TrainingSetup, TrainingShapes, training_setup, training_shapes
from prunetune.data.sources import SplitName
from prunetune.pipeline.prepare import RunContext
from prunetune.pipeline.stages import TRIAL_SHARE, TRIED_RATES
from prunetune.train.schedule import build_schedule

# Share of a plain product's speed that tuning reaches, with norms, attention, losses, padding and launches: measured
# 0.4 on an H200 (docs/scaling.md). Small models are slower.
EFFICIENCY = 0.4
MUON_ITERATIONS = 5
MEASURED_SECONDS = 0.2


def describe_time(context: RunContext, meta_model: Any) -> str:
    """One line: an estimate of the tuning time on this device, which is timed for a fraction of a second."""
    flops = tuning_flops(context, meta_model)
    hidden = meta_model.config.get_text_config().hidden_size
    speed = product_flops_per_second(context.device, context.dtype, hidden) * context.ranks.world_size
    minutes = flops / (EFFICIENCY * speed) / 60
    shown = f"about {minutes / 60:.1f} hours" if minutes >= 90 else f"about {minutes:.0f} minutes"
    shown = shown if minutes >= 1.5 else "a minute or less"
    return (
        f"time: tuning takes {shown} on {context.device} (an estimate, right within a factor of two or three: "
        f"{flops:.1e} FLOPs at {EFFICIENCY:.0%} of the {speed:.1e}/s of a plain product); scoring comes on top"
    )


def tuning_flops(context: RunContext, meta_model: Any) -> float:
    """FLOPs of all that a run tunes: every size, the dense model, trials of learning rates; not of validations."""
    config, shapes = context.config, training_shapes(meta_model, context.sites)
    text_share = config.data.distill_texts_share if "texts" in context.encoded else 0.0
    shares: dict[SplitName, float] = {"train": 1 - text_share, **({"texts": text_share} if text_share else {})}
    lengths = {name: [len(each.token_ids) for each in split.examples] for name, split in context.encoded.items()}
    length = sum(share * fmean(lengths[name]) for name, share in shares.items())
    square = sum(share * fmean(each**2 for each in lengths[name]) for name, share in shares.items())
    shape = {"tokens": round(config.train.batch_size * length), "length": round(square / length)}
    longest = max(max(lengths[name]) for name in shares)
    setup = training_setup(config, context.dtype, longest=longest, all_weights=config.train.weights == "all")
    schedule = build_schedule(config)
    total = float(schedule.search * step_flops(shapes, setup, phase="search", **shape))
    total += (schedule.settle - schedule.search) * _tune(shapes, replace(setup, keep=1.0, all_weights=False), shape)
    for cut in schedule.cuts:
        total += schedule.stage_steps(cut.step) * _tune(shapes, replace(setup, keep=schedule.keep_after(cut)), shape)
        if config.search.method == "progressive":
            total += config.search.init_batches * step_flops(shapes, replace(setup, keep=1.0), phase="scores", **shape)
    if not config.train.learning_rate:
        total *= 1 + TRIAL_SHARE * len(TRIED_RATES)
    size_shares = config.train.size_share
    for index, keep in enumerate(config.budget.sizes):
        steps = config.train.steps * size_shares[min(index, len(size_shares) - 1)]
        total += steps * _tune(shapes, replace(setup, keep=keep), shape)
    if config.evaluate.dense_tuned or config.distill.teacher == "dense":
        dense = replace(setup, keep=1.0, rank=config.lora.dense_rank, all_weights=False, teacher=False)
        total += config.train.steps * _tune(shapes, dense, shape)
    return total


def _tune(shapes: TrainingShapes, setup: TrainingSetup, shape: dict[str, int]) -> float:
    """FLOPs of one tuning step; those of Muon, plain products at full speed, count as much as they take time."""
    flops = float(step_flops(shapes, setup, phase="tune", **shape))
    if setup.all_weights:
        for linear in (linear.after_cut(setup.keep) for linear in shapes.linears):
            short, long = sorted((linear.rows, linear.columns))
            flops += EFFICIENCY * MUON_ITERATIONS * (4 * short**2 * long + 2 * short**3)
    return flops


def product_flops_per_second(device: torch.device, dtype: torch.dtype, hidden: int) -> float:
    """The speed of products of [512, hidden] by [hidden, 4 hidden], the best of a few."""
    left = torch.randn(512, hidden, device=device, dtype=dtype)
    right = torch.randn(hidden, 4 * hidden, device=device, dtype=dtype)
    best, ends = math.inf, time.perf_counter() + MEASURED_SECONDS
    while best == math.inf or time.perf_counter() < ends:
        started = time.perf_counter()
        (left @ right)[0, 0].item()  # which waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * 512 * hidden * 4 * hidden / best
