"""Prefill and decode speed of a loaded transformers model, for a run's manifest."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch

from prunetune.bench.clock import synchronized_time


@dataclass(frozen=True)
class Speed:
    """Tokens per second, median of several runs, with the spread (max - min over median)."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_spread: float
    decode_spread: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def measure_speed(model: Any, *, prompt: int = 256, batch: int = 2, new_tokens: int = 16, runs: int = 5) -> Speed:
    """Time a prefill of [batch, prompt] random tokens, then `new_tokens` greedy decode steps of batch 1 after a prompt.

    The prompt is shorter if the model's context is.
    """
    device = next(model.parameters()).device
    config = model.config.get_text_config()
    prompt = max(1, min(prompt, getattr(config, "max_position_embeddings", prompt + new_tokens) - new_tokens))
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, config.vocab_size, (batch, prompt), generator=rng).to(device)
    prefill, decode = [], []
    for run in range(runs + 1):  # the first warms up
        prefill_start = synchronized_time(device)
        model(tokens, use_cache=False, logits_to_keep=1)
        prefill_end = synchronized_time(device)
        out = model(tokens[:1], use_cache=True, logits_to_keep=1)
        decode_start = synchronized_time(device)
        for _ in range(new_tokens):
            out = model(out.logits[:, -1].argmax(-1, keepdim=True), past_key_values=out.past_key_values, use_cache=True)
        decode_end = synchronized_time(device)
        if run:
            prefill.append(tokens.numel() / (prefill_end - prefill_start))
            decode.append(new_tokens / (decode_end - decode_start))
    medians = [statistics.median(speeds) for speeds in (prefill, decode)]
    spreads = [(max(speeds) - min(speeds)) / statistics.median(speeds) for speeds in (prefill, decode)]
    return Speed(*medians, *spreads)
