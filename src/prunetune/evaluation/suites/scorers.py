"""The table of scorers that a suite may name, and how a task's `scorer` is read."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from prunetune.errors import ConfigError
from prunetune.evaluation.suites import judge_scorer, python_scorer, text_scorers
from prunetune.evaluation.suites.protocol import RequestKind, Response
from prunetune.evaluation.suites.text_scorers import MetricValues, ScorerOptions
from prunetune.utils.suggest import validate_name
from prunetune.utils.untrusted import short_repr

Permission = Literal["code", "judge"]


@dataclass(frozen=True)
class Scorer:
    """The kind of request that a scorer needs, and the function that turns answers into numbers."""

    request_kind: RequestKind
    metrics: tuple[str, ...]  # the task's scores, the headline first
    score: Callable[[Sequence[Response], ScorerOptions], MetricValues]
    options: Mapping[str, Any] = field(default_factory=dict)  # option -> default, which also gives the type
    needs_reference: bool = True  # rows must hold the right answer
    is_binary: bool = False  # 1 is right and 0 is wrong
    permission: Permission | None = None  # what the user has to allow by --allow-...


@dataclass(frozen=True)
class TaskScorer:
    """A scorer with the options and metric names of one task."""

    scorer: Scorer
    options: ScorerOptions
    metrics: tuple[str, ...]

    @property
    def is_binary_of_text(self) -> bool:
        """Whether a generated answer is right or wrong by it."""
        return self.scorer.is_binary and self.scorer.request_kind == "generate"

    def score(self, answers: Sequence[Response]) -> MetricValues:
        """A value of every metric for each item, and what the task's score needs beside them (tokens, bytes)."""
        values = self.scorer.score(answers, self.options)
        if self.options.get("name"):
            return {self.metrics[0]: values[self.scorer.metrics[0]]}
        unwanted = {*self.scorer.metrics} - {*self.metrics}
        return {metric: items for metric, items in values.items() if metric not in unwanted}


def accuracy(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """1 where the likeliest choice is the right one."""
    return {"accuracy": [math.nan if answer.correct is None else float(answer.correct) for answer in answers]}


def nll_scores(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """NLL in nats per token, with the tokens and bytes that perplexity and bits per byte divide by."""
    return {
        "nll": [answer.nll / answer.n_tokens if answer.n_tokens else math.nan for answer in answers],
        "tokens": [float(answer.n_tokens) for answer in answers],
        "bytes": [float(answer.n_bytes) for answer in answers],
    }


NAME_OPTION: ScorerOptions = {"name": ""}  # renames the metric, so that a task can use a scorer twice
SCORERS: dict[str, Scorer] = {
    "accuracy": Scorer("loglikelihood", ("accuracy",), accuracy, is_binary=True),
    "macro_f1": Scorer("loglikelihood", ("macro_f1",), accuracy, is_binary=True),
    "nll": Scorer("nll", ("nll",), nll_scores),
    "perplexity": Scorer("nll", ("perplexity", "bits_per_byte"), nll_scores),
    "bits_per_byte": Scorer("nll", ("bits_per_byte", "perplexity"), nll_scores),
    "exact_match": Scorer("generate", ("exact_match",), text_scorers.exact_match, {"strict": False}, is_binary=True),
    "label_f1": Scorer("generate", ("label_f1",), text_scorers.label_match, is_binary=True),
    "contains": Scorer(
        "generate", ("contains",), text_scorers.contains, {"any": [], "all": [], **NAME_OPTION},
        needs_reference=False, is_binary=True,
    ),
    "regex": Scorer(
        "generate", ("regex",), text_scorers.regex, {"pattern": "", "ignore_case": False, **NAME_OPTION},
        needs_reference=False, is_binary=True,
    ),
    "json_schema": Scorer(
        "generate", ("json_schema",), text_scorers.json_schema, {"schema": {}, **NAME_OPTION},
        needs_reference=False, is_binary=True,
    ),
    "token_f1": Scorer("generate", ("token_f1",), text_scorers.token_f1),
    "rouge": Scorer("generate", ("rouge_l", "rouge_1", "rouge_2"), text_scorers.rouge, {"stemmer": False}),
    "bleu": Scorer("generate", ("bleu",), text_scorers.bleu),
    "chrf": Scorer("generate", ("chrf",), text_scorers.chrf),
    "python": Scorer(
        "generate", ("python",), python_scorer.python_function_scores, {"function": "", **NAME_OPTION},
        needs_reference=False, permission="code",
    ),
    "judge": Scorer(
        "generate", ("judge",), judge_scorer.judge_scores, {**judge_scorer.OPTIONS, **NAME_OPTION},
        needs_reference=False, permission="judge",
    ),
}  # fmt: skip


def parse_scorers(value: Any, where: str) -> tuple[TaskScorer, ...]:
    """The scorers in a task's `scorer`: a name, {name: options}, or a list of these; raises `ConfigError`."""
    entries = value if isinstance(value, list) else [value]
    named: list[tuple[str, Any]] = []
    for entry in entries:
        if isinstance(entry, str):
            named.append((entry, {}))
        elif isinstance(entry, Mapping) and entry:
            named += [(str(name), options or {}) for name, options in entry.items()]
        else:
            raise ConfigError(f"{where}: scorer is a name, name: options, or a list of these, got {short_repr(entry)}")
    if not named:
        raise ConfigError(f"{where}: scorer names nothing; known are {', '.join(SCORERS)}")
    uses = tuple(
        _parse_scorer(validate_name(name, SCORERS, f"{where}: scorer"), options, where) for name, options in named
    )
    metrics = [metric for use in uses for metric in use.metrics]
    twice = next((metric for metric in metrics if metrics.count(metric) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where}: two scorers give {twice}; leave one out, or give one another name (option name)")
    return uses


def _parse_scorer(name: str, options: Any, where: str) -> TaskScorer:
    scorer, where = SCORERS[name], f"{where}: scorer {name}"
    if not isinstance(options, Mapping):
        raise ConfigError(f"{where}: options map names to values, got {short_repr(options)}")
    if options and not scorer.options:
        raise ConfigError(f"{where} has no options, got {', '.join(map(str, options))}")
    given = {validate_name(str(key), scorer.options, f"{where}: option"): value for key, value in options.items()}
    typed = {key: _typed(value, scorer.options[key], f"{where}: {key}") for key, value in given.items()}
    merged = {**scorer.options, **typed}
    for needed in ("pattern", "schema", "function", "url", "model"):
        if needed in merged and not merged[needed]:
            raise ConfigError(f"{where} needs {needed}; give it as {{{name}: {{{needed}: ...}}}}")
    metrics = (merged["name"],) if merged.get("name") else scorer.metrics
    return TaskScorer(scorer, merged, metrics)


def _typed(value: Any, default: Any, where: str) -> Any:
    if isinstance(default, list) and isinstance(value, str):
        return [value]
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise ConfigError(f"{where} must be {KINDS[type(default)]}, got {short_repr(value)}")
    return value


KINDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a mapping",
}


def is_reference_free(task_scorer: TaskScorer) -> bool:
    """Whether rows may lack a right answer; a pattern with a group, and `contains` without texts, compare with it."""
    if "any" in task_scorer.options:
        return bool(task_scorer.options["any"] or task_scorer.options["all"])
    if "pattern" in task_scorer.options:
        return not text_scorers.compile_pattern(task_scorer.options).groups
    return not task_scorer.scorer.needs_reference
