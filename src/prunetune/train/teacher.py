"""The teacher that a student is distilled from, and the examples it sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prunetune.config.recipe import DistillConfig
from prunetune.data.encoding import Example
from prunetune.pruning.teacher_student_weights import copy_sharing_weights


@dataclass(frozen=True)
class Teacher:
    """A frozen model of the student's hidden size; `distill.logits` and `distill.hidden` weigh its loss terms."""

    model: Any
    is_tuned: bool = True  # on the task; an untuned one counts only on tokens without a label
    shares_weights: bool = False  # its weights are the student's, see `pruning/teacher_student_weights.py`
    share: float = 1.0  # of a batch's examples that it sees, in (0, 1]

    def __post_init__(self) -> None:
        assert 0 < self.share <= 1, "`resolve_auto` decides what 0 means"


def split_by_teacher(
    examples: Sequence[Example], teacher: Teacher | None
) -> list[tuple[Teacher | None, Sequence[Example]]]:
    """A batch in the part that the teacher sees and the part that it does not, (None, examples); neither is empty.

    It sees its share, rounded up, and examples without a label first: nothing else teaches these, so it sees them all.
    """
    if teacher is None or teacher.share == 1:
        return [(teacher, examples)] if examples else []
    ordered = sorted(examples, key=lambda example: example.loss_tokens > 0)
    unlabelled = sum(example.loss_tokens == 0 for example in examples)
    count = max(unlabelled, math.ceil(teacher.share * len(examples)))
    subsets = [(teacher, ordered[:count]), (None, ordered[count:])]
    return [(seen_by, subset) for seen_by, subset in subsets if subset]


def base_teacher(model: Any, distill: DistillConfig) -> Teacher:
    """The untuned model, over the student's own tensors; to be made before adapters are added to the student."""
    return Teacher(copy_sharing_weights(model), is_tuned=False, shares_weights=True, share=distill.share)
