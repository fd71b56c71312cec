"""Scores of a run's rows: each task's rows as a task of a suite, asked and scored by the suites' own engine."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from prunetune.config.recipe import DataConfig, EvaluateConfig
from prunetune.data.records import Record
from prunetune.errors import DataError
from prunetune.evaluation.item_subset import stable_sample
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.suites.local import LocalModel
from prunetune.evaluation.suites.protocol import GenerationSettings, OnRequestsDone, Prompt, RequestKind
from prunetune.evaluation.suites.run import score_task
from prunetune.evaluation.suites.scorers import SCORERS, TaskScorer
from prunetune.evaluation.suites.suite import Task, TaskOptions

ProgressCallback = Callable[[str, int, int], None]  # task, requests done, requests in all
# The metrics of a run in the order of their columns, each with the scorer that gives it.
RUN_METRICS = {
    "accuracy": "accuracy",
    "rouge_l": "rouge",
    "exact_match": "exact_match",
    "macro_f1": "macro_f1",
    "nll": "nll",
    "perplexity": "perplexity",
    "bits_per_byte": "bits_per_byte",
}


def evaluate(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    data: DataConfig,
    config: EvaluateConfig,
    progress: ProgressCallback | None = None,
    *,
    general: Sequence[Record] = (),
) -> Evaluation:
    """Score `model` on `records`, task by task, on the device it is on. Raises `DataError` where there is no record.

    `LocalModel` counts the tokens and `SCORERS` makes the numbers, as for `eval` and `check`, so all give the same:

    - accuracy of records with choices: the likeliest by mean log-likelihood per token; macro-F1 beside it where all
      records of the task have the same set of choices.
    - nll of every answer: nats per token after the prompt, without the end of text or turn (no server scores it).
    - perplexity of texts: every token is predicted once, the first from the start token and none after the last; a
      text longer than the context is scored in windows. Bits per byte beside it, which do not depend on the tokenizer.
    - ROUGE-L and exact match of greedy answers, for the first `generate_limit` records without choices.

    Of `data` only the template counts: a prompt longer than the model's context loses its beginning, whatever
    `data.max_length` and `data.too_long` say about tuning. Tasks of `general` are scored too, but kept out of means.
    """
    if not records:
        raise DataError("no test records to evaluate; name some in data.test, or raise data.test_share")
    by_task: dict[str, list[Record]] = {}
    for record in (*records, *general):
        by_task.setdefault(record.task, []).append(record)
    general_tasks = {record.task for record in general}
    if shared := general_tasks & {record.task for record in records}:
        raise DataError(f"task {min(shared)!r} is in the rows of data.test and of data.general: rename one of the two")
    backend = _SharedPasses(model, tokenizer, max_tokens=config.max_tokens)
    results = {}
    for name, rows in by_task.items():
        chosen = stable_sample(rows, config.limit)
        with_choices = [index for index, record in enumerate(chosen) if record.answer is not None and record.choices]
        answers = [index for index, record in enumerate(chosen) if record.kind != "text"]
        generated = [index for index in answers if index not in set(with_choices)][: config.generate_limit]
        label_sets = [frozenset(chosen[index].choices) for index in with_choices]
        scored = {
            "accuracy": with_choices,
            "rouge_l": generated,
            "exact_match": generated,
            "macro_f1": with_choices if len(label_sets) > 1 and len(set(label_sets)) == 1 else [],
            "nll": answers,
            "perplexity": (texts := [index for index, record in enumerate(chosen) if record.kind == "text"]),
            "bits_per_byte": texts,
        }
        scorers = {metric: SCORERS[scorer] for metric, scorer in RUN_METRICS.items() if scored[metric]}
        task = Task(
            name,
            TaskOptions(template=data.template, max_new_tokens=config.max_new_tokens),
            tuple(TaskScorer(scorer, scorer.options, (metric,)) for metric, scorer in scorers.items()),
        )
        prompts = [Prompt(record, record.choices, {}) for record in chosen]
        result = score_task(backend, task, prompts, progress, scored)
        results[name] = replace(result, general=name in general_tasks)
    return Evaluation(results)


class _SharedPasses(LocalModel):
    """A `LocalModel` that takes the NLL of a right choice from the pass that compared the choices."""

    def __init__(self, model: Any, tokenizer: Any, *, max_tokens: int) -> None:
        super().__init__(model, tokenizer, max_tokens=max_tokens)
        self._nll_of_choice: dict[Record, list[float]] = {}

    def run_requests(
        self, kind: RequestKind, records: Sequence[Record], settings: GenerationSettings, tick: OnRequestsDone
    ) -> list[Any]:
        """See `Backend`."""
        known = self._nll_of_choice
        if kind == "nll":
            missing = [record for record in records if record not in known]
            tick(len(records) - len(missing))
            fresh = iter(super().run_requests(kind, missing, settings, tick) if missing else [])
            return [known[record] if record in known else next(fresh) for record in records]
        values = super().run_requests(kind, records, settings, tick)
        if kind == "loglikelihood":
            # A prompt that has to be cut is cut to another length for its choices than for its answer.
            for record, fits, choices in zip(records, self.fits_context(records, settings), values, strict=True):
                if fits and record.answer is not None:
                    loglikelihood, tokens = choices[record.answer]
                    known[record] = [-loglikelihood, tokens, len(record.completion.encode())]
        return values
