"""The scorers that a suite may name. One is a function in this table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from prunetune.errors import ConfigError
from prunetune.evaluation.suites import judge_scorer, python_scorer, text_scorers
from prunetune.evaluation.suites.protocol import Answered, Ask
from prunetune.evaluation.suites.text_scorers import Options, Values
from prunetune.utils.suggest import named

Permission = Literal["code", "judge"]


@dataclass(frozen=True)
class Scorer:
    """What a model has to be asked, and how the answers become numbers."""

    ask: Ask
    metrics: tuple[str, ...]  # the task's scores; the first stands for it
    score: Callable[[Sequence[Answered], Options], Values]
    options: Mapping[str, Any] = field(default_factory=dict)  # with their defaults, whose type is the type
    reference: bool = True  # rows must hold the right answer
    binary: bool = False  # 1 is right and 0 is wrong
    needs: Permission | None = None  # what the caller has to allow


@dataclass(frozen=True)
class Use:
    """A scorer as a task uses it."""

    scorer: Scorer
    options: Options
    metrics: tuple[str, ...]

    def values(self, answers: Sequence[Answered]) -> Values:
        """The items' values, under the names that the task gave them."""
        found = self.scorer.score(answers, self.options)
        if self.metrics == self.scorer.metrics:
            return found
        return {self.metrics[0]: found[self.scorer.metrics[0]]}


def accuracy(answers: Sequence[Answered], options: Options) -> Values:
    """1 where the likeliest choice is the right one."""
    return {"accuracy": [math.nan if each.correct is None else float(each.correct) for each in answers]}


def weighed(answers: Sequence[Answered], options: Options) -> Values:
    """NLL in nats per token, with the tokens and bytes that perplexity and bits per byte go by."""
    return {
        "nll": [each.nats / each.tokens if each.tokens else math.nan for each in answers],
        "tokens": [float(each.tokens) for each in answers],
        "bytes": [float(each.bytes) for each in answers],
    }


RENAMED: Options = {"name": ""}  # a metric of one's own name, so that a scorer can be used twice
SCORERS: dict[str, Scorer] = {
    "accuracy": Scorer("choose", ("accuracy",), accuracy, binary=True),
    "macro_f1": Scorer("choose", ("macro_f1",), accuracy, binary=True),
    "nll": Scorer("weigh", ("nll",), weighed),
    "perplexity": Scorer("weigh", ("perplexity", "bits_per_byte"), weighed),
    "bits_per_byte": Scorer("weigh", ("bits_per_byte", "perplexity"), weighed),
    "exact_match": Scorer("write", ("exact_match",), text_scorers.exact_match, {"strict": False}, binary=True),
    "label_f1": Scorer("write", ("label_f1",), text_scorers.label, binary=True),
    "contains": Scorer(
        "write", ("contains",), text_scorers.contains, {"any": [], "all": [], **RENAMED}, reference=False, binary=True
    ),
    "regex": Scorer(
        "write", ("regex",), text_scorers.regex, {"pattern": "", "ignore_case": False, **RENAMED},
        reference=False, binary=True,
    ),
    "json_schema": Scorer(
        "write", ("json_schema",), text_scorers.json_schema, {"schema": {}, **RENAMED}, reference=False, binary=True
    ),
    "token_f1": Scorer("write", ("token_f1",), text_scorers.token_f1),
    "rouge": Scorer("write", ("rouge_l", "rouge_1", "rouge_2"), text_scorers.rouge, {"stemmer": False}),
    "bleu": Scorer("write", ("bleu",), text_scorers.bleu),
    "chrf": Scorer("write", ("chrf",), text_scorers.chrf),
    "python": Scorer(
        "write", ("python",), python_scorer.python, {"function": "", **RENAMED}, reference=False, needs="code"
    ),
    "judge": Scorer(
        "write", ("judge",), judge_scorer.judged, {**judge_scorer.OPTIONS, **RENAMED}, reference=False, needs="judge"
    ),
}  # fmt: skip


def uses_of(value: Any, where: str) -> tuple[Use, ...]:
    """The scorers in a task's `scorer`: a name, {name: options}, or a list of these; raises `ConfigError`."""
    entries = value if isinstance(value, list) else [value]
    told: list[tuple[str, Any]] = []
    for entry in entries:
        if isinstance(entry, str):
            told.append((entry, {}))
        elif isinstance(entry, Mapping) and entry:
            told += [(str(name), options or {}) for name, options in entry.items()]
        else:
            raise ConfigError(f"{where}: scorer is a name, name: options, or a list of these, got {entry!r}")
    if not told:
        raise ConfigError(f"{where}: scorer names nothing; known are {', '.join(SCORERS)}")
    uses = tuple(_use(named(name, SCORERS, f"{where}: scorer"), options, where) for name, options in told)
    metrics = [metric for use in uses for metric in use.metrics]
    twice = next((metric for metric in metrics if metrics.count(metric) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where}: two scorers give {twice}; leave one out, or give one another name (option name)")
    return uses


def _use(name: str, options: Any, where: str) -> Use:
    scorer, where = SCORERS[name], f"{where}: scorer {name}"
    if not isinstance(options, Mapping):
        raise ConfigError(f"{where}: options map names to values, got {options!r}")
    if options and not scorer.options:
        raise ConfigError(f"{where} has no options, got {', '.join(map(str, options))}")
    told = {named(str(key), scorer.options, f"{where}: option"): value for key, value in options.items()}
    for key, value in told.items():
        told[key] = _typed(value, scorer.options[key], f"{where}: {key}")
    merged = {**scorer.options, **told}
    for needed in ("pattern", "schema", "function", "url", "model"):
        if needed in merged and not merged[needed]:
            raise ConfigError(f"{where} needs {needed}; give it as {{{name}: {{{needed}: ...}}}}")
    metrics = (merged["name"],) if merged.get("name") else scorer.metrics
    return Use(scorer, merged, metrics)


def _typed(value: Any, default: Any, where: str) -> Any:
    if isinstance(default, list) and isinstance(value, str):
        return [value]
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise ConfigError(f"{where} must be {KINDS[type(default)]}, got {value!r}")
    return value


KINDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a mapping",
}


def reference_free(use: Use) -> bool:
    """Whether rows may go without a right answer; a pattern with a group, and `contains` by itself, compare with it."""
    if "any" in use.options:
        return bool(use.options["any"] or use.options["all"])
    if "pattern" in use.options:
        return not text_scorers.pattern_of(use.options).groups
    return not use.scorer.reference
