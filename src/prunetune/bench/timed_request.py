"""Time one batch of requests: a prefill, then greedy decode steps with a cache."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunetune.bench import clock


@dataclass(frozen=True)
class RequestTimes:
    """Seconds of one batch of requests."""

    total: float
    prefill: float
    decode: float  # one step


def random_prompts(model: Any, batch: int, prompt: int) -> Tensor:
    """Random token ids [B, T] on the model's device, the same every time: their values do not change the time."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (batch, prompt), generator=rng)
    return tokens.to(model.device)


@torch.no_grad()
def time_request(
    model: Any, tokens: Tensor, cache: Any, new_tokens: int, decode_step: Callable[..., Any] | None = None
) -> RequestTimes:
    """Time a prefill of prompts [B, T] and the decode steps that write `new_tokens` of each.

    The first token comes from the prefill. `decode_step` is called for the steps in place of the model.
    """
    decode_step = model if decode_step is None else decode_step  # `or` fails: a compiled module has no truth value
    start = clock.synchronized_time(tokens.device)
    out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    first_token = clock.synchronized_time(tokens.device)
    for _ in range(new_tokens - 1):
        out = decode_step(token, past_key_values=cache, use_cache=True)
        # A recorded step overwrites its last output.
        token = out.logits[:, -1].argmax(-1, keepdim=True).clone()
    end = clock.synchronized_time(tokens.device)
    return RequestTimes(end - start, first_token - start, (end - first_token) / (new_tokens - 1))
