"""A run on a base in 4 bits: is what was written what was tuned?"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from prunetune.errors import SelfCheckFailed
from prunetune.export.selfcheck import logits_of
from prunetune.pipeline.prepare import Setting
from prunetune.plan import Plan
from prunetune.pruning.masking import masked
from prunetune.train.adapters import tunes_all
from prunetune.train.checkpoints import State

log = logging.getLogger(__name__)

LIMIT = 0.2  # largest relative error of logits (root mean square) that arithmetic in 16 bits may explain


def tuned_beside(setting: Setting, state: State) -> bool:
    """Whether a checkpoint holds adapters of a base in 4 bits; false once these are merged and all weights tuned."""
    merged = state.is_cut and tunes_all(setting.config.train, setting.sites)
    return setting.config.lora.quantize != "off" and not merged


@torch.no_grad()
def compared(model: Any, plan: Plan, setting: Setting, tokens: Tensor, expected: Tensor) -> dict[str, Any]:
    """The model as it was tuned (4 bits, adapters beside them, gated) against the logits of the merged one.

    `expected` float32 [B, T, V]. For the manifest: scheme, root mean square error and share of equal first choices.
    Raises `SelfCheckFailed` where they are plainly two models.
    """
    mixed = torch.autocast(setting.device.type, setting.dtype, enabled=setting.dtype != torch.float32)
    with masked(model, plan, sites=setting.sites), mixed:
        found = logits_of(model, tokens)
    error = float((found - expected).norm() / expected.norm())
    same = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    said = f"{100 * error:.2f}% root mean square error of logits, {100 * same:.0f}% of most likely tokens equal"
    if not error <= LIMIT:  # NaN fails too
        raise SelfCheckFailed(
            f"the merged model is not the one that was tuned in 4 bits: {said} (limit {100 * LIMIT:.0f}%); "
            "the run's checkpoints are kept, please report this"
        )
    log.info("merged against tuned in %s: %s", setting.config.lora.quantize, said)
    return {"scheme": setting.config.lora.quantize, "error": error, "same": same}
