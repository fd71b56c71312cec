"""Gates on experts and on their channels, which have no linear of their own.

Shapes: N tokens, E experts, K of them picked for a token, H hidden size, I channels of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunetune.pruning.units import Site

MOST = 80.0  # exp of more is no float32
LEAST = torch.finfo(torch.float32).tiny  # in a layer that is closed, no expert is open, and nothing is to be NaN


def gate_router(model: nn.Module, site: Site, gate: Tensor) -> list[RemovableHandle]:
    """Route as if closed experts were not there: the softmax is over the open ones, and only they are picked.

    A router gives (logits [N, E], weights [N, K], experts [N, K]); its weights are probabilities over all experts, or
    over those picked (`norm_topk_prob`, and where the class has no such option).
    """

    def reroute(router: Any, _: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        logits, weights, picked = output
        shares = _gated_softmax(logits.float(), gate)
        chosen = shares.topk(picked.shape[-1], dim=-1).indices
        given = shares.gather(-1, chosen)
        total = (
            given.sum(-1, keepdim=True) if getattr(router, "norm_topk_prob", True) else torch.ones_like(given[:, :1])
        )
        total = total.clamp_min(LEAST)
        if gate.requires_grad:  # a closed expert's gate hears what it would have added, where it would have been picked
            lost = (picked[:, :, None] != chosen[:, None, :]).all(-1)
            given = torch.cat([given, shares.gather(-1, picked) * lost], -1)
            chosen = torch.cat([chosen, picked], -1)
        return logits, (given / total).to(weights.dtype), chosen

    return [model.get_submodule(site.gated_module).register_forward_hook(reroute)]


def _gated_softmax(logits: Tensor, gate: Tensor) -> Tensor:
    """Softmax over open experts, [N, E]: each counts as much as its gate. The gradient at a closed gate is finite."""
    highest = logits.masked_fill(gate <= 0, -torch.inf).amax(-1, keepdim=True)
    raised = (logits - highest).clamp(max=MOST).exp() * gate.to(logits.dtype)
    return raised / raised.sum(-1, keepdim=True).clamp_min(LEAST)


def gate_expert_columns(model: nn.Module, site: Site, gate: Tensor) -> list[RemovableHandle]:
    """Scale the columns of every expert's second linear; the weights are their own again after each pass.

    A scaled copy of these weights lives as long as the pass, or as long as its gradient is wanted.
    """
    experts: Any = model.get_submodule(site.gated_module)
    part = next(part for part in site.param_slices if part.parameter.endswith(".down_proj"))
    scale = gate.view(site.parent_groups, 1, -1) if part.axis == 2 else gate.view(site.parent_groups, -1, 1)
    kept: list[nn.Parameter] = []

    def put_on(module: Any, _: tuple[Any, ...]) -> None:
        kept.append(module._parameters["down_proj"])
        module._parameters["down_proj"] = kept[-1] * scale.to(kept[-1].dtype)

    def take_off(module: Any, _: tuple[Any, ...], __: Any) -> None:
        if kept:
            module._parameters["down_proj"] = kept.pop()

    return [
        experts.register_forward_pre_hook(put_on),
        experts.register_forward_hook(take_off, always_call=True),
    ]
