"""A suite on a model: every task asked, scored, and summed up; a task that fails does not stop the others."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prunetune.data.records import Record
from prunetune.errors import ConfigError, PrunetuneError
from prunetune.evaluation.results import Evaluation, Item, TaskResult
from prunetune.evaluation.score_records import best_of, unique
from prunetune.evaluation.statistics import EVIDENCE, summarise
from prunetune.evaluation.suites.prompts import posed_of
from prunetune.evaluation.suites.protocol import Answered, Ask, Posed, Respondent, Tick
from prunetune.evaluation.suites.scorers import Permission
from prunetune.evaluation.suites.suite import Suite, Task

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # task, answers done, answers in all
ALLOWED: frozenset[Permission] = frozenset()


def evaluate_suite(
    respondent: Respondent,
    suite: Suite,
    *,
    allow: Collection[Permission] = ALLOWED,
    questions: Mapping[str, Sequence[Posed]] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Every task's scores with their items, by its name; a task that fails has its `error` instead.

    `questions` are those that `read_questions` gave, where a suite is run more than once.
    """
    known = questions or {}
    return Evaluation(
        {
            name: result
            for task in suite.tasks
            for name, result in _results(respondent, task, allow, known.get(task.name), progress).items()
        }
    )


def read_questions(suite: Suite) -> dict[str, tuple[Posed, ...]]:
    """The records of every task with data, read once; raises `DataError` for the first that cannot be."""
    return {task.name: posed_of(task) for task in suite.tasks if not task.fault and not task.options.lm_eval}


def _results(
    respondent: Respondent,
    task: Task,
    allow: Collection[Permission],
    posed: Sequence[Posed] | None,
    progress: Progress | None,
) -> dict[str, TaskResult]:
    try:
        if task.fault:
            raise ConfigError(task.fault)
        if task.options.lm_eval:
            from prunetune.evaluation.suites.lm_eval import harness_results

            return harness_results(respondent, task)
        _permitted(task, allow)
        return {task.name: _result(respondent, task, posed_of(task) if posed is None else posed, progress)}
    except PrunetuneError as wrong:
        log.warning("task %s: %s", task.name, wrong)
        return {task.name: TaskResult(task.name, {}, (), error=str(wrong))}


def _permitted(task: Task, allow: Collection[Permission]) -> None:
    for use in task.uses:
        if use.scorer.needs and use.scorer.needs not in allow:
            what = {"code": "runs code of this machine", "judge": "sends answers to an endpoint"}[use.scorer.needs]
            raise ConfigError(
                f"task {task.name}: scorer {use.scorer.metrics[0]} {what} and is off; allow it with "
                f"--allow-{use.scorer.needs}"
            )


def _result(respondent: Respondent, task: Task, posed: Sequence[Posed], progress: Progress | None) -> TaskResult:
    asks = list(dict.fromkeys(use.scorer.ask for use in task.uses))
    tick = _ticker(task.name, len(posed) * len(asks), progress)
    answered = {ask: _answered(respondent, task, ask, posed, tick) for ask in asks}
    scores: list[dict[str, float]] = [{} for _ in posed]
    for use in task.uses:
        for metric, values in use.values(answered[use.scorer.ask]).items():
            for item, value in zip(scores, values, strict=True):
                item[metric] = value
    items = _items(task, posed, answered, scores)
    return TaskResult(task.name, {metric: _summary(items, metric) for metric in task.metrics}, items)


def _summary(items: Sequence[Item], metric: str) -> Any:
    evidence = EVIDENCE.get(metric, metric)
    return summarise([item for item in items if evidence in item.scores], metric)


def _ticker(task: str, total: int, progress: Progress | None) -> Tick:
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(task, done, total)

    return tick


def _answered(respondent: Respondent, task: Task, ask: Ask, posed: Sequence[Posed], tick: Tick) -> list[Answered]:
    records: list[Record] = [each.record for each in posed]
    raw = respondent.answers(ask, records, task.manner, tick)
    if ask == "write":
        return [Answered(each, got=text) for each, text in zip(posed, raw, strict=True)]
    if ask == "weigh":
        return [
            Answered(each, nats=nats, tokens=tokens, bytes=size)
            for each, (nats, tokens, size) in zip(posed, raw, strict=True)
        ]
    return [_chosen(each, values, task.options.likelihood) for each, values in zip(posed, raw, strict=True)]


def _chosen(posed: Posed, values: Sequence[tuple[float, int]], by: str) -> Answered:
    characters = [len(choice.strip()) or 1 for choice in posed.record.choices]
    lengths = {"mean": [tokens for _, tokens in values], "characters": characters}.get(by, [1] * len(values))
    best = best_of([nats / length for (nats, _), length in zip(values, lengths, strict=True)])
    if best is None:
        return Answered(posed)
    return Answered(posed, got=posed.options[best], correct=best == posed.record.answer)


def _items(
    task: Task,
    posed: Sequence[Posed],
    answered: Mapping[Ask, Sequence[Answered]],
    scores: Sequence[dict[str, float]],
) -> tuple[Item, ...]:
    shown = next((answered[ask] for ask in answered if ask != "weigh"), None)
    binary = next((use.metrics[0] for use in task.uses if use.scorer.binary and use.scorer.ask == "write"), None)
    names = unique([each.record.id for each in posed])
    items = []
    for index, (name, each) in enumerate(zip(names, posed, strict=True)):
        got = shown[index] if shown else None
        correct = got.correct if got else None
        if got and correct is None and binary and binary in scores[index]:
            correct = scores[index][binary] == 1.0
        items.append(_item(name, each, got.got if got else "", correct, scores[index]))
    return tuple(items)


def _item(name: str, posed: Posed, got: str, correct: bool | None, scores: dict[str, float]) -> Item:
    record = posed.record
    finite = {metric: value if not math.isinf(value) else math.nan for metric, value in scores.items()}
    item = Item(name, record.prompt, posed.expected, got, correct, finite)
    if record.kind == "text":
        return replace(item, prompt=record.completion, expected="")
    if record.messages:
        return replace(item, prompt="\n".join(f"{role}: {content}" for role, content in record.messages))
    return item
