"""Replays CUDA graphs on several streams while another process uses the GPU, in plain PyTorch: does it crash?

    python benchmarks/reliability/graphs_and_processes.py [--processes 2] [--threads 3] [--seconds 60] [--eager]

`prunetune compare --compare.jobs 3` crashed now and then where two of its processes shared a GPU ("unspecified launch
failure", Xid 13 and 43), never where it had the GPU to itself. TensorRT's issues 3633 and 4061 report the same of its
own graphs, with three conditions: recorded graphs, replayed on several streams at once, and another process on the GPU.
NVIDIA reproduced it (their bug 4479712). This program holds nothing of prunetune, so that a crash here is of CUDA or
of PyTorch. Each thread has a stream and a small network of its own, whose forward and backward pass is recorded for
some lengths and replayed; norms of gradients are compared with those of its first replay (attention's
backward pass adds in any order, so within 1%). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time

import torch
from torch.nn import functional as F

WIDTH, HEADS, LAYERS = 576, 9, 6
LENGTHS = (256, 640, 1024, 2048)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--threads", type=int, default=3, help="of each process, each with a stream of its own")
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--eager", action="store_true", help="the same work, not recorded")
    options.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child:
        replay_in_threads(given.threads, given.seconds, eager=given.eager)
        return
    words = [sys.executable, __file__, "--child", "--threads", str(given.threads), "--seconds", str(given.seconds)]
    words += ["--eager"] if given.eager else []
    children = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(given.processes)]
    outputs = [child.communicate()[0] for child in children]
    results = [json.loads(output) if output.strip() else {"crashed": True} for output in outputs]
    crashed = sum(child.returncode != 0 for child in children)
    print(json.dumps({**vars(given), "crashed": crashed, "of": results, "torch": torch.__version__}))
    sys.exit(1 if crashed or any(result.get("different") for result in results) else 0)


def replay_in_threads(count: int, seconds: float, *, eager: bool) -> None:
    """Replays and results that differ from the first, over all threads; the first error ends the process."""
    totals, lock, errors = {"replays": 0, "different": 0}, threading.Lock(), []

    def work(seed: int) -> None:
        try:
            replays, different = replay(seed, seconds, lock, eager=eager)
            totals["replays"] += replays
            totals["different"] += different
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    print(json.dumps(totals))


def replay(seed: int, seconds: float, lock: threading.Lock, *, eager: bool) -> tuple[int, int]:
    """Record the passes of one network, and replay them until the time is over."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        generator = torch.Generator("cuda").manual_seed(seed)
        weights = [
            torch.randn(WIDTH, 4 * WIDTH, device="cuda", generator=generator).mul_(0.02).requires_grad_()
            for _ in range(LAYERS)
        ]
        inputs = {length: torch.randn(length, WIDTH, device="cuda", generator=generator) for length in LENGTHS}
        for weight in weights:
            weight.grad = torch.zeros_like(weight)

    def step(length: int) -> None:
        torch._foreach_zero_([weight.grad for weight in weights])
        hidden = inputs[length].bfloat16()
        for weight in weights:
            queries, keys, values, gates = (hidden @ weight.bfloat16()).split(WIDTH, -1)
            heads = [part.view(1, length, HEADS, -1).transpose(1, 2) for part in (queries, keys, values)]
            attended = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(length, WIDTH)
            hidden = hidden + attended * F.silu(gates)
        hidden.float().square().mean().backward()

    graphs = {}
    for length in LENGTHS:
        with lock:
            with torch.cuda.stream(stream):
                step(length)
            stream.synchronize()
            if not eager:
                graphs[length] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[length], stream=stream, capture_error_mode="thread_local"):
                    step(length)
    first: dict[int, torch.Tensor] = {}
    replays, different, end = 0, 0, time.monotonic() + seconds
    with torch.cuda.stream(stream):
        while time.monotonic() < end:
            length = LENGTHS[replays % len(LENGTHS)]
            step(length) if eager else graphs[length].replay()
            norms = torch.stack([weight.grad.norm() for weight in weights if weight.grad is not None]).cpu()
            different += not torch.allclose(first.setdefault(length, norms), norms, rtol=1e-2)
            replays += 1
    return replays, different


if __name__ == "__main__":
    main()
