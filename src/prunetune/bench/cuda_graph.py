"""A decode step as a CUDA graph: its time without waiting for Python, as in a serving runtime."""

from typing import Any

import torch
from torch import Tensor

from prunetune.errors import ConfigError, ModelError
from prunetune.utils.failures import first_line

WARM_UPS = 2  # runs before recording, in which libraries choose kernels and allocate workspaces


class CudaGraphStep:
    """A decode step, called like the model with one token of each sequence and a `StaticCache` filled by a prefill.

    The graph is recorded when a cache is used for the first time. Raises `ConfigError` on other devices than CUDA, and
    `ModelError` if the model's step cannot be recorded.
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
        """[B, 1] token ids -> the model's output, which the next call overwrites."""
        if self.graph is None or past_key_values is not self.cache:
            self._capture(token, past_key_values)
        assert self.graph is not None
        self.token.copy_(token)
        self.graph.replay()
        return self.out

    def _capture(self, token: Tensor, cache: Any) -> None:
        if any(hasattr(layer, "conv_states") for layer in cache.layers):  # which warm-ups would advance
            raise ModelError("this model's step cannot be recorded (it carries states besides keys); run it eagerly")
        self.graph = self.out = None  # frees the memory of the last graph
        self.cache, self.token = cache, token.clone()
        lengths = [layer.cumulative_length for layer in cache.layers]
        lengths_before = [length.clone() for length in lengths]
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
            raise ModelError(f"this model's step cannot be recorded ({first_line(failed)}); run it eagerly") from failed
        for length, before in zip(lengths, lengths_before, strict=True):
            length.copy_(before)  # warm-ups advanced the cache; replays write those places again
        self.graph = graph

    def _step(self) -> Any:
        return self.model(self.token, past_key_values=self.cache, use_cache=True)
