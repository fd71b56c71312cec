"""CUDA graphs: functions of tensors, recorded once and replayed, so that a GPU waits for neither Python nor launches.

A small model's step is thousands of kernels of a few microseconds each; launching them one by one takes many times as
long as their work (PyTorch documentation, "CUDA Graphs" in the notes on CUDA semantics).
"""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunetune.errors import ModelError
from prunetune.utils.failures import first_line, is_gpu_fault
from prunetune.utils.threads import CAPTURE_LOCK


class OwnStream:
    """A CUDA stream that nobody else uses as long as this object lives.

    Weak references are to this object, not to the stream: those to a freed stream dangle before pull request 183403 of
    pytorch/pytorch (seen with 2.11), and Python then crashes at exit.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream


STREAMS_IN_USE: weakref.WeakValueDictionary[int, OwnStream] = weakref.WeakValueDictionary()  # by handle
STREAM_POOL_SIZE = 32  # streams that PyTorch hands out, in turn
Function = Callable[[Sequence[Tensor]], None]


def own_stream(device: torch.device) -> OwnStream | None:
    """A stream that no other caller still uses; None if all are in use.

    What a thread launches on a stream that another one records would be part of that recording, and replayed with it.
    Matrix products have one workspace per stream: two threads on one stream overwrite each other's.
    """
    with CAPTURE_LOCK:
        for _ in range(STREAM_POOL_SIZE):
            own = OwnStream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
            if STREAMS_IN_USE.setdefault(own.stream.cuda_stream, own) is own:
                return own
    return None


class CudaGraphRecorder:
    """Functions of tensors as CUDA graphs, one per key, recorded at its second call; on a CPU they are just called.

    The first call runs as is: it chooses kernels and allocates workspaces, which a recording cannot, and a key that
    does not recur is not worth recording. Several threads may each have a recorder, on a stream of their own; where all
    streams are in use, functions are just called, too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._warmed_up: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        self._pool: Any = None
        self._own = own_stream(device) if device.type == "cuda" else None

    def run(self, key: Hashable, function: Function, inputs: Sequence[Tensor]) -> None:
        """`function(inputs)`, which writes its results to tensors of its own; `key` is all that its kernels depend on.

        `inputs` may be on the CPU. Raises `ModelError` if the function cannot be recorded.
        """
        if self._own is None:
            function([value.to(self.device) for value in inputs])
            return
        if key not in self._warmed_up:
            side, current = self._side_stream(), torch.cuda.current_stream(self.device)
            try:
                with CAPTURE_LOCK, torch.cuda.stream(side):
                    function([value.to(self.device) for value in inputs])
            finally:  # also if memory ran out: kernels already launched still add to gradients
                current.wait_stream(side)
            self._warmed_up.add(key)
            return
        if key not in self._graphs:
            with CAPTURE_LOCK:
                self._graphs[key] = self._capture(function, inputs)
        graph, static = self._graphs[key]
        for tensor, value in zip(static, inputs, strict=True):
            tensor.copy_(value)
        graph.replay()

    def reset_recordings(self) -> None:
        """Drop all recordings and their memory, once no kernel of theirs still runs."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        with CAPTURE_LOCK:  # graphs must not be freed while another thread records
            self._warmed_up.clear()
            self._graphs.clear()
            self._pool = None

    def _side_stream(self) -> torch.cuda.Stream:
        """The recorder's stream, made to wait for all work of the current one."""
        assert self._own is not None
        self._own.stream.wait_stream(torch.cuda.current_stream(self.device))
        return self._own.stream

    def _capture(self, function: Function, inputs: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        static = [value.to(self.device, copy=True) for value in inputs]
        # Nothing that a graph makes outlives its replay, so all of them may use the same memory.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            side = self._side_stream()
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                function(static)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as failed:
            line = first_line(failed)
            errors: list[BaseException] = [failed]  # and those during whose handling it came up
            while (context := errors[-1].__context__) is not None:
                errors.append(context)
            for error in errors:
                if is_gpu_fault(error) and "captur" not in str(error):  # a fault of the GPU, not of recording
                    raise error from None
            # CUDA says so in words, too.
            if not any(isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) for error in errors):
                raise ModelError(f"this model's pass cannot be recorded ({line}): set train.packing to off") from failed
        else:
            return graph, static
        raise torch.OutOfMemoryError(line)  # out of the handler, whose traceback holds the tensors of the pass
