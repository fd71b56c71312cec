"""Who teaches; and the untuned model as a teacher, in the memory of its student."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from prunetune.budget.params import total
from prunetune.config import DistillConfig, RunConfig
from prunetune.model.shared import twin
from prunetune.model.units import Site
from prunetune.train.adapters import LARGE, tunes_all
from prunetune.train.job import Job
from prunetune.train.objectives import Teacher


def with_teacher(config: RunConfig, sites: Iterable[Site]) -> RunConfig:
    """The recipe with who teaches, and how much, decided. A matter of the model's size, never of the machine."""
    distill, large = config.distill, total(sites) >= LARGE
    if distill.teacher == "auto":
        distill = replace(distill, teacher="base" if large else "dense")
    return replace(config, distill=replace(distill, share=distill.share or (0.5 if large else 1.0)))


def untuned(model: Any, distill: DistillConfig) -> Teacher:
    """The model as it is now, over the same tensors; to be asked for before adapters are added to it.

    Of a recipe in which `with_teacher` has decided.
    """
    return Teacher(twin(model), distill.logits, distill.hidden, tuned=False, lends=True, share=distill.share)


def lender_of(job: Job) -> Any | None:
    """Whose weights the student keeps after the cut: the teacher's, where the two share them and these stay frozen."""
    lends = job.teacher is not None and job.teacher.lends and not tunes_all(job.config.train, job.sites)
    return job.teacher.model if job.teacher is not None and lends else None
