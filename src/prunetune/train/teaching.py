"""The untuned model as a teacher, in the memory of its student."""

from __future__ import annotations

from typing import Any

from prunetune.config import DistillConfig
from prunetune.model.shared import twin
from prunetune.train.adapters import tunes_all
from prunetune.train.job import Job
from prunetune.train.objectives import Teacher


def untuned(model: Any, distill: DistillConfig) -> Teacher:
    """The model as it is now, over the same tensors; to be asked for before adapters are added to it."""
    return Teacher(twin(model), distill.logits, distill.hidden, lends=True)


def lender_of(job: Job) -> Any | None:
    """Whose weights the student keeps after the cut: the teacher's, where the two share them and these stay frozen."""
    lends = job.teacher is not None and job.teacher.lends and not tunes_all(job.config.train, job.sites)
    return job.teacher.model if job.teacher is not None and lends else None
