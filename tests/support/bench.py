"""Runners that follow a script, and openers that a fresh process can import."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from prunetune.bench.models import ModelSpec
from prunetune.bench.options import BenchOptions
from prunetune.bench.runner import BenchSample, ModelFacts, OutOfMemory, Runner, WorkEstimate
from prunetune.errors import ModelError


def facts(parameters: int = 1000, file_bytes: int = 2000) -> ModelFacts:
    return ModelFacts("transformers 5", "a CPU", "float32", parameters, file_bytes, 0.5)


class Scripted:
    """Answers with the samples it was given, in order, and writes down when it was asked."""

    def __init__(
        self,
        name: str = "m",
        samples: Sequence[BenchSample] = (BenchSample(1.0, 0.5, 0.1),),
        *,
        work: WorkEstimate | None = None,
        room: int = 1000,  # the largest batch that fits
        diary: list[tuple[str, str, int]] | None = None,
        known: ModelFacts | None = None,
    ) -> None:
        self.name, self.samples, self.work, self.room = name, samples, work or WorkEstimate(), room
        self.diary = diary if diary is not None else []
        self.known = known or facts()
        self.runs = 0

    def facts(self) -> ModelFacts:
        return self.known

    def warm_up(self, batch: int) -> WorkEstimate:
        self._note("warm", batch)
        return self.work

    def run(self, batch: int) -> BenchSample:
        self._note("run", batch)
        self.runs += 1
        return self.samples[(self.runs - 1) % len(self.samples)]

    def close(self) -> None:
        self.diary.append(("close", self.name, 0))

    def _note(self, what: str, batch: int) -> None:
        self.diary.append((what, self.name, batch))
        if batch > self.room:
            raise OutOfMemory(f"batch {batch} of {self.name}: out of memory")


class Moody(Scripted):
    """Fits up to 4, has a bug at 3, and dies at 2."""

    def run(self, batch: int) -> BenchSample:
        if batch == 2:
            os._exit(7)
        if batch == 3:
            raise ZeroDivisionError("a bug")
        return super().run(batch)


def moody(model: ModelSpec, options: BenchOptions) -> Runner:
    return Moody(model.label, room=4)


def broken(model: ModelSpec, options: BenchOptions) -> Runner:
    raise ModelError(f"model {model.label}: no weights")


def slowed(base: Mapping[str, float], by: Sequence[float]) -> list[BenchSample]:
    """The same run on a machine that is `by` times slower, round by round."""
    return [BenchSample(base["total"] * f, base["prefill"] * f, base["decode"] * f) for f in by]
