"""Time a batch of requests: as `prunetune bench` does, or, on CUDA, the tracks of host and device separately.

A forward pass takes as long as the longer of two *tracks*: Python that launches kernels (host), and the kernels
(device). Each is a sum over layers, their maximum is not, so a latency table has both. The host's time is that until
the call returns. The device's is that between two events, with an idle kernel before the first, so that the host is
ahead of the device. A track is named "prefill.host", "decode.device" and so on.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunetune.bench import clock
from prunetune.bench.clock import random_prompts, time_request
from prunetune.bench.cuda_graph import CudaGraphStep
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.latency_table import PHASES, TRACKS

RUNS = 5  # after one to warm up; the median is taken
PATIENCE = 60.0  # seconds that all runs of whole requests may take on a CPU; one is always done
SAMPLED = 32  # decode steps that are timed on other devices than CUDA, in the middle of the answer
STEPS = 8  # decode steps that are timed on CUDA, in the middle of the answer
CYCLES = 2e9  # of a GPU's clock in a second, at most
AHEAD = 3  # the device idles for this many times the host's time, so that all kernels are launched by then ...
LONGEST = 0.5  # ... but for so many seconds at most, since the host's first pass also loads kernels

PhaseTimings = dict[str, float]
TimedCall = Callable[[], PhaseTimings]


def time_requests(models: Sequence[Any], workload: WorkloadConfig, runs: int = RUNS) -> list[PhaseTimings]:
    """{phase: median seconds} of a batch of the workload's requests, for each model, in interleaved runs.

    On a CPU there are only as many runs as take `PATIENCE` seconds.
    """
    patience = PATIENCE if next(models[0].parameters()).device.type == "cpu" else math.inf
    return _time_interleaved([_request(model, workload) for model in models], PHASES, runs, patience)


def time_tracks(models: Sequence[Any], workload: WorkloadConfig, runs: int = RUNS) -> list[PhaseTimings]:
    """{track: median seconds} of one prefill and one decode step, for each model, in interleaved runs.

    On other devices than CUDA the host's tracks are 0.
    """
    if next(models[0].parameters()).device.type != "cuda":
        timings = _time_interleaved([_sampled_request(model, workload) for model in models], PHASES, runs)
        return [dict.fromkeys(TRACKS, 0.0) | {f"{phase}.device": own[phase] for phase in PHASES} for own in timings]
    return _time_interleaved([HostDeviceTimer(model, workload) for model in models], TRACKS, runs)


def _time_interleaved(
    calls: Sequence[TimedCall], names: Sequence[str], runs: int, patience: float = math.inf
) -> list[PhaseTimings]:
    """{name: median seconds} of each call: one round to warm up, then rounds of all calls within `patience` seconds."""
    start = time.monotonic()
    for call in calls:
        call()
    affordable = patience / max(1e-9, time.monotonic() - start)
    rounds = [[call() for call in calls] for _ in range(max(1, int(min(runs, affordable))))]
    by_call = zip(*rounds, strict=True)
    return [{name: statistics.median(own[name] for own in timings) for name in names} for timings in by_call]


def _request(model: Any, workload: WorkloadConfig) -> TimedCall:
    """A call that times a batch of the workload's requests."""
    tokens, new_cache = random_prompts(model, workload.batch, workload.prompt), _cache_factory(model, workload)
    step = CudaGraphStep(model) if workload.runtime == "recorded" else None

    def time_once() -> PhaseTimings:
        times = time_request(model, tokens, new_cache(), workload.generate, step)
        return {"prefill": times.prefill, "decode": times.decode}

    return time_once


def _sampled_request(model: Any, workload: WorkloadConfig) -> TimedCall:
    """A call that times a prefill and some decode steps: in the middle, where the context has its mean length."""
    steps = min(workload.generate - 1, SAMPLED)
    before = (workload.generate - 1 - steps) // 2
    tokens, new_cache = random_prompts(model, workload.batch, workload.prompt), _cache_factory(model, workload)
    first_half = random_prompts(model, workload.batch, before) if before else None

    @torch.no_grad()
    def time_once() -> PhaseTimings:
        cache, start = new_cache(), clock.synchronized_time(tokens.device)
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        prefill = clock.synchronized_time(tokens.device) - start
        if first_half is not None:
            model(first_half, past_key_values=cache, use_cache=True, logits_to_keep=1)
        times = [clock.synchronized_time(tokens.device)]
        for _ in range(steps):
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            times.append(clock.synchronized_time(tokens.device))
        steps_s = [after - before for before, after in itertools.pairwise(times)]
        return {"prefill": prefill, "decode": statistics.median(steps_s)}  # other processes slow single steps

    return time_once


def _cache_factory(model: Any, workload: WorkloadConfig) -> Callable[[], Any]:
    """A function that returns an empty cache. A recorded step is bound to its cache, so that one is emptied."""
    from transformers import DynamicCache, StaticCache

    if workload.runtime == "eager":
        return lambda: DynamicCache(config=model.config)
    cache = StaticCache(model.config, max_cache_len=workload.prompt + workload.generate)

    def emptied_cache() -> Any:
        cache.reset()
        return cache

    return emptied_cache


class HostDeviceTimer:
    """Times a model on CUDA, with host and device as separate tracks."""

    def __init__(self, model: Any, workload: WorkloadConfig) -> None:
        self.model, self.workload = model, workload
        self.steps = min(workload.generate - 1, STEPS)
        self.tokens = random_prompts(model, workload.batch, workload.prompt)
        # In the middle of the answer, the context has its mean length.
        context = workload.prompt + (workload.generate - 1 - self.steps) // 2
        self.middle = random_prompts(model, workload.batch, context)
        self.new_cache = _cache_factory(model, workload)
        self.request = _request(model, workload) if workload.runtime == "recorded" else None

    @torch.no_grad()
    def __call__(self) -> PhaseTimings:
        """{track: seconds} of one prefill and one decode step."""
        host, _, token = self._pass(self.tokens, cache := self.new_cache(), 0.0)
        device = self._pass(self.tokens, self.new_cache(), host)[1]
        prefill = {"prefill.host": host, "prefill.device": device}
        if self.request is not None:  # a graph takes the host next to no time
            return prefill | {"decode.host": 0.0, "decode.device": self.request()["decode"]}
        host = statistics.median(self._pass(token, cache, 0.0)[0] for _ in range(self.steps))
        if self.middle.shape[1] > self.tokens.shape[1]:
            token = self._pass(self.middle, cache := self.new_cache(), 0.0)[2]
        device = statistics.median(self._pass(token, cache, host)[1] for _ in range(self.steps))
        return prefill | {"decode.host": host, "decode.device": device}

    def _pass(self, tokens: Tensor, cache: Any, host_seconds: float) -> tuple[float, float, Tensor]:
        """(host's seconds, device's seconds, next token [B, 1]) of one forward pass.

        The device's are right if `host_seconds` are the host's, as another pass measured them.
        """
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(tokens.device)
        if host_seconds:
            torch.cuda._sleep(int(min(LONGEST, AHEAD * host_seconds) * CYCLES))  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        start_event.record()
        out = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        end_event.record()
        host = time.perf_counter() - start
        torch.cuda.synchronize(tokens.device)
        return host, start_event.elapsed_time(end_event) / 1e3, token
