"""A decode step as a CUDA graph: what a step takes where nothing waits for Python, as in a serving runtime."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunetune.errors import ConfigError, ModelError

WARM_UPS = 2  # runs before recording, in which kernels are chosen and workspaces made


class CudaGraphStep:
    """Called as the model is, with one token of each sequence and a `StaticCache` that a prefill has filled.

    A cache is recorded when it is first seen. Raises `ConfigError` without CUDA, and `ModelError` where the model's
    step cannot be recorded.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        if next(model.parameters()).device.type != "cuda":
            raise ConfigError("steps are recorded as CUDA graphs, and this device is no CUDA device: run them eagerly")
        self.graph: torch.cuda.CUDAGraph | None = None
        self.cache: Any = None
        self.token = torch.empty(0)
        self.out: Any = None

    def __call__(self, token: Tensor, *, past_key_values: Any, use_cache: bool = True) -> Any:
        """[B, 1] ids -> the model's output, which the next call writes over."""
        if self.graph is None or past_key_values is not self.cache:
            self._capture(token, past_key_values)
        assert self.graph is not None
        self.token.copy_(token)
        self.graph.replay()
        return self.out

    def _capture(self, token: Tensor, cache: Any) -> None:
        self.graph = self.out = None  # the memory of one before
        self.cache, self.token = cache, token.clone()
        lengths = [layer.cumulative_length for layer in cache.layers]
        before = [length.clone() for length in lengths]
        side = torch.cuda.Stream(token.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(token.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._step()
        torch.cuda.current_stream(token.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=side):
                self.out = self._step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as failed:
            line = (str(failed).strip().splitlines() or ["RuntimeError"])[0]
            raise ModelError(f"this model's step cannot be recorded ({line}); run it eagerly") from failed
        for length, was in zip(lengths, before, strict=True):
            length.copy_(was)  # warm-ups wrote places of the cache that replays write again
        self.graph = graph

    def _step(self) -> Any:
        return self.model(self.token, past_key_values=self.cache, use_cache=True)
