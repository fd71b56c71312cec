"""Runners with scripted samples, and functions that a worker process can import to open them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from prunetune.bench.models import ModelSpec
from prunetune.bench.options import BenchOptions
from prunetune.bench.runner_protocol import BenchSample, ModelFacts, OutOfMemory, Runner, WorkEstimate
from prunetune.errors import ModelError


def facts(parameters: int = 1000, file_bytes: int = 2000) -> ModelFacts:
    return ModelFacts("transformers 5", "a CPU", "float32", parameters, file_bytes, 0.5)


class ScriptedRunner:
    """Returns the samples it was given, in order, and logs every call."""

    def __init__(
        self,
        name: str = "m",
        samples: Sequence[BenchSample] = (BenchSample(1.0, 0.5, 0.1),),
        *,
        work: WorkEstimate | None = None,
        max_batch: int = 1000,  # the largest batch that fits
        calls: list[tuple[str, str, int]] | None = None,
        model_facts: ModelFacts | None = None,
    ) -> None:
        self.name, self.samples, self.work, self.max_batch = name, samples, work or WorkEstimate(), max_batch
        self.calls = calls if calls is not None else []
        self.model_facts = model_facts or facts()
        self.runs = 0

    def facts(self) -> ModelFacts:
        return self.model_facts

    def warm_up(self, batch: int) -> WorkEstimate:
        self._log("warm", batch)
        return self.work

    def run(self, batch: int) -> BenchSample:
        self._log("run", batch)
        self.runs += 1
        return self.samples[(self.runs - 1) % len(self.samples)]

    def close(self) -> None:
        self.calls.append(("close", self.name, 0))

    def _log(self, call: str, batch: int) -> None:
        self.calls.append((call, self.name, batch))
        if batch > self.max_batch:
            raise OutOfMemory(f"batch {batch} of {self.name}: out of memory")


class UnstableRunner(ScriptedRunner):
    """Batches up to 4 fit; at 3 there is a bug, at 2 the process exits."""

    def run(self, batch: int) -> BenchSample:
        if batch == 2:
            os._exit(7)
        if batch == 3:
            raise ZeroDivisionError("a bug")
        return super().run(batch)


def unstable_runner(model: ModelSpec, options: BenchOptions) -> Runner:
    return UnstableRunner(model.label, max_batch=4)


def failing_runner(model: ModelSpec, options: BenchOptions) -> Runner:
    raise ModelError(f"model {model.label}: no weights")


def slowed(base: Mapping[str, float], factors: Sequence[float]) -> list[BenchSample]:
    """Samples of the same run on a machine that is slower by a factor in each round."""
    return [BenchSample(base["total"] * f, base["prefill"] * f, base["decode"] * f) for f in factors]
