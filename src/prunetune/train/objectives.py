"""What is minimised: the language-model loss on answers, and group sparsity of adapters under closed gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunetune.data.batches import SMALL, Batch, collate, micro_batches
from prunetune.data.templates import Example
from prunetune.model.head import head_reads
from prunetune.model.masking import masked
from prunetune.model.sites import Site
from prunetune.train.adapters import group_norms


def answer_loss(model: Any, batch: Batch) -> Tensor:
    """Summed cross-entropy (nats) over the labelled tokens; the head runs only where labels are."""
    # Adapters are float32 and compute in the base's dtype, as is usual for mixed precision.
    mixed = torch.autocast(batch.labels.device.type, model.dtype, enabled=model.dtype != torch.float32)
    with mixed, head_reads(model, batch.predicting):
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
    return F.cross_entropy(logits.float(), batch.targets, reduction="sum")


def _batches(examples: Sequence[Example], pad_id: int, micro_tokens: int, device: torch.device) -> list[Batch]:
    # A GPU waits for launches, not for tokens: there, one padded pass is cheaper than two lean ones.
    small = SMALL if device.type == "cpu" else micro_tokens
    return [collate(part, pad_id) for part in micro_batches(examples, micro_tokens, small)]


def backward(model: Any, examples: Sequence[Example], pad_id: int, micro_tokens: int) -> float:
    """Accumulate gradients of the mean answer loss per token over `examples`; returns that loss."""
    device = next(model.parameters()).device
    batches = _batches(examples, pad_id, micro_tokens, device)
    tokens = sum(batch.tokens for batch in batches)
    loss = torch.zeros((), device=device)
    for batch in batches:
        part = answer_loss(model, batch.to(device)) / tokens
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    return float(loss)


def backward_to_gates(
    model: Any,
    gates: Mapping[str, Tensor],
    sites: Sequence[Site],
    examples: Sequence[Example],
    pad_id: int,
    micro_tokens: int,
) -> tuple[float, dict[str, Tensor]]:
    """The gated model's loss on `examples`, and its gradient at each gate: {site: [U]}."""
    leaves = {name: gate.detach().clone().requires_grad_() for name, gate in gates.items()}
    with masked(model, leaves, sites=sites):
        loss = backward(model, examples, pad_id, micro_tokens)
    return loss, {name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for name, leaf in leaves.items()}


@torch.no_grad()
def mean_loss(model: Any, examples: Sequence[Example], pad_id: int, micro_tokens: int) -> float:
    """Mean answer loss per token over `examples`, nats."""
    device = next(model.parameters()).device
    batches = _batches(examples, pad_id, micro_tokens, device)
    total = sum(float(answer_loss(model, batch.to(device))) for batch in batches)
    return total / max(1, sum(batch.tokens for batch in batches))


def group_lasso(model: Any, gates: Mapping[str, Tensor], sites: Sequence[Site]) -> Tensor:
    """Sum over closed units of the L2 norm of their adapter parts, mean over sites (ATP, section 3.3); a scalar.

    Drives what adapters hold for removed units to zero, so that cutting it changes nothing.
    """
    closed = [(group_norms(model, site) * (1 - gates[site.name])).sum() for site in sites]
    return torch.stack(closed).mean()
