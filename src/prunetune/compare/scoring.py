"""A model's scores on the split, and on valid where a learning rate is chosen by it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from prunetune.data.records import Record
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.score_records import Progress, evaluate
from prunetune.pipeline.prepare import Setting

Result = dict[str, Any]  # part of a cell's file


def scored(model: Any, setting: Setting, progress: Progress, *, choose: bool) -> Result:
    """Scores on the split that is compared; with `choose`, "valid_nll" too."""

    def evaluated(setting: Setting, records: tuple[Record, ...]) -> Evaluation:
        return evaluate(model, setting.tokenizer, records, setting.config.data, setting.config.evaluate, progress)

    config, parts = setting.config, setting.splits.parts()
    found = evaluated(setting, parts[config.compare.split])
    if not choose:
        return scores_of(found)
    if config.compare.split == "valid":
        return {**scores_of(found), "valid_nll": watched_nll(found)}
    quick = replace(setting, config=replace(config, evaluate=replace(config.evaluate, generate_limit=0)))
    answers = tuple(record for record in parts["valid"] if record.kind != "text")
    return {**scores_of(found), "valid_nll": watched_nll(evaluated(quick, answers or parts["valid"]))}


def scores_of(result: Evaluation) -> Result:
    """Scores with standard errors, and what each item contributed: {task: {id: {metric: value}}}."""
    return {
        "headline": headline(result),
        "scores": {
            task: {metric: [finite(s.value), finite(s.se), s.n] for metric, s in found.scores.items()}
            for task, found in result.tasks.items()
        },
        "items": {
            task: {item.id: {metric: finite(value) for metric, value in item.scores.items()} for item in found.items}
            for task, found in result.tasks.items()
        },
    }


def headline(result: Evaluation) -> dict[str, float | None]:
    """Means over tasks of accuracy, NLL and ROUGE-L, and each text's perplexity."""
    found = {"acc": result.mean_accuracy(), "nll": result.mean_nll(), "rouge_l": result.mean("rouge_l").value}
    for task, scored in result.tasks.items():
        if "perplexity" in scored.scores:
            found[f"ppl {task}"] = scored.scores["perplexity"].value
    return {name: finite(value) for name, value in found.items()}


def watched_nll(found: Evaluation) -> float | None:
    """Mean NLL over the tasks with answers; over texts where there are no answers; None where it is not finite."""
    value = found.mean_nll()
    texts = [result.scores["perplexity"].value for result in found.tasks.values() if "perplexity" in result.scores]
    if math.isnan(value) and texts and all(text > 0 for text in texts):
        value = math.fsum(math.log(text) for text in texts) / len(texts)
    return finite(value)


def finite(value: float) -> float | None:
    """None for nan and infinities, which JSON does not know."""
    return value if math.isfinite(value) else None
