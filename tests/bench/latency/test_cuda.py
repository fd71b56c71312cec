"""Timing code for CUDA, run on the CPU with fakes of CUDA: the order of calls, and the results."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import StaticCache

from prunetune.bench.cuda_graph import CudaGraphStep
from prunetune.bench.latency import request_timing
from prunetune.bench.latency.request_timing import STEPS, HostDeviceTimer
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.latency_table import TRACKS
from prunetune.pruning.cut import cut
from support.models import random_plan, tiny, tokens

CALLS: list[str] = []


class FakeEvent:
    """An event that stores the time when it is recorded."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        CALLS.append("event")
        self.at = time.perf_counter()

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


class FakeStream:
    """A stream that does not wait."""

    def wait_stream(self, other: Any) -> None:
        CALLS.append("wait")


class FakeGraph:
    """A graph that replays by running the step again."""

    step: CudaGraphStep

    def replay(self) -> None:
        self.step.out.logits.copy_(self.step._step().logits)


@pytest.fixture(autouse=True)
def _fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: CALLS.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: CALLS.append("sleep"), raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: nullcontext())


@pytest.mark.parametrize("generate", [2, 4, 40])
def test_host_and_device_are_timed_separately(generate: int) -> None:
    seconds = HostDeviceTimer(tiny("llama"), WorkloadConfig(prompt=6, generate=generate, dtype="float32"))()
    assert set(seconds) == set(TRACKS)
    assert all(value > 0 for value in seconds.values())
    steps = min(generate - 1, STEPS)
    assert CALLS.count("sleep") == 1 + steps  # before what is timed on the device, and nowhere else
    sleeps = [index for index, call in enumerate(CALLS) if call == "sleep"]
    assert all(
        CALLS[index - 1 : index + 4] == ["synchronize", "sleep", "event", "event", "synchronize"] for index in sleeps
    )


def test_steps_are_timed_in_the_middle_of_the_answer() -> None:
    tracker = HostDeviceTimer(tiny("llama"), WorkloadConfig(prompt=6, generate=41, dtype="float32"))
    context = tracker.middle.shape[1] + (tracker.steps + 1) / 2
    assert context == pytest.approx(6 + (40 + 1) / 2, abs=0.51)


@pytest.mark.parametrize("pruned", [False, True])
def test_recorded_steps_equal_eager_steps(pruned: bool) -> None:
    model = tiny("llama", layers=4)
    if pruned:
        cut(model, random_plan(model))
    recorded = CudaGraphStep.__new__(CudaGraphStep)
    recorded.model, recorded.graph, recorded.cache = model, None, None
    FakeGraph.step = recorded
    caches = [StaticCache(model.config, max_cache_len=12) for _ in range(2)]
    ids = tokens(batch=2, length=6)
    for _ in range(2):  # the second time with a cache that is known
        answers = []
        for cache, step in zip(caches, (model, recorded), strict=True):
            cache.reset()
            written = []
            with torch.no_grad():
                token = model(ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
                for _ in range(5):
                    token = step(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
                    written.append(token.clone())
            answers.append(torch.cat(written, 1))
        assert torch.equal(*answers)


def test_recorded_steps_have_device_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_timing, "CudaGraphStep", lambda model: model)
    seconds = HostDeviceTimer(
        tiny("llama"), WorkloadConfig(prompt=6, generate=4, runtime="recorded", dtype="float32")
    )()
    assert seconds["decode.host"] == 0
    assert seconds["decode.device"] > 0
