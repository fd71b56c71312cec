"""What a recipe leaves to the model's size; and the untuned model as a teacher, in the memory of its student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prunetune.config.recipe import DistillConfig, RunConfig
from prunetune.cost.parameters import prunable_params
from prunetune.pruning.shared_weights import copy_sharing_weights
from prunetune.pruning.units import Site
from prunetune.train.adapters import LARGE_MODEL_PARAMS, trains_all_weights
from prunetune.train.job import TrainingJob
from prunetune.train.losses import Teacher


def resolve_auto(config: RunConfig, sites: Sequence[Site]) -> RunConfig:
    """The recipe with what it leaves to the model's size decided: teacher and its share, search step, tuned weights.

    From 1e9 prunable parameters on, a step must not cost more than LoRA on the dense model does.
    """
    distill, search, large = config.distill, config.search, prunable_params(sites) >= LARGE_MODEL_PARAMS
    train = replace(config.train, weights="all" if trains_all_weights(config.train, sites) else "adapters")
    if distill.teacher == "auto":
        distill = replace(distill, teacher="base" if large else "dense")
    distill = replace(distill, share=distill.share or (0.5 if large else 1.0))
    if search.step == "auto":
        search = replace(search, step="joint", lora_aware=False) if large else replace(search, step="alternate")
    return replace(config, distill=distill, search=search, train=train)


def base_teacher(model: Any, distill: DistillConfig) -> Teacher:
    """The model as it is now, over the same tensors; to be asked for before adapters are added to it.

    Of a recipe in which `by_size` has decided.
    """
    return Teacher(
        copy_sharing_weights(model),
        distill.logits,
        distill.hidden,
        is_tuned=False,
        shares_weights=True,
        share=distill.share,
    )


def find_weight_owner(job: TrainingJob) -> Any | None:
    """Whose weights the student keeps after the cut: the teacher's, where the two share them and these stay frozen."""
    lends = (
        job.teacher is not None and job.teacher.shares_weights and not trains_all_weights(job.config.train, job.sites)
    )
    return job.teacher.model if job.teacher is not None and lends else None
