"""Gates on experts and on their channels, whose weights are fused parameters instead of linears.

Shapes: N tokens, E experts, K of them picked for a token, H hidden size, I channels of an expert.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunetune.pruning.units import ParamSlice, Site

MAX_EXPONENT = 80.0  # exp of more overflows float32
MIN_TOTAL = torch.finfo(torch.float32).tiny  # with every expert closed, shares are 0 / tiny, and not NaN


def gate_router(model: nn.Module, site: Site, gate: Tensor) -> list[RemovableHandle]:
    """Route as if closed experts were absent: the softmax is over open experts, and only they are picked.

    A router returns (logits [N, E], weights [N, K], experts [N, K]). Its weights are probabilities over the picked
    experts, or over all experts if the router's `norm_topk_prob` is false.
    """

    def reroute(router: Any, _: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        logits, weights, picked = output
        # Softmax, each term times the expert's gate; the gradient at a closed gate is finite.
        highest = logits.float().masked_fill(gate <= 0, -torch.inf).amax(-1, keepdim=True)
        terms = (logits.float() - highest).clamp(max=MAX_EXPONENT).exp() * gate.to(torch.float32)
        probabilities = terms / terms.sum(-1, keepdim=True).clamp_min(MIN_TOTAL)
        experts = probabilities.topk(picked.shape[-1], dim=-1).indices
        shares = probabilities.gather(-1, experts)
        is_normalised = getattr(router, "norm_topk_prob", True)
        total = shares.sum(-1, keepdim=True) if is_normalised else torch.ones_like(shares[:, :1])
        total = total.clamp_min(MIN_TOTAL)
        if gate.requires_grad:
            # Closed experts that the dense router picks get weight 0, so that their gates get a gradient.
            is_closed = (picked[:, :, None] != experts[:, None, :]).all(-1)
            shares = torch.cat([shares, probabilities.gather(-1, picked) * is_closed], -1)
            experts = torch.cat([experts, picked], -1)
        return logits, (shares / total).to(weights.dtype), experts

    return [model.get_submodule(site.gated_module).register_forward_hook(reroute)]


def gate_expert_columns(model: nn.Module, site: Site, gate: Tensor) -> list[RemovableHandle]:
    """Scale the columns of every expert's second linear during each pass; the weights are restored after it.

    The scaled copy of the weights is held for the pass, or until its gradient is taken.
    """
    experts: Any = model.get_submodule(site.gated_module)
    down_proj = down_proj_slice(site)
    scale = gate.view(site.parent_groups, 1, -1) if down_proj.axis == 2 else gate.view(site.parent_groups, -1, 1)
    unscaled: list[nn.Parameter] = []

    def scale_weights(module: Any, _: tuple[Any, ...]) -> None:
        unscaled.append(module._parameters["down_proj"])
        module._parameters["down_proj"] = unscaled[-1] * scale.to(unscaled[-1].dtype)

    def restore_weights(module: Any, _: tuple[Any, ...], __: Any) -> None:
        if unscaled:
            module._parameters["down_proj"] = unscaled.pop()

    return [
        experts.register_forward_pre_hook(scale_weights),
        experts.register_forward_hook(restore_weights, always_call=True),
    ]


def down_proj_slice(site: Site) -> ParamSlice:
    """The slice of the experts' second linears, in a site of expert channels."""
    return next(param for param in site.weights.params if param.parameter.endswith(".down_proj"))
