"""One step's arithmetic, recorded once and replayed: a GPU then waits for neither Python nor single launches.

A small model's step is thousands of kernels of a few microseconds each; launching them one by one takes many times as
long as their work (PyTorch documentation, "CUDA Graphs" in the notes on CUDA semantics).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunetune.errors import ModelError

# Recording runs the model's Python under hooks and settings that are not made for two at once.
RECORDING = threading.Lock()
Function = Callable[[Sequence[Tensor]], None]


class Recorder:
    """Functions of tensors as CUDA graphs: one for each key, recorded at its second call; on a CPU simply called.

    The first call runs as is: it chooses kernels and makes workspaces, which a recording cannot, and a key that never
    comes again is not worth recording. Several threads may each have a recorder, on a stream of their own: small graphs
    then share the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        self._pool: Any = None
        # Workspaces of matrix products belong to a stream: recorders that shared one would overwrite each other's.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def run(self, key: Hashable, function: Function, inputs: Sequence[Tensor]) -> None:
        """`function(inputs)`, whose results stay in the same tensors; `key` is all that its kernels depend on.

        `inputs` may be on the CPU. Raises `ModelError` where the function cannot be recorded.
        """
        if self.device.type != "cuda":
            function(inputs)
            return
        if key not in self._seen:
            beside = self._beside()
            with RECORDING, torch.cuda.stream(beside):
                function([value.to(self.device) for value in inputs])
            torch.cuda.current_stream(self.device).wait_stream(beside)
            self._seen.add(key)
            return
        if key not in self._graphs:
            with RECORDING:
                self._graphs[key] = self._record(function, inputs)
        graph, static = self._graphs[key]
        for place, value in zip(static, inputs, strict=True):
            place.copy_(value)
        graph.replay()

    def forget(self) -> None:
        """Drop all recordings and their memory."""
        self._seen.clear()
        self._graphs.clear()
        self._pool = None

    def _beside(self) -> torch.cuda.Stream:
        """The recorder's stream, behind all that has been asked of the current one."""
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return self._stream

    def _record(self, function: Function, inputs: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        static = [value.to(self.device, copy=True) for value in inputs]
        # Nothing that a graph makes outlives its replay, so all of them may use the same memory.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            beside = self._beside()
            with torch.cuda.graph(graph, pool=self._pool, stream=beside, capture_error_mode="thread_local"):
                function(static)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as failed:
            line = str(failed).strip().splitlines()[0]
            raise ModelError(f"this model's pass cannot be recorded ({line}): set train.packing to off") from failed
        return graph, static
