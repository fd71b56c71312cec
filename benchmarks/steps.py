"""Time of one training step on this machine: padded passes as they come, packed ones recorded, and compiled, too.

    python benchmarks/steps.py [--repeats 15]

A random Llama of SmolLM2-135M's shape (30 layers, GQA 9/3) with LoRA rank 32, and batches of 16 with lengths as in
mixed domain data (median 220 tokens, a tail to 1,500): no download. Each step ends with its loss on the host.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from prunetune.config.recipe import LoraSettings, from_mapping
from prunetune.data.encoding import Example
from prunetune.pruning.sites import find_sites
from prunetune.train.adapters import add_adapters, trainable_parameters
from prunetune.train.passes import PackedPasses, PaddedPasses, Passes
from prunetune.utils.environment import device_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    model = smollm2().to(device, torch.bfloat16)
    sites = tuple(find_sites(model))
    add_adapters(model, sites, LoraSettings(), seed=0)
    gates = {site.name: (torch.arange(site.units, device=device) % 5 > 1).float() for site in sites}
    config = from_mapping({})
    kinds: dict[str, Passes] = {
        "padded": PaddedPasses(model, sites, 0, config),
        "packed": PackedPasses(model, sites, 0, config),
        "packed, compiled": PackedPasses(model, sites, 0, from_mapping({"train": {"compile": "on"}})),
    }
    timings: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__}
    for kind, passes in kinds.items():
        calls: dict[str, Callable[[list[Example]], object]] = {
            "tune": lambda batch, passes=passes: passes.tune(batch, None),
            "tune gated": lambda batch, passes=passes: passes.tune(batch, gates),
            "slopes": lambda batch, passes=passes: passes.gate_gradients(batch, gates),
            "score": lambda batch, passes=passes: passes.score(batch, gates),
        }
        timings[kind] = {name: timed(call, options.repeats) for name, call in calls.items()}
        print(json.dumps({kind: timings[kind]}), flush=True)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), fused=device.type == "cuda")
    timings["clip and AdamW"] = timed(lambda _: step(optimizer, device), options.repeats)
    losses = {
        f"{kind} loss": [passes.tune(batch(7), gates)["loss"] for _ in range(3)] for kind, passes in kinds.items()
    }
    print(json.dumps(timings | losses))


def smollm2() -> Any:
    """Random weights in the shape of SmolLM2-135M."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def batch(seed: int, size: int = 16) -> list[Example]:
    """Random tokens: log-normal lengths, the last 25 are the answer."""
    rng = torch.Generator().manual_seed(seed)
    lengths = (torch.randn(size, generator=rng).mul(0.9).add(5.4).exp().clamp(40, 1500)).long().tolist()
    return [Example(tuple(torch.randint(3, 49000, (n,), generator=rng).tolist()), n - 25) for n in lengths]


def step(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[list[Example]], object], repeats: int) -> dict[str, Any]:
    """Milliseconds of `call`: the first calls of one batch, as it is, recorded and replayed, and memory asked of the
    device in each; the first round over different batches, its mean, and the second's median.
    """
    begun = [first_call(call, batch(repeats)) for _ in range(3)]
    batches = [batch(seed) for seed in range(repeats)]
    started = time.perf_counter()
    for one in batches:
        call(one)
    first = (time.perf_counter() - started) / repeats * 1e3
    times = []
    for one in batches:
        started = time.perf_counter()
        call(one)
        times.append((time.perf_counter() - started) * 1e3)
    return {
        "median_ms": round(statistics.median(times), 1), "first_round_ms": round(first, 1),
        "first_calls_ms": [took for took, _ in begun], "allocations": [count for _, count in begun],
    }  # fmt: skip


def first_call(call: Callable[[list[Example]], object], one: list[Example]) -> tuple[float, int]:
    """Milliseconds, and how often the allocator asked the device for memory."""
    before, started = asked_for(), time.perf_counter()
    call(one)
    return round((time.perf_counter() - started) * 1e3, 1), asked_for() - before


def asked_for() -> int:
    """So far."""
    return int(torch.cuda.memory_stats().get("num_device_alloc", 0)) if torch.cuda.is_available() else 0


if __name__ == "__main__":
    main()
