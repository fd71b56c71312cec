"""How long a run will tune, before it does: FLOPs of its steps, over the speed of one layer on the device."""

import copy
import time
from statistics import fmean, median
from typing import Any

import torch

from prunetune.bench.latency.short_models import build_short_model
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.training_memory import training_shapes
from prunetune.data.sources import SplitName
from prunetune.pipeline.prepare import RunContext
from prunetune.pipeline.stages import TRIAL_SHARE, TRIED_RATES
from prunetune.train.schedule import build_schedule

EFFICIENCY = 0.3  # of a plain product's speed that a layer reaches


def describe_time(context: RunContext, meta_model: Any) -> str:
    """One line: an estimate of the tuning time on this device, on which one layer is timed."""
    flops, shapes = tuning_flops(context, meta_model), training_shapes(meta_model, context.sites)
    weights = sum(linear.weight_count for linear in shapes.linears) // shapes.layers
    # The first layer, random, forward and backward to its input, on at most 2,048 tokens and about 1e11 FLOPs.
    config = copy.deepcopy(meta_model.config)
    rows = max(1, min(context.config.train.micro_tokens, 2048, int(1e11 / (4 * weights))) // 64)
    text = config.get_text_config()
    text.vocab_size, text.pad_token_id = 64, None
    workload = WorkloadConfig(dtype=str(context.dtype).removeprefix("torch."))  # type: ignore[arg-type]
    layer = build_short_model(config, [0], workload, context.device).base_model
    inputs = torch.randn(rows, 64, text.hidden_size, device=context.device, dtype=context.dtype, requires_grad=True)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        layer(inputs_embeds=inputs, use_cache=False).last_hidden_state.float().square().mean().backward()
        assert inputs.grad is not None
        inputs.grad[0, 0, 0].item()  # which waits for the device
        seconds.append(time.perf_counter() - started)
    speed = 4 * weights * rows * 64 / median(seconds[1:])
    minutes = flops / speed / 60
    shown = f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{max(1, round(minutes))} min"
    return (
        f"time: about {shown} of tuning on {context.device}, scoring on top (an estimate under the machine's present "
        f"load, good to a factor of three: {flops:.1e} FLOPs, and one layer reaches {speed:.1e} a second; small models "
        "on a GPU are faster)"
    )


def tuning_flops(context: RunContext, meta_model: Any) -> float:
    """FLOPs of all that a run tunes: decisions, sizes, trials of learning rates, the dense model; not of attention.

    A weight takes 2 a token forward and 2 backward, and 2 more if it is tuned. Muon's products count at full speed.
    """
    config, shapes = context.config, training_shapes(meta_model, context.sites)
    train, head, rank = config.train, shapes.vocab_size * shapes.hidden_size, config.lora.rank
    dense = sum(linear.weight_count for linear in shapes.linears)
    adapters = sum(linear.rows + linear.columns for linear in shapes.linears)  # of rank 1
    muon = sum(30 * min(linear.rows, linear.columns) * linear.weight_count for linear in shapes.linears)
    shares: dict[SplitName, float] = {"train": 1.0}
    if "texts" in context.encoded:
        shares = {"train": 1 - config.data.distill_texts_share, "texts": config.data.distill_texts_share}
    lengths = {name: [len(row.token_ids) for row in split.examples] for name, split in context.encoded.items()}
    tokens = train.batch_size * sum(share * fmean(lengths[name]) for name, share in shares.items())
    teacher_flops = 0.0 if config.distill.teacher == "none" else 2 * (dense + 2 * head) * config.distill.share

    def tune(keep: float, rank: int = rank, teacher: float = teacher_flops, weights: str = train.weights) -> float:
        if weights == "all":
            return tokens * (6 * keep * dense + 4 * head + teacher) + EFFICIENCY * keep * muon
        return tokens * (4 * keep * dense + 6 * rank * adapters + 4 * head + teacher)

    schedule = build_schedule(config)
    total = (schedule.search + schedule.settle) * tune(1.0, weights="adapters")  # a search has two passes
    for cut in schedule.cuts:
        scores = 0 if schedule.search else config.search.init_batches * tune(1.0, rank=0, weights="adapters")
        total += scores + schedule.stage_steps(cut.step) * tune(schedule.keep_after(cut))
    total *= 1 if train.learning_rate else 1 + TRIAL_SHARE * len(TRIED_RATES)
    for index, keep in enumerate(config.budget.sizes):
        total += train.size_share[min(index, len(train.size_share) - 1)] * train.steps * tune(keep)
    if config.evaluate.dense_tuned or config.distill.teacher == "dense":
        total += train.steps * tune(1.0, rank=config.lora.dense_rank, teacher=0.0, weights="adapters")
    return total
