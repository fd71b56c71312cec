"""Laws of CUDA graph recordings, on a simulated GPU: order of calls, errors while recording, and streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from prunetune.errors import ModelError
from prunetune.train.cuda_graphs import STREAM_POOL_SIZE, STREAMS_IN_USE, CudaGraphRecorder, own_stream
from prunetune.utils.threads import CAPTURE_LOCK

CUDA = torch.device("cuda")


class FakeStream:
    """A CUDA stream from a pool of few; records the streams that it waited for."""

    __slots__ = ("cuda_stream", "waited")  # no weak reference can be had: PyTorch's would dangle
    made = 0

    def __init__(self, device: object = None) -> None:
        self.cuda_stream = 1 + FakeStream.made % STREAM_POOL_SIZE
        FakeStream.made += 1
        self.waited: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other)

    def synchronize(self) -> None:
        """Wait for all of its kernels."""


class FakeGraph:
    """Counts how often it was replayed."""

    replayed = 0

    def replay(self) -> None:
        self.replayed += 1


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """The stream that the caller is on."""
    stream = FakeStream()
    STREAMS_IN_USE.clear()
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return stream


def raising(error: Exception) -> Any:
    def function(inputs: Sequence[Tensor]) -> None:
        raise error

    return function


def nothing(inputs: Sequence[Tensor]) -> None:
    """A pass that does nothing."""


def test_key_is_run_then_recorded_then_replayed(current: FakeStream) -> None:
    recorder, locked = CudaGraphRecorder(CUDA), []
    for _ in range(4):
        recorder.run("key", lambda _: locked.append(CAPTURE_LOCK.locked()), [])
    assert locked == [True, True]  # run once, recorded once, each by itself
    recorder.reset_recordings()
    recorder.run("key", lambda _: locked.append(True), [])
    assert len(locked) == 3


def test_current_stream_waits_for_kernels_of_a_failed_pass(current: FakeStream) -> None:
    """Otherwise the first try adds to gradients that were zeroed for the second."""
    recorder = CudaGraphRecorder(CUDA)
    with pytest.raises(torch.OutOfMemoryError):
        recorder.run("key", raising(torch.OutOfMemoryError("full")), [])
    assert current.waited == [recorder._own.stream]  # type: ignore[union-attr]
    assert not CAPTURE_LOCK.locked()
    recorder.run("key", nothing, [])  # as the first time


@contextmanager
def failing_at_its_end(*_: Any, **__: Any) -> Iterator[None]:
    """A recording that ends with an error that hides the first one."""
    try:
        yield
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    ("failed", "hidden", "expected"),
    [
        (torch.OutOfMemoryError("full"), False, torch.OutOfMemoryError),
        (torch.OutOfMemoryError("full"), True, torch.OutOfMemoryError),
        (RuntimeError("CUDA error: out of memory\nmore"), False, torch.OutOfMemoryError),
        (RuntimeError("operation not permitted when stream is capturing\nmore"), False, ModelError),
        (RuntimeError("operation not permitted when stream is capturing"), True, ModelError),
        (RuntimeError(""), False, ModelError),
        (torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"), True, ModelError),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), False, torch.AcceleratorError),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), True, torch.AcceleratorError),
    ],
)
def test_recording_errors_distinguish_out_of_memory_from_unrecordable(
    failed: Exception, hidden: bool, expected: type[Exception], current: FakeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory is retried with smaller passes, whichever error the recording ends with."""
    if hidden:
        monkeypatch.setattr(torch.cuda, "graph", failing_at_its_end)
    recorder = CudaGraphRecorder(CUDA)
    recorder.run("key", nothing, [])
    with pytest.raises(expected, match=r"^[^\n]*$"):
        recorder.run("key", raising(failed), [])
    assert not CAPTURE_LOCK.locked()


def test_recorders_in_use_have_different_streams(current: FakeStream) -> None:
    in_use = [own_stream(CUDA) for _ in range(STREAM_POOL_SIZE - 1)]
    for _ in range(2 * STREAM_POOL_SIZE):
        recorder = CudaGraphRecorder(CUDA)
        recorder_stream = recorder._own
        assert recorder_stream is not None
        assert len({shared.stream.cuda_stream for shared in (*in_use, recorder_stream)}) == STREAM_POOL_SIZE
        del recorder_stream, recorder  # nothing else refers to them: their stream is free without a collection


def test_recorder_that_finds_no_free_stream_calls_its_function_every_time(current: FakeStream) -> None:
    in_use = [own_stream(CUDA) for _ in range(STREAM_POOL_SIZE)]
    assert None not in in_use
    assert own_stream(CUDA) is None
    recorder, called = CudaGraphRecorder(CUDA), []
    for _ in range(3):
        recorder.run("key", called.append, [])
    assert called == [[]] * 3
    assert not any(own.stream.waited for own in in_use if own)
