"""A model's scores on the split, and on valid where a learning rate is chosen by it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prunetune.evaluation.floors import cheap_floors
from prunetune.evaluation.item_subset import stable_sample
from prunetune.evaluation.results import Evaluation, Item
from prunetune.evaluation.score_records import ProgressCallback, evaluate
from prunetune.pipeline.prepare import RunContext
from prunetune.utils.json_lines import JsonObject, finite_or_none

ITEM_SCORES = ("accuracy", "nll", "rouge_l", "tokens")  # what paired differences are computed from
ITEM_DIGITS = 5  # decimals of an item's score: a task's mean moves by less than 1e-5


def score_model(model: Any, context: RunContext, progress: ProgressCallback, *, needs_valid_nll: bool) -> JsonObject:
    """Scores on the split that is compared, and floors of its rows; with `needs_valid_nll`, "valid_nll" too."""

    config, splits, general = context.config, context.splits.by_name(), context.splits.general
    records = splits[config.compare.split]
    evaluation = evaluate(model, context.tokenizer, records, config.data, config.evaluate, progress, general=general)
    rows_by_task = {
        task: stable_sample([row for row in (*records, *general) if row.task == task], config.evaluate.limit)
        for task in evaluation.tasks
    }
    floors = {task: found for task, rows in rows_by_task.items() if (found := cheap_floors(rows))}
    scores = {**scores_from_evaluation(evaluation.redacted(config.report.redaction)), "floors": floors}
    if not needs_valid_nll:
        return scores
    if config.compare.split != "valid":
        answers = tuple(record for record in splits["valid"] if record.kind != "text") or splits["valid"]
        quick = replace(config.evaluate, generate_limit=0)
        evaluation = evaluate(model, context.tokenizer, answers, config.data, quick, progress)
    return {**scores, "valid_nll": validation_nll(evaluation)}


def scores_from_evaluation(evaluation: Evaluation) -> JsonObject:
    """Scores with standard errors, the tasks that no mean counts, and each item's scores as `item_columns` has them."""
    tasks = evaluation.tasks
    return {
        "headline": headline(evaluation),
        "scores": {
            task: {metric: [finite_or_none(s.value), finite_or_none(s.se), s.n] for metric, s in result.scores.items()}
            for task, result in tasks.items()
        },
        "general": [task for task, result in tasks.items() if result.general],
        "items": {task: item_columns(result.items) for task, result in tasks.items()},
    }


def item_columns(items: Sequence[Item]) -> JsonObject:
    """{"id": ids, metric: values}, in the order of the ids; None where an item has no such score, "nan" for nan."""
    columns: JsonObject = {"id": [item.id for item in items]}
    for metric in ITEM_SCORES:
        if any(metric in item.scores for item in items):
            columns[metric] = [_compact(item.scores.get(metric)) for item in items]
    return columns


def _compact(value: float | None) -> float | str | None:
    if value is None or not math.isfinite(value):
        return None if value is None else str(value)
    return int(value) if value == int(value) else round(value, ITEM_DIGITS)


def headline(result: Evaluation) -> dict[str, float | None]:
    """Means over the domain's tasks of accuracy, NLL and ROUGE-L; each text's perplexity; general tasks' accuracies."""
    means = {"acc": result.mean_accuracy(), "nll": result.mean_nll(), "rouge_l": result.mean("rouge_l").value}
    for task, scored in result.tasks.items():
        if "perplexity" in scored.scores:
            means[f"ppl {task}"] = scored.scores["perplexity"].value
        elif scored.general and "accuracy" in scored.scores:
            means[f"acc {task}"] = scored.scores["accuracy"].value
    return {name: finite_or_none(value) for name, value in means.items()}


def validation_nll(evaluation: Evaluation) -> float | None:
    """Mean NLL over the tasks with answers; over texts where there are no answers; None where it is not finite."""
    value, results = evaluation.mean_nll(), [result for result in evaluation.tasks.values() if not result.general]
    texts = [result.scores["perplexity"].value for result in results if "perplexity" in result.scores]
    if math.isnan(value) and texts and all(text > 0 for text in texts):
        value = math.fsum(math.log(text) for text in texts) / len(texts)
    return value if math.isfinite(value) else None
