"""A model's scores on the split, and on valid where a learning rate is chosen by it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from prunetune.data.records import Record
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.score_records import ProgressCallback, evaluate
from prunetune.pipeline.prepare import RunContext

CellScores = dict[str, Any]  # part of a cell's file


def score_model(model: Any, context: RunContext, progress: ProgressCallback, *, needs_valid_nll: bool) -> CellScores:
    """Scores on the split that is compared; with `choose`, "valid_nll" too."""

    def evaluated(setting: RunContext, records: tuple[Record, ...]) -> Evaluation:
        return evaluate(model, setting.tokenizer, records, setting.config.data, setting.config.evaluate, progress)

    config, parts = context.config, context.splits.by_name()
    found = evaluated(context, parts[config.compare.split])
    if not needs_valid_nll:
        return scores_from_evaluation(found)
    if config.compare.split == "valid":
        return {**scores_from_evaluation(found), "valid_nll": validation_nll(found)}
    quick = replace(context, config=replace(config, evaluate=replace(config.evaluate, generate_limit=0)))
    answers = tuple(record for record in parts["valid"] if record.kind != "text")
    return {**scores_from_evaluation(found), "valid_nll": validation_nll(evaluated(quick, answers or parts["valid"]))}


def scores_from_evaluation(evaluation: Evaluation) -> CellScores:
    """Scores with standard errors, and what each item contributed: {task: {id: {metric: value}}}."""
    return {
        "headline": headline(evaluation),
        "scores": {
            task: {metric: [finite_or_none(s.value), finite_or_none(s.se), s.n] for metric, s in found.scores.items()}
            for task, found in evaluation.tasks.items()
        },
        "items": {
            task: {
                item.id: {metric: finite_or_none(value) for metric, value in item.scores.items()}
                for item in found.items
            }
            for task, found in evaluation.tasks.items()
        },
    }


def headline(result: Evaluation) -> dict[str, float | None]:
    """Means over tasks of accuracy, NLL and ROUGE-L, and each text's perplexity."""
    found = {"acc": result.mean_accuracy(), "nll": result.mean_nll(), "rouge_l": result.mean("rouge_l").value}
    for task, scored in result.tasks.items():
        if "perplexity" in scored.scores:
            found[f"ppl {task}"] = scored.scores["perplexity"].value
    return {name: finite_or_none(value) for name, value in found.items()}


def validation_nll(evaluation: Evaluation) -> float | None:
    """Mean NLL over the tasks with answers; over texts where there are no answers; None where it is not finite."""
    value = evaluation.mean_nll()
    texts = [result.scores["perplexity"].value for result in evaluation.tasks.values() if "perplexity" in result.scores]
    if math.isnan(value) and texts and all(text > 0 for text in texts):
        value = math.fsum(math.log(text) for text in texts) / len(texts)
    return finite_or_none(value)


def finite_or_none(value: float) -> float | None:
    """None for nan and infinities, which JSON does not know."""
    return value if math.isfinite(value) else None
