"""The interface of an opened model that can be timed, whatever runtime runs it, and the samples it returns."""

from dataclasses import dataclass
from typing import Protocol

from prunetune.errors import ModelError


class OutOfMemory(ModelError):
    """A batch that does not fit into memory with the weights."""


@dataclass(frozen=True)
class ModelFacts:
    """Runtime, device, type and sizes of an opened model."""

    runtime: str  # "transformers 5.23.0", "llama.cpp"
    device: str
    dtype: str
    parameters: int
    file_bytes: int  # of the files with weights; 0: unknown
    load_s: float  # seconds from an empty process, libraries imported, to weights on the device


@dataclass(frozen=True)
class WorkEstimate:
    """FLOPs and bytes of one batch by count; None where they are not known."""

    prefill_flops: float | None = None
    decode_bytes: float | None = None  # weights and cache that one decode step reads


@dataclass(frozen=True)
class BenchSample:
    """One timed run of one batch. None: not measured by this runtime or on this device."""

    total_s: float
    prefill_s: float | None = None  # time to the first token
    decode_s: float | None = None  # one decode step, which writes a token of every sequence
    peak_bytes: int | None = None  # beyond what the process had in use before it opened the model
    joules: float | None = None


class Runner(Protocol):
    """An opened model that runs requests with prompts and answers of fixed lengths."""

    def facts(self) -> ModelFacts:
        """Runtime, device, type and sizes."""

    def warm_up(self, batch: int) -> WorkEstimate:
        """Run a batch that is not measured; raises `OutOfMemory` if it does not fit."""

    def run(self, batch: int) -> BenchSample:
        """Run and time a batch; raises `OutOfMemory` if it does not fit."""
