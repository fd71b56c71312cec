"""One step's arithmetic, recorded once and replayed: a GPU then waits for neither Python nor single launches.

A small model's step is thousands of kernels of a few microseconds each; launching them one by one takes many times as
long as their work (PyTorch documentation, "CUDA Graphs" in the notes on CUDA semantics).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prunetune.errors import ModelError, gpu_fault_message


class OwnStream:
    """A stream of CUDA that is its holder's as long as this object lives.

    It stands between for the sake of weak references: those to a freed stream itself dangle before pull request 183403
    of pytorch/pytorch (seen with 2.11), and Python then crashes at its end.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream


# Recording runs the model's Python under hooks and settings that are not made for two at once.
CAPTURE_LOCK = threading.Lock()
HELD: weakref.WeakValueDictionary[int, OwnStream] = weakref.WeakValueDictionary()  # by handle
POOL = 32  # streams that PyTorch hands out, over and over
Function = Callable[[Sequence[Tensor]], None]


def own_stream(device: torch.device) -> OwnStream:
    """A stream that nobody else who asked here still holds, as long as there is any.

    Workspaces of matrix products belong to a stream: two threads on one stream overwrite each other's.
    """
    with CAPTURE_LOCK:
        for _ in range(POOL):
            own = OwnStream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
            if HELD.setdefault(own.stream.cuda_stream, own) is own:
                break
    return own


class CudaGraphRecorder:
    """Functions of tensors as CUDA graphs: one for each key, recorded at its second call; on a CPU simply called.

    The first call runs as is: it chooses kernels and makes workspaces, which a recording cannot, and a key that never
    comes again is not worth recording. Several threads may each have a recorder, on a stream of their own: small graphs
    then share the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._warmed_up: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        self._pool: Any = None
        self._own = own_stream(device) if device.type == "cuda" else None

    def run(self, key: Hashable, function: Function, inputs: Sequence[Tensor]) -> None:
        """`function(inputs)`, whose results stay in the same tensors; `key` is all that its kernels depend on.

        `inputs` may be on the CPU. Raises `ModelError` where the function cannot be recorded.
        """
        if self.device.type != "cuda":
            function(inputs)
            return
        if key not in self._warmed_up:
            beside, current = self._side_stream(), torch.cuda.current_stream(self.device)
            try:
                with CAPTURE_LOCK, torch.cuda.stream(beside):
                    function([value.to(self.device) for value in inputs])
            finally:  # also where memory ran out: what was launched still adds to gradients
                current.wait_stream(beside)
            self._warmed_up.add(key)
            return
        if key not in self._graphs:
            with CAPTURE_LOCK:
                self._graphs[key] = self._capture(function, inputs)
        graph, static = self._graphs[key]
        for place, value in zip(static, inputs, strict=True):
            place.copy_(value)
        graph.replay()

    def reset_recordings(self) -> None:
        """Drop all recordings and their memory."""
        with CAPTURE_LOCK:  # none is let go while another is made
            self._warmed_up.clear()
            self._graphs.clear()
            self._pool = None

    def _side_stream(self) -> torch.cuda.Stream:
        """The recorder's stream, behind all that has been asked of the current one."""
        assert self._own is not None
        self._own.stream.wait_stream(torch.cuda.current_stream(self.device))
        return self._own.stream

    def _capture(self, function: Function, inputs: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        static = [value.to(self.device, copy=True) for value in inputs]
        # Nothing that a graph makes outlives its replay, so all of them may use the same memory.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            beside = self._side_stream()
            with torch.cuda.graph(graph, pool=self._pool, stream=beside, capture_error_mode="thread_local"):
                function(static)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as failed:
            line = (str(failed).strip().splitlines() or [type(failed).__name__])[0]
            for each in _behind(failed):
                if gpu_fault_message(each) and "captur" not in str(each):  # no matter of recording
                    raise each from None
            if not _lacks_memory(failed):
                raise ModelError(f"this model's pass cannot be recorded ({line}): set train.packing to off") from failed
        else:
            return graph, static
        raise torch.OutOfMemoryError(line)  # out of the handler, whose traceback holds the tensors of the pass


def _lacks_memory(failed: BaseException) -> bool:
    """Whether that is why: CUDA says so in words."""
    return any(isinstance(each, torch.OutOfMemoryError) or "out of memory" in str(each) for each in _behind(failed))


def _behind(failed: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it came on top of: the end of a recording fails after any in it."""
    while failed is not None:
        yield failed
        failed = failed.__context__
