"""Scores of a model on rows: choices, generated answers, NLL and perplexity, with standard errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prunetune.evaluation.results import (
    Evaluation,
    Item,
    Score,
    TaskResult,
    headline_metric,
    higher_is_better,
    recovery,
)
from prunetune.evaluation.statistics import paired_difference

if TYPE_CHECKING:
    from prunetune.evaluation.score_records import ProgressCallback, evaluate

__all__ = [
    "Evaluation",
    "Item",
    "ProgressCallback",
    "Score",
    "TaskResult",
    "evaluate",
    "headline_metric",
    "higher_is_better",
    "paired_difference",
    "recovery",
]


def __getattr__(name: str) -> Any:
    # Reading results must not wait for torch.
    if name not in ("evaluate", "ProgressCallback"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from prunetune.evaluation import score_records

    return getattr(score_records, name)
