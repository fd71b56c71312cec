"""Tasks of lm-eval by their name, scored by lm-eval itself on a model in this process."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prunetune.errors import DataError, PrunetuneError
from prunetune.evaluation.results import Item, Score, TaskResult
from prunetune.evaluation.scoring_mode import evaluation_mode
from prunetune.evaluation.suites.protocol import Backend
from prunetune.evaluation.suites.suite import Task
from prunetune.utils.failures import typed_line
from prunetune.utils.files import expand_path
from prunetune.utils.optional import import_optional
from prunetune.utils.suggest import validate_name

BATCH_SIZE = 16
CORRECTNESS_METRICS = ("acc", "exact_match")  # metrics that say whether an item is right


def evaluate_lm_eval_task(backend: Backend, task: Task) -> dict[str, TaskResult]:
    """lm-eval's own scores, standard errors and items; tasks of a group are named "task/their own name".

    Raises a `PrunetuneError` for a task that lm-eval does not know or cannot run, and for a model without weights here.
    """
    output = _evaluated(backend, task, _manager(task))
    results = {name: _result(name, output) for name in output["samples"]}
    if set(results) == {task.options.lm_eval}:
        return {task.name: TaskResult(task.name, *results[task.options.lm_eval])}
    return {f"{task.name}/{name}": TaskResult(f"{task.name}/{name}", *result) for name, result in results.items()}


def _manager(task: Task) -> Any:
    """lm-eval's index of tasks; the thousands that come with it are read only if `include` does not have the task."""
    tasks = import_optional("lm_eval.tasks", extra="lm-eval", use=f"task {task.name}")
    include = str(Path(task.root) / expand_path(task.options.include)) if task.options.include else None
    if include:
        manager = tasks.TaskManager(include_path=include, include_defaults=False)
        if task.options.lm_eval in manager.all_tasks:
            return manager
    manager = tasks.TaskManager(include_path=include)
    validate_name(task.options.lm_eval, manager.all_tasks, f"task {task.name}: lm_eval task")
    return manager


def _evaluated(backend: Backend, task: Task, manager: Any) -> Any:
    model, tokenizer = backend.model_and_tokenizer()
    harness = import_optional("lm_eval", extra="lm-eval", use=f"task {task.name}")
    wrapped = import_optional("lm_eval.models.huggingface", extra="lm-eval", use=f"task {task.name}").HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE
    )
    try:
        with evaluation_mode(model):
            return harness.simple_evaluate(
                model=wrapped,
                tasks=[task.options.lm_eval],
                num_fewshot=task.options.fewshot or None,
                limit=task.options.limit or None,
                task_manager=manager,
                log_samples=True,
                bootstrap_iters=100,  # only where there is no closed form
            )
    except PrunetuneError:
        raise
    except Exception as broken:  # a task file, a data set or the hub: lm-eval has no error type of its own
        reason = typed_line(broken)
        text = f"task {task.name}: lm-eval cannot run {task.options.lm_eval} ({reason})"
        raise DataError(text, quoted=reason) from broken


def _result(name: str, output: Mapping[str, Any]) -> tuple[dict[str, Score], tuple[Item, ...]]:
    samples = output["samples"][name]
    scores = {}
    for key, value in output["results"][name].items():
        metric, _, filter_name = key.partition(",")
        if filter_name and not metric.endswith("_stderr") and isinstance(value, int | float):
            se = output["results"][name].get(f"{metric}_stderr,{filter_name}")
            n = sum(sample.get("filter", filter_name) == filter_name for sample in samples)
            scores[metric] = Score(float(value), float(se) if isinstance(se, int | float) else math.nan, n)
    first = samples[0].get("filter") if samples else None
    return scores, tuple(_item(sample, list(scores)) for sample in samples if sample.get("filter") == first)


def _item(sample: Mapping[str, Any], metrics: Sequence[str]) -> Item:
    id = str(sample["doc_id"])
    values = {metric: float(sample[metric]) for metric in metrics if isinstance(sample.get(metric), int | float)}
    right = next((values[metric] for metric in CORRECTNESS_METRICS if metric in values), None)
    calls = sample.get("arguments")
    calls = [list(call.values()) for call in calls.values()] if isinstance(calls, Mapping) else calls
    replies = sample.get("filtered_resps") or []
    got = replies[0] if replies and isinstance(replies[0], str) else ""
    if not got:
        with suppress(TypeError, ValueError, IndexError):  # of choices, the index of the likeliest
            likelihoods = [float(reply[0]) for reply in replies]
            got = str(likelihoods.index(max(likelihoods))) if likelihoods else ""
    return Item(
        id,
        prompt=str(calls[0][0]) if calls else "",
        expected=str(sample.get("target", "")),
        got=got,
        correct=None if right is None else right == 1.0,
        scores=values,
        line=id,
    )
