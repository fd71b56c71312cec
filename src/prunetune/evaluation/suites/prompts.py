"""A task's rows as records to ask: sampled, put through the task's templates, lettered where wanted."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prunetune.config.recipe import DataConfig
from prunetune.data.records import Record
from prunetune.data.sources import Row, read_rows
from prunetune.errors import DataError
from prunetune.evaluation.score_records import sample
from prunetune.evaluation.suites.protocol import Posed
from prunetune.evaluation.suites.suite import Task
from prunetune.evaluation.suites.templates import Render, expression_of, template_of

LETTERS = string.ascii_uppercase
NOTHING = "-"  # stands for the right answer while a row without one is checked


def posed_of(task: Task) -> tuple[Posed, ...]:
    """The records of a task as they are asked; raises `DataError`."""
    rows = read_rows(task.options.data, DataConfig(root=task.root), task.options.split)
    chosen = sample([replace(row, id=_id(row)) for row in rows], task.options.limit)
    renders = _renders(task)
    return tuple(_posed(row, task, renders) for row in chosen)


def _id(row: Row) -> str:
    own = row.fields.get("id") if isinstance(row.fields, Mapping) else None
    return str(own) if isinstance(own, str | int) and str(own) else row.id


def _renders(task: Task) -> dict[str, Render]:
    makers = {
        "prompt": template_of,
        "completion": template_of,
        "text": template_of,
        "choices": expression_of,
        "answer": expression_of,
    }
    told = {key: getattr(task.options, key) for key in makers}
    return {key: makers[key](text, f"task {task.name}: {key}") for key, text in told.items() if text}


def _posed(row: Row, task: Task, renders: Mapping[str, Render]) -> Posed:
    if not isinstance(row.fields, Mapping):
        row.record()  # says what a row is
    fields: dict[str, Any] = {str(key): value for key, value in row.fields.items() if value is not None}
    rendered = {key: render(fields, row.source) for key, render in renders.items()}
    whole = {**_kept(fields, rendered), **rendered}
    unanswered = task.reference_free and not {"completion", "choices", "messages", "text"} & set(whole)
    if unanswered:
        whole["completion"] = NOTHING
    record = replace(row, fields=whole).record()
    _fits(record, task)
    record = replace(record, id=row.id, task=task.name)
    options = record.choices
    if task.options.lettered:
        record = lettered(record, task)
    return Posed(replace(record, completion="") if unanswered else record, options, fields)


def _kept(fields: Mapping[str, Any], rendered: Mapping[str, Any]) -> dict[str, Any]:
    """The row's own fields; those that a rendered one would contradict go."""
    gone = {
        "text": {"prompt", "completion", "messages", "choices", "answer"},
        "prompt": {"messages"},
        "completion": {"choices", "answer"},
        "choices": {"completion"},
        "answer": {"completion"},
    }
    out = set().union(*(gone[key] for key in rendered))
    return {key: value for key, value in fields.items() if key not in out}


def _fits(record: Record, task: Task) -> None:
    asks = {use.scorer.ask for use in task.uses}
    if "choose" in asks and record.answer is None:
        raise DataError(f"{record.source}: task {task.name} chooses, and the row has no choices; name another scorer")
    if "write" in asks and record.kind == "text":
        raise DataError(f"{record.source}: task {task.name} writes answers, and the row is a text; name another scorer")


def lettered(record: Record, task: Task) -> Record:
    """The same question with its choices listed in the prompt, to be answered by a letter."""
    if not 1 < len(record.choices) <= len(LETTERS):
        raise DataError(f"{record.source}: lettered wants 2 to {len(LETTERS)} choices, got {len(record.choices)}")
    listed = "".join(f"{letter}. {choice.strip()}\n" for letter, choice in zip(LETTERS, record.choices, strict=False))
    before, listed = task.options.before, f"{task.options.heading}{listed}"
    letters = tuple(LETTERS[: len(record.choices)])
    if record.messages:
        *earlier, (role, content) = record.messages
        messages = (*earlier, (role, f"{content}\n{listed}"))
        return replace(record, messages=messages, choices=letters, completion=letters[record.answer or 0])
    if not record.prompt.endswith(before):
        raise DataError(f"{record.source}: the prompt does not end with {before!r}, which `before` names")
    if before:
        prompt = f"{record.prompt.removesuffix(before)}{listed}\n{before}"
    else:
        prompt, letters = f"{record.prompt}\n{listed}Answer:", tuple(f" {letter}" for letter in letters)
    return replace(record, prompt=prompt, choices=letters, completion=letters[record.answer or 0])
