"""How far the models moved from the untuned one outside the domain: a row for each kind of prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prunetune.evaluation.drift_results import scores_by_kind
from prunetune.evaluation.results import Evaluation, Score

ALL = "all prompts"


@dataclass(frozen=True)
class DriftRow:
    """One kind of prompt."""

    kind: str
    prompts: int
    kl: Mapping[str, Score]  # by model: "tuned", "pruned"
    agreement: Mapping[str, Score]


def drift_rows(drift: Evaluation | None) -> list[DriftRow]:
    """The kinds in order of first mention, then all prompts; empty where nothing was measured."""
    models = drift.tasks if drift else {}
    by_metric = {
        metric: {
            name: scores_by_kind(result.items, metric) | {ALL: result.scores[metric]}
            for name, result in models.items()
            if metric in result.scores
        }
        for metric in ("kl", "agreement")
    }
    kinds = dict.fromkeys(kind for scores in by_metric["kl"].values() for kind in scores)
    rows = []
    for kind in kinds:
        kl, agreement = (
            {name: scores[kind] for name, scores in by_model.items() if kind in scores}
            for by_model in by_metric.values()
        )
        rows.append(DriftRow(kind, max(score.n for score in kl.values()), kl, agreement))
    return rows
