"""The one evaluator: ask a backend what a task's scorers need, score the answers, and sum them up; suites and runs."""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import PurePath

from prunetune.errors import ConfigError, PrunetuneError
from prunetune.evaluation.item_subset import make_ids_unique
from prunetune.evaluation.results import Evaluation, Item, TaskResult
from prunetune.evaluation.statistics import PER_ITEM_METRIC, aggregate_items
from prunetune.evaluation.suites.prompts import build_prompts
from prunetune.evaluation.suites.protocol import Backend, OnRequestsDone, Prompt, RequestKind, Response
from prunetune.evaluation.suites.scorers import Permission
from prunetune.evaluation.suites.suite import Suite, Task
from prunetune.utils.failures import explain_failure
from prunetune.utils.redaction import SHOW_ALL, Redaction

log = logging.getLogger(__name__)
SuiteProgressCallback = Callable[[str, int, int], None]  # task, requests done, requests in all
NO_PERMISSIONS: frozenset[Permission] = frozenset()


def evaluate_suite(
    backend: Backend,
    suite: Suite,
    *,
    allow: Collection[Permission] = NO_PERMISSIONS,
    prompts: Mapping[str, Sequence[Prompt]] | None = None,
    progress: SuiteProgressCallback | None = None,
    redaction: Redaction = SHOW_ALL,
) -> Evaluation:
    """Every task's scores with their items, by its name; a task that fails has its `error` and does not stop others.

    `prompts` are those that `load_prompts` gave, where a suite is run more than once. `redaction` is that of errors and
    log lines; see `Evaluation.redacted` for the items.
    """
    known = prompts or {}
    results: dict[str, TaskResult] = {}
    for task in suite.tasks:
        try:
            results |= _evaluate_task(backend, task, allow, known.get(task.name), progress)
        except PrunetuneError as error:
            reason = redaction.message(error)
            log.warning("task %s: %s", task.name, reason)
            results[task.name] = TaskResult(task.name, {}, (), error=reason)
        except Exception as bug:
            if explain_failure(bug):
                raise
            log.error("task %s", task.name, exc_info=redaction == SHOW_ALL)
            reason = f"{redaction.message(bug)}; this is a bug, please report its traceback"
            results[task.name] = TaskResult(task.name, {}, (), error=reason)
    return Evaluation(results)


def load_prompts(suite: Suite) -> dict[str, tuple[Prompt, ...]]:
    """The prompts of every task with data, read once; raises `DataError` for the first that cannot be."""
    return {task.name: build_prompts(task) for task in suite.tasks if not task.error and not task.options.lm_eval}


def _evaluate_task(
    backend: Backend,
    task: Task,
    allow: Collection[Permission],
    prompts: Sequence[Prompt] | None,
    progress: SuiteProgressCallback | None,
) -> dict[str, TaskResult]:
    if task.error:
        raise ConfigError(task.error)
    for permission, part in task.permissions.items():
        if permission not in allow:
            risk = {"code": "runs code of this machine", "judge": "sends answers to an endpoint"}[permission]
            raise ConfigError(f"task {task.name}: {part} {risk} and is off; allow it with --allow-{permission}")
    if task.options.lm_eval:
        from prunetune.evaluation.suites.lm_eval_tasks import evaluate_lm_eval_task

        return evaluate_lm_eval_task(backend, task)
    return {task.name: score_task(backend, task, build_prompts(task) if prompts is None else prompts, progress)}


def score_task(
    backend: Backend,
    task: Task,
    prompts: Sequence[Prompt],
    progress: SuiteProgressCallback | None = None,
    rows: Mapping[str, Sequence[int]] | None = None,
) -> TaskResult:
    """Ask `backend` once for each kind of request that the task's scorers need, and score the answers.

    `rows` holds the indices of the prompts that each scorer takes, by its first metric; None: every scorer takes all.
    Raises a `PrunetuneError` where the backend cannot answer.
    """
    scorers = [(use, rows[use.metrics[0]] if rows else range(len(prompts))) for use in task.scorers]
    asked: dict[RequestKind, list[int]] = {}
    for use, indices in scorers:
        kind = use.scorer.request_kind
        asked[kind] = sorted({*asked.get(kind, ()), *indices})
    done, total = 0, sum(map(len, asked.values()))

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(task.name, done, total)

    responses = {
        kind: dict(zip(indices, _ask(backend, task, kind, [prompts[index] for index in indices], tick), strict=True))
        for kind, indices in asked.items()
    }
    scores: list[dict[str, float]] = [{} for _ in prompts]
    for use, indices in scorers:
        for metric, values in use.score([responses[use.scorer.request_kind][index] for index in indices]).items():
            for index, value in zip(indices, values, strict=True):
                scores[index][metric] = value
    items = _items(task, prompts, responses, scores)
    totals = {}
    for use, indices in scorers:
        for metric in use.metrics:
            evidence = PER_ITEM_METRIC.get(metric, metric)
            totals[metric] = aggregate_items([items[i] for i in indices if evidence in items[i].scores], metric)
    return TaskResult(task.name, totals, tuple(items))


def _ask(
    backend: Backend, task: Task, kind: RequestKind, prompts: Sequence[Prompt], tick: OnRequestsDone
) -> list[Response]:
    answers = backend.run_requests(kind, [prompt.record for prompt in prompts], task.generation_settings, tick)
    pairs = list(zip(prompts, answers, strict=True))
    if kind == "generate":
        return [Response(prompt, text=text) for prompt, text in pairs]
    if kind == "nll":
        return [Response(prompt, nll=nats, n_tokens=n, n_bytes=size) for prompt, (nats, n, size) in pairs]
    return [_pick_choice(prompt, choices, task.options.likelihood) for prompt, choices in pairs]


def _pick_choice(prompt: Prompt, choices: Sequence[tuple[float, int]], normalisation: str) -> Response:
    """The likeliest choice, out of [(log-likelihood in nats, tokens) of each]; "mean" is per token."""
    characters = [len(choice.strip()) or 1 for choice in prompt.record.choices]
    by = {"mean": [tokens for _, tokens in choices], "characters": characters, "sum": [1] * len(choices)}
    best = argmax_unless_nan([nats / length for (nats, _), length in zip(choices, by[normalisation], strict=True)])
    if best is None:
        return Response(prompt)
    return Response(prompt, text=prompt.choice_texts[best], correct=best == prompt.record.answer)


def argmax_unless_nan(likelihoods: Sequence[float]) -> int | None:
    """Index of the first of the likeliest; None where one is nan."""
    if any(math.isnan(value) for value in likelihoods):
        return None
    return likelihoods.index(max(likelihoods))


def _items(
    task: Task,
    prompts: Sequence[Prompt],
    responses: Mapping[RequestKind, Mapping[int, Response]],
    scores: Sequence[dict[str, float]],
) -> list[Item]:
    binary = next((use.metrics[0] for use in task.scorers if use.is_binary_of_text), None)
    ids = make_ids_unique([prompt.record.id for prompt in prompts])
    lines = make_ids_unique([PurePath(prompt.record.source).name for prompt in prompts])
    items = []
    for index, prompt in enumerate(prompts):
        record, expected = prompt.record, prompt.expected
        shown = [by_index[index] for kind, by_index in responses.items() if kind != "nll" and index in by_index]
        got, correct = (shown[0].text, shown[0].correct) if shown else ("", None)
        if shown and correct is None and binary in scores[index]:
            correct = scores[index][binary] == 1.0
        finite = {metric: math.nan if math.isinf(value) else value for metric, value in scores[index].items()}
        asked = "\n".join(f"{turn.role}: {turn.content}" for turn in record.messages) or record.prompt
        asked, expected = (record.completion, "") if record.kind == "text" else (asked, expected)
        items.append(Item(ids[index], asked, expected, got, correct, finite, lines[index]))
    return items
