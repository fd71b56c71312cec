"""One batch of requests, timed: a prefill, then greedy steps with a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunetune.bench import clock


@dataclass(frozen=True)
class RequestTimes:
    """Seconds, as `runner.Sample` has them."""

    total: float
    prefill: float
    decode: float  # a step


def random_prompts(model: Any, batch: int, prompt: int) -> Tensor:
    """[B, T] random ids, the same every time: arithmetic does not read them."""
    rng = torch.Generator().manual_seed(0)
    found = torch.randint(model.config.get_text_config().vocab_size, (batch, prompt), generator=rng)
    return found.to(next(model.parameters()).device)


@torch.no_grad()
def time_request(
    model: Any, tokens: Tensor, cache: Any, new_tokens: int, decode_step: Callable[..., Any] | None = None
) -> RequestTimes:
    """Prompts [B, T] and `generate` tokens for each; `step` runs the decode steps in the model's place."""
    decode_step = model if decode_step is None else decode_step  # a compiled one has no truth value
    begun = clock.synchronized_time(tokens.device)
    out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    first = clock.synchronized_time(tokens.device)
    for _ in range(new_tokens - 1):
        out = decode_step(token, past_key_values=cache, use_cache=True)
        # A recorded step writes its next result over this one.
        token = out.logits[:, -1].argmax(-1, keepdim=True).clone()
    ended = clock.synchronized_time(tokens.device)
    return RequestTimes(ended - begun, first - begun, (ended - first) / (new_tokens - 1))
