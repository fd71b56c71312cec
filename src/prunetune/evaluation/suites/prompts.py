"""A task's rows as prompts: sampled, rendered by the task's templates, and with lettered choices where wanted."""

import string
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prunetune.config.recipe import DataConfig
from prunetune.data.records import Record, make_all
from prunetune.data.shapes import without_overridden_fields
from prunetune.data.sources import SourceRow, read_rows
from prunetune.data.templates import RowRenderer, compile_expression, compile_template
from prunetune.errors import DataError
from prunetune.evaluation.item_subset import stable_sample
from prunetune.evaluation.suites.protocol import Prompt
from prunetune.evaluation.suites.suite import Task

LETTERS = string.ascii_uppercase
PLACEHOLDER_ANSWER = "-"  # stands for the right answer while a row without one is checked


def build_prompts(task: Task) -> tuple[Prompt, ...]:
    """The prompts of a task; raises `DataError` for the rows that cannot be used."""
    rows = []
    for row in read_rows(task.options.data, DataConfig(root=task.root), task.options.split):
        given = row.fields.get("id") if isinstance(row.fields, Mapping) else None
        rows.append(replace(row, id=str(given)) if isinstance(given, str | int) and str(given) else row)
    compilers = dict.fromkeys(("prompt", "completion", "text"), compile_template)
    compilers |= dict.fromkeys(("choices", "answer"), compile_expression)
    texts = {key: getattr(task.options, key) for key in compilers}
    renderers = {key: compilers[key](text, f"task {task.name}: {key}") for key, text in texts.items() if text}
    return tuple(make_all(lambda row: _build_prompt(row, task, renderers), stable_sample(rows, task.options.limit)))


def _build_prompt(row: SourceRow, task: Task, renderers: Mapping[str, RowRenderer]) -> Prompt:
    if not isinstance(row.fields, Mapping):
        row.to_record()  # raises the error that says what a row is
    fields: dict[str, Any] = {str(key): value for key, value in row.fields.items() if value is not None}
    rendered = {key: render(fields, row.source) for key, render in renderers.items()}
    merged = {**without_overridden_fields(fields, rendered), **rendered}
    unanswered = task.is_reference_free and not {"completion", "choices", "messages", "text"} & set(merged)
    if unanswered:
        merged["completion"] = PLACEHOLDER_ANSWER
    record = replace(row, fields=merged).to_record()
    kinds = {use.scorer.request_kind for use in task.scorers}
    if "loglikelihood" in kinds and record.answer is None:
        raise DataError(
            f"{record.source}: task {task.name} compares choices, and the row has none; name another scorer"
        )
    if "generate" in kinds and record.kind == "text":
        raise DataError(
            f"{record.source}: task {task.name} generates answers, and the row is a text; name another scorer"
        )
    record = replace(record, id=row.id, task=task.name)
    choice_texts = record.choices
    if task.options.lettered:
        record = letter_choices(record, task)
    return Prompt(replace(record, completion="") if unanswered else record, choice_texts, fields)


def letter_choices(record: Record, task: Task) -> Record:
    """The same question with its choices listed in the prompt, to be answered by a letter."""
    if not 1 < len(record.choices) <= len(LETTERS):
        raise DataError(f"{record.source}: lettered needs 2 to {len(LETTERS)} choices, got {len(record.choices)}")
    listed = "".join(f"{letter}. {choice.strip()}\n" for letter, choice in zip(LETTERS, record.choices, strict=False))
    before, listed = task.options.before, f"{task.options.heading}{listed}"
    letters = tuple(LETTERS[: len(record.choices)])
    if record.messages:
        *earlier, last = record.messages
        messages = (*earlier, replace(last, content=f"{last.content}\n{listed}"))
        return replace(record, messages=messages, choices=letters, completion=letters[record.answer or 0])
    if not record.prompt.endswith(before):
        raise DataError(f"{record.source}: the prompt does not end with {before!r}, which `before` names")
    if before:
        prompt = f"{record.prompt.removesuffix(before)}{listed}\n{before}"
    else:
        prompt, letters = f"{record.prompt}\n{listed}Answer:", tuple(f" {letter}" for letter in letters)
    return replace(record, prompt=prompt, choices=letters, completion=letters[record.answer or 0])
