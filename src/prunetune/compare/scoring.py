"""A model's scores on the split, and on valid where a learning rate is chosen by it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.score_records import ProgressCallback, evaluate
from prunetune.pipeline.prepare import RunContext
from prunetune.utils.json_lines import JsonObject


def score_model(model: Any, context: RunContext, progress: ProgressCallback, *, needs_valid_nll: bool) -> JsonObject:
    """Scores on the split that is compared; with `needs_valid_nll`, "valid_nll" too."""

    config, splits = context.config, context.splits.by_name()
    records = splits[config.compare.split]
    evaluation = evaluate(model, context.tokenizer, records, config.data, config.evaluate, progress)
    scores = scores_from_evaluation(evaluation)
    if not needs_valid_nll:
        return scores
    if config.compare.split != "valid":
        answers = tuple(record for record in splits["valid"] if record.kind != "text") or splits["valid"]
        quick = replace(config.evaluate, generate_limit=0)
        evaluation = evaluate(model, context.tokenizer, answers, config.data, quick, progress)
    return {**scores, "valid_nll": validation_nll(evaluation)}


def scores_from_evaluation(evaluation: Evaluation) -> JsonObject:
    """Scores with standard errors, and what each item contributed: {task: {id: {metric: value}}}."""
    return {
        "headline": headline(evaluation),
        "scores": {
            task: {metric: [finite_or_none(s.value), finite_or_none(s.se), s.n] for metric, s in result.scores.items()}
            for task, result in evaluation.tasks.items()
        },
        "items": {
            task: {
                item.id: {metric: finite_or_none(value) for metric, value in item.scores.items()}
                for item in result.items
            }
            for task, result in evaluation.tasks.items()
        },
    }


def headline(result: Evaluation) -> dict[str, float | None]:
    """Means over tasks of accuracy, NLL and ROUGE-L, and each text's perplexity."""
    means = {"acc": result.mean_accuracy(), "nll": result.mean_nll(), "rouge_l": result.mean("rouge_l").value}
    texts = {task: scored.scores for task, scored in result.tasks.items() if "perplexity" in scored.scores}
    means |= {f"ppl {task}": scores["perplexity"].value for task, scores in texts.items()}
    return {name: finite_or_none(value) for name, value in means.items()}


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
