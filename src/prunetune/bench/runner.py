"""What is measured, and what can be measured: a `Runner`, whatever runs the model behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from prunetune.errors import ModelError


class OutOfMemory(ModelError):
    """A batch that does not fit beside the weights."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of an opened model."""

    runtime: str  # "transformers 5.23.0", "llama.cpp"
    device: str
    dtype: str
    parameters: int
    file_bytes: int  # of the weights alone
    load_s: float  # once: from nothing to weights on the device, libraries already imported


@dataclass(frozen=True)
class WorkEstimate:
    """What one batch costs by count, where that is known."""

    prefill_flops: float | None = None
    decode_bytes: float | None = None  # weights and cache that one step reads


@dataclass(frozen=True)
class BenchSample:
    """One run of one batch. None: not measured by this runtime or on this device."""

    total_s: float
    prefill_s: float | None = None  # the time to the first token
    decode_s: float | None = None  # a step, which writes one token of every sequence
    peak_bytes: int | None = None  # beyond what the process held before it opened the model
    joules: float | None = None


class Runner(Protocol):
    """A model that is open, with prompt and answer of fixed lengths."""

    def facts(self) -> ModelFacts:
        """What it is."""

    def warm_up(self, batch: int) -> WorkEstimate:
        """A run that does not count; raises `OutOfMemory` where the batch does not fit."""

    def run(self, batch: int) -> BenchSample:
        """A run that counts; raises `OutOfMemory`."""

    def close(self) -> None:
        """Give everything back; may be called twice."""
