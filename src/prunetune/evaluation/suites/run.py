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
from prunetune.evaluation.score_records import argmax_unless_nan, make_ids_unique
from prunetune.evaluation.statistics import PER_ITEM_METRIC, aggregate_items
from prunetune.evaluation.suites.prompts import build_prompts
from prunetune.evaluation.suites.protocol import Backend, OnRequestsDone, Prompt, RequestKind, Response
from prunetune.evaluation.suites.scorers import Permission
from prunetune.evaluation.suites.suite import Suite, Task

log = logging.getLogger(__name__)
SuiteProgressCallback = Callable[[str, int, int], None]  # task, answers done, answers in all
NO_PERMISSIONS: frozenset[Permission] = frozenset()


def evaluate_suite(
    backend: Backend,
    suite: Suite,
    *,
    allow: Collection[Permission] = NO_PERMISSIONS,
    prompts: Mapping[str, Sequence[Prompt]] | None = None,
    progress: SuiteProgressCallback | None = None,
) -> Evaluation:
    """Every task's scores with their items, by its name; a task that fails has its `error` instead.

    `questions` are those that `read_questions` gave, where a suite is run more than once.
    """
    known = prompts or {}
    return Evaluation(
        {
            name: result
            for task in suite.tasks
            for name, result in _results(backend, task, allow, known.get(task.name), progress).items()
        }
    )


def load_prompts(suite: Suite) -> dict[str, tuple[Prompt, ...]]:
    """The records of every task with data, read once; raises `DataError` for the first that cannot be."""
    return {task.name: build_prompts(task) for task in suite.tasks if not task.error and not task.options.lm_eval}


def _results(
    backend: Backend,
    task: Task,
    allow: Collection[Permission],
    prompts: Sequence[Prompt] | None,
    progress: SuiteProgressCallback | None,
) -> dict[str, TaskResult]:
    try:
        if task.error:
            raise ConfigError(task.error)
        if task.options.lm_eval:
            from prunetune.evaluation.suites.lm_eval_tasks import evaluate_lm_eval_task

            return evaluate_lm_eval_task(backend, task)
        _permitted(task, allow)
        return {task.name: _result(backend, task, build_prompts(task) if prompts is None else prompts, progress)}
    except PrunetuneError as wrong:
        log.warning("task %s: %s", task.name, wrong)
        return {task.name: TaskResult(task.name, {}, (), error=str(wrong))}


def _permitted(task: Task, allow: Collection[Permission]) -> None:
    for use in task.scorers:
        if use.scorer.permission and use.scorer.permission not in allow:
            what = {"code": "runs code of this machine", "judge": "sends answers to an endpoint"}[use.scorer.permission]
            raise ConfigError(
                f"task {task.name}: scorer {use.scorer.metrics[0]} {what} and is off; allow it with "
                f"--allow-{use.scorer.permission}"
            )


def _result(
    backend: Backend, task: Task, prompts: Sequence[Prompt], progress: SuiteProgressCallback | None
) -> TaskResult:
    asks = list(dict.fromkeys(use.scorer.request_kind for use in task.scorers))
    tick = _ticker(task.name, len(prompts) * len(asks), progress)
    answered = {ask: _run_requests(backend, task, ask, prompts, tick) for ask in asks}
    scores: list[dict[str, float]] = [{} for _ in prompts]
    for use in task.scorers:
        for metric, values in use.score(answered[use.scorer.request_kind]).items():
            for item, value in zip(scores, values, strict=True):
                item[metric] = value
    items = _items(task, prompts, answered, scores)
    return TaskResult(task.name, {metric: _summary(items, metric) for metric in task.metrics}, items)


def _summary(items: Sequence[Item], metric: str) -> Any:
    evidence = PER_ITEM_METRIC.get(metric, metric)
    return aggregate_items([item for item in items if evidence in item.scores], metric)


def _ticker(task: str, total: int, progress: SuiteProgressCallback | None) -> OnRequestsDone:
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(task, done, total)

    return tick


def _run_requests(
    backend: Backend, task: Task, kind: RequestKind, prompts: Sequence[Prompt], tick: OnRequestsDone
) -> list[Response]:
    records: list[Record] = [each.record for each in prompts]
    raw = backend.run_requests(kind, records, task.generation_settings, tick)
    if kind == "write":
        return [Response(each, text=text) for each, text in zip(prompts, raw, strict=True)]
    if kind == "weigh":
        return [
            Response(each, nll=nats, n_tokens=tokens, n_bytes=size)
            for each, (nats, tokens, size) in zip(prompts, raw, strict=True)
        ]
    return [_pick_choice(each, values, task.options.likelihood) for each, values in zip(prompts, raw, strict=True)]


def _pick_choice(prompt: Prompt, values: Sequence[tuple[float, int]], by: str) -> Response:
    characters = [len(choice.strip()) or 1 for choice in prompt.record.choices]
    lengths = {"mean": [tokens for _, tokens in values], "characters": characters}.get(by, [1] * len(values))
    best = argmax_unless_nan([nats / length for (nats, _), length in zip(values, lengths, strict=True)])
    if best is None:
        return Response(prompt)
    return Response(prompt, text=prompt.choice_texts[best], correct=best == prompt.record.answer)


def _items(
    task: Task,
    prompts: Sequence[Prompt],
    answered: Mapping[RequestKind, Sequence[Response]],
    scores: Sequence[dict[str, float]],
) -> tuple[Item, ...]:
    shown = next((answered[ask] for ask in answered if ask != "weigh"), None)
    binary = next(
        (use.metrics[0] for use in task.scorers if use.scorer.is_binary and use.scorer.request_kind == "write"), None
    )
    names = make_ids_unique([each.record.id for each in prompts])
    items = []
    for index, (name, each) in enumerate(zip(names, prompts, strict=True)):
        got = shown[index] if shown else None
        correct = got.correct if got else None
        if got and correct is None and binary and binary in scores[index]:
            correct = scores[index][binary] == 1.0
        items.append(_item(name, each, got.text if got else "", correct, scores[index]))
    return tuple(items)


def _item(name: str, prompt: Prompt, got: str, correct: bool | None, scores: dict[str, float]) -> Item:
    record = prompt.record
    finite = {metric: value if not math.isinf(value) else math.nan for metric, value in scores.items()}
    item = Item(name, record.prompt, prompt.expected, got, correct, finite)
    if record.kind == "text":
        return replace(item, prompt=record.completion, expected="")
    if record.messages:
        return replace(item, prompt="\n".join(f"{role}: {content}" for role, content in record.messages))
    return item
