"""What a batch of requests takes: as `prunetune bench` times it, and, on CUDA, the host's and the device's part apart.

A pass takes as long as the longer of two: Python that launches kernels, and the kernels. Each of them is a sum over
layers, while their maximum is not; so a table holds both. The host's part is the time until a pass returns. The
device's is that between two events, while a kernel that idles before the first lets the host run ahead.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunetune.bench import clock
from prunetune.bench.cuda_graph import CudaGraphStep
from prunetune.bench.timed_request import random_prompts, time_request
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.latency_table import PHASES, TRACKS

RUNS = 5  # of which the median counts, after one to warm up
PATIENCE = 60.0  # seconds that runs of whole requests may take together on a CPU; at least one is done
SAMPLED = 32  # decode steps that are timed where there is no CUDA, in the middle of the answer
STEPS = 8  # decode steps that are timed on the device, in the middle of the answer
CYCLES = 2e9  # a second of a GPU's clock at most
AHEAD = 3  # times the host's part that the device idles, so that all is launched by then ...
LONGEST = 0.5  # ... in seconds at most: a first pass also loads kernels

PhaseTimings = dict[str, float]
TimedCall = Callable[[], PhaseTimings]


def time_requests(models: Sequence[Any], workload: WorkloadConfig, runs: int = RUNS) -> list[PhaseTimings]:
    """{phase: median seconds} of a batch of the workload's requests, for each model; they take turns, run by run.

    On a CPU slow ones are run fewer times: no more often than `PATIENCE` has room for.
    """
    patience = PATIENCE if next(models[0].parameters()).device.type == "cpu" else math.inf
    return _time_interleaved([_request(model, workload) for model in models], PHASES, runs, patience)


def time_tracks(models: Sequence[Any], workload: WorkloadConfig, runs: int = RUNS) -> list[PhaseTimings]:
    """{track: median seconds}: where there is no CUDA, all is the device's."""
    if next(models[0].parameters()).device.type != "cuda":
        found = _time_interleaved([_sampled(model, workload) for model in models], PHASES, runs)
        return [dict.fromkeys(TRACKS, 0.0) | {f"{phase}.device": one[phase] for phase in PHASES} for one in found]
    return _time_interleaved([HostDeviceTimer(model, workload) for model in models], TRACKS, runs)


def _time_interleaved(
    asked: Sequence[TimedCall], names: Sequence[str], runs: int, patience: float = math.inf
) -> list[PhaseTimings]:
    begun = time.monotonic()
    for ask in asked:  # warms up
        ask()
    room = patience / max(1e-9, time.monotonic() - begun)
    found = [[ask() for ask in asked] for _ in range(max(1, int(min(runs, room))))]
    return [
        {name: statistics.median(turn[place][name] for turn in found) for name in names} for place in range(len(asked))
    ]


def _request(model: Any, workload: WorkloadConfig) -> TimedCall:
    """The model's answer to one batch of requests. What was recorded knows its cache by address: it is used again."""
    tokens, fresh = random_prompts(model, workload.batch, workload.prompt), _caches(model, workload)
    step = CudaGraphStep(model) if workload.runtime == "recorded" else None

    def ask() -> PhaseTimings:
        times = time_request(model, tokens, fresh(), workload.generate, step)
        return {"prefill": times.prefill, "decode": times.decode}

    return ask


def _sampled(model: Any, workload: WorkloadConfig) -> TimedCall:
    """A prefill and some decode steps: those in the middle see as long a context as all of them in the mean."""
    steps = min(workload.generate - 1, SAMPLED)
    before = (workload.generate - 1 - steps) // 2
    tokens, fresh = random_prompts(model, workload.batch, workload.prompt), _caches(model, workload)
    between = random_prompts(model, workload.batch, before) if before else None

    @torch.no_grad()
    def ask() -> PhaseTimings:
        cache, begun = fresh(), clock.synchronized_time(tokens.device)
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        prefill = clock.synchronized_time(tokens.device) - begun
        if between is not None:
            model(between, past_key_values=cache, use_cache=True, logits_to_keep=1)
        times = [clock.synchronized_time(tokens.device)]
        for _ in range(steps):
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            times.append(clock.synchronized_time(tokens.device))
        each = [after - before for before, after in itertools.pairwise(times)]
        return {"prefill": prefill, "decode": statistics.median(each)}  # what else runs here slows some steps

    return ask


def _caches(model: Any, workload: WorkloadConfig) -> Callable[[], Any]:
    """An empty cache, each time it is called."""
    from transformers import DynamicCache, StaticCache

    if workload.runtime == "eager":
        return lambda: DynamicCache(config=model.config)
    static = StaticCache(model.config, max_cache_len=workload.prompt + workload.generate)

    def emptied() -> Any:
        static.reset()
        return static

    return emptied


class HostDeviceTimer:
    """A model on CUDA, host and device apart."""

    def __init__(self, model: Any, workload: WorkloadConfig) -> None:
        self.model, self.workload = model, workload
        self.steps = min(workload.generate - 1, STEPS)
        self.tokens = random_prompts(model, workload.batch, workload.prompt)
        # Steps in the middle of the answer see as long a context as all of them in the mean.
        self.middle = random_prompts(model, workload.batch, workload.prompt + (workload.generate - 1 - self.steps) // 2)
        self.fresh = _caches(model, workload)
        self.request = _request(model, workload) if workload.runtime == "recorded" else None

    @torch.no_grad()
    def __call__(self) -> PhaseTimings:
        """All tracks, once."""
        host, _, token = self._pass(self.tokens, cache := self.fresh(), 0.0)
        device = self._pass(self.tokens, self.fresh(), host)[1]
        found = {"prefill.host": host, "prefill.device": device}
        if self.request is not None:  # a graph has no host to speak of
            return found | {"decode.host": 0.0, "decode.device": self.request()["decode"]}
        host = statistics.median(self._pass(token, cache, 0.0)[0] for _ in range(self.steps))
        if self.middle.shape[1] > self.tokens.shape[1]:
            token = self._pass(self.middle, cache := self.fresh(), 0.0)[2]
        device = statistics.median(self._pass(token, cache, host)[1] for _ in range(self.steps))
        return found | {"decode.host": host, "decode.device": device}

    def _pass(self, tokens: Tensor, cache: Any, ahead: float) -> tuple[float, float, Tensor]:
        """(host's seconds, device's, the next token [B, 1]); the device's are right where it idled `ahead`."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(tokens.device)
        if ahead:
            torch.cuda._sleep(int(min(LONGEST, AHEAD * ahead) * CYCLES))  # type: ignore[no-untyped-call]
        begun = time.perf_counter()
        start.record()
        out = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        end.record()
        host = time.perf_counter() - begun
        torch.cuda.synchronize(tokens.device)
        return host, start.elapsed_time(end) / 1e3, token
