"""The check of a run on a 4-bit base: that the merged model gives the logits of the model that was tuned."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from prunetune.errors import SelfCheckFailed
from prunetune.export.selfcheck import compute_logits
from prunetune.pipeline.prepare import RunContext
from prunetune.plan import Plan
from prunetune.pruning.masking import masked
from prunetune.train.checkpoints import TrainingState

log = logging.getLogger(__name__)

MAX_LOGIT_ERROR = 0.2  # largest relative error of logits (root mean square) that arithmetic in 16 bits may explain


def has_nf4_adapters(context: RunContext, state: TrainingState) -> bool:
    """Whether a checkpoint holds adapters of a 4-bit base; false once they are merged and all weights are tuned."""
    is_merged = state.is_cut and context.config.train.weights == "all"
    return context.config.lora.quantize != "off" and not is_merged


@torch.no_grad()
def compare_with_merged(
    model: Any, plan: Plan, context: RunContext, tokens: Tensor, expected_logits: Tensor
) -> dict[str, Any]:
    """Compare the model as it was tuned (4-bit base, adapters, gated) with the logits of the merged one.

    `expected_logits` float32 [B, T, V]. Returns, for the manifest, the scheme, the relative root mean square error and
    the share of equal most likely tokens. Raises `SelfCheckFailed` if the error is above `MAX_LOGIT_ERROR`.
    """
    mixed = torch.autocast(context.device.type, context.dtype, enabled=context.dtype != torch.float32)
    with masked(model, plan, sites=context.sites), mixed:
        logits = compute_logits(model, tokens)
    error = float((logits - expected_logits).norm() / expected_logits.norm())
    same = float((logits.argmax(-1) == expected_logits.argmax(-1)).float().mean())
    summary = f"{100 * error:.2f}% root mean square error of logits, {100 * same:.0f}% of most likely tokens equal"
    if not error <= MAX_LOGIT_ERROR:  # NaN fails too
        raise SelfCheckFailed(
            f"the merged model is not the one that was tuned in 4 bits: {summary} "
            f"(limit {100 * MAX_LOGIT_ERROR:.0f}%); the run's checkpoints are kept, please report this"
        )
    log.info("merged against tuned in %s: %s", context.config.lora.quantize, summary)
    return {"scheme": context.config.lora.quantize, "error": error, "same": same}
