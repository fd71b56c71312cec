"""The result of an evaluation: scores with their standard errors, and every item behind them; as JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunetune.errors import HIDDEN, DataError
from prunetune.evaluation.item_subset import make_ids_unique
from prunetune.utils.json_lines import finite_or_none
from prunetune.utils.redaction import Redaction
from prunetune.utils.untrusted import parse_json, short_repr, shorten

FORMAT = "prunetune-evaluation-1"
MAX_PROMPT_CHARS = 2000  # characters of a prompt that the JSON keeps

HEADLINE_METRICS = ("accuracy", "rouge_l", "exact_match", "perplexity", "nll")
LOWER_IS_BETTER = frozenset({"perplexity", "nll", "kl", "bits_per_byte", "word_perplexity", "byte_perplexity"})


@dataclass(frozen=True)
class Score:
    """One number in natural units (accuracy and ROUGE 0..1, NLL in nats per token), over `n` items."""

    value: float
    se: float  # standard error; nan where n < 2
    n: int


@dataclass(frozen=True)
class Item:
    """One test item: the prompt, the right answer, the model's answer and its scores."""

    id: str
    prompt: str
    expected: str
    got: str  # the chosen choice or the generated answer; "" where nothing was generated
    correct: bool | None  # None where nothing was chosen or generated
    scores: dict[str, float]  # this item's share of the task's scores; texts and answers also carry "tokens"
    line: str = ""  # "file:line", its id where rows are hidden; not in the JSON

    def with_id(self, id: str) -> Item:
        """The item with another id."""
        return dataclasses.replace(self, id=id)

    def redacted(self, redaction: Redaction, numbers: Mapping[str, str] | None = None) -> Item:
        """The item as it may be shown; hidden answers are named by `numbers`, so that equal ones stay equal."""
        expected, got = ((numbers or {}).get(text) or redaction.text(text) for text in (self.expected, self.got))
        id = redaction.text(self.id) if redaction.samples else self.line or HIDDEN
        return dataclasses.replace(self, id=id, prompt=redaction.text(self.prompt), expected=expected, got=got)


@dataclass(frozen=True)
class TaskResult:
    """The scores of one task with its items."""

    task: str
    scores: dict[str, Score]
    items: tuple[Item, ...]
    error: str = ""  # why there are no scores
    general: bool = False  # of data.general: reported, but in no mean over tasks

    def redacted(self, redaction: Redaction) -> TaskResult:
        """The result as it may be shown: hidden answers become their number among the task's right ones."""
        right = [] if redaction.samples else sorted({item.expected for item in self.items} - {""})
        numbers = {text: text if is_hidden(text) else f"{HIDDEN} answer {n}" for n, text in enumerate(right, 1)}
        items = [item.redacted(redaction, numbers) for item in self.items]
        ids = make_ids_unique([item.id for item in items])
        return dataclasses.replace(self, items=tuple(map(Item.with_id, items, ids)))


@dataclass(frozen=True)
class Evaluation:
    """Task name -> result."""

    tasks: dict[str, TaskResult]

    def mean(self, metric: str) -> Score:
        """The mean over the domain's tasks that have `metric`, weighing the same; nan over none. `n` counts tasks."""
        results = [result for result in self.tasks.values() if not result.general]
        scores = [result.scores[metric] for result in results if metric in result.scores]
        if not scores:
            return Score(math.nan, math.nan, 0)
        value = math.fsum(score.value for score in scores) / len(scores)
        return Score(value, math.hypot(*(score.se for score in scores)) / len(scores), len(scores))

    def mean_accuracy(self) -> float:
        """Mean accuracy over the tasks that have choices; nan where none has."""
        return self.mean("accuracy").value

    def mean_nll(self) -> float:
        """Mean NLL per answer token over the tasks that have answers; nan where none has."""
        return self.mean("nll").value

    def counts_ends(self) -> bool:
        """Whether NLL and perplexity count the end of answers and texts as a token, as the runs of 0.1.0 did."""
        items = [item.scores for result in self.tasks.values() for item in result.items]
        return any("nll" in scores and "bytes" not in scores for scores in items)

    def redacted(self, redaction: Redaction) -> Evaluation:
        """The evaluation as it may be written."""
        return Evaluation({name: result.redacted(redaction) for name, result in self.tasks.items()})

    def by_line(self) -> Evaluation:
        """The evaluation with lines as ids, as one whose rows are hidden has them."""
        lines = {
            name: tuple(item.with_id(item.line or item.id) for item in it.items) for name, it in self.tasks.items()
        }
        return Evaluation({name: dataclasses.replace(it, items=lines[name]) for name, it in self.tasks.items()})

    @property
    def is_hidden(self) -> bool:
        """Whether texts of items are hidden."""
        return any(is_hidden(item.prompt) for result in self.tasks.values() for item in result.items)

    def to_json(self) -> str:
        """The evaluation as JSON text, stable to the byte: nan and inf become null, long prompts lose their end."""
        tasks: dict[str, dict[str, Any]] = {}
        for name, result in self.tasks.items():
            scores = result.scores.items()
            tasks[name] = {
                "scores": {key: dataclasses.asdict(it) for key, it in scores},
                "items": [
                    {key: value for key, value in dataclasses.asdict(item).items() if key != "line"}
                    | {"prompt": item.prompt[:MAX_PROMPT_CHARS]}
                    for item in result.items
                ],
            }
            tasks[name] |= {"error": result.error} if result.error else {}
            tasks[name] |= {"general": True} if result.general else {}
        values = finite_or_none({"format": FORMAT, "tasks": tasks})
        return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Read what `to_json` wrote (null becomes nan); raises `DataError` on anything else."""
        try:
            data: Any = parse_json(text)
            if data["format"] != FORMAT:
                raise DataError(f"evaluation has format {short_repr(data['format'])}; this version reads {FORMAT!r}")
            return cls({name: _result(name, result) for name, result in data["tasks"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as broken:
            raise DataError(
                f"not an evaluation: {shorten(repr(broken))}; expected what `prunetune eval` writes"
            ) from broken


def is_hidden(text: str) -> bool:
    """Whether the text stands in place of one that is not shown."""
    return re.fullmatch(rf"{re.escape(HIDDEN)}( answer \d+)?", text) is not None


def common_items(mine: TaskResult, theirs: TaskResult) -> list[tuple[Item, Item]]:
    """The items of the same id in both results."""
    others = {item.id: item for item in theirs.items}
    return [(item, others[item.id]) for item in mine.items if item.id in others]


def headline_metric(result: TaskResult) -> str:
    """The metric that stands for a task: one of `HEADLINE_METRICS`, else its first; "" where it has none."""
    return next((metric for metric in (*HEADLINE_METRICS, *result.scores) if metric in result.scores), "")


def higher_is_better(metric: str) -> bool:
    """False for perplexity, NLL and bits per byte."""
    return metric not in LOWER_IS_BETTER


def recovery(pruned: Score, dense: Score, metric: str) -> float:
    """Share of the dense score that is kept, 1 = all; inverted where lower is better; nan over zero."""
    above, below = (pruned.value, dense.value) if higher_is_better(metric) else (dense.value, pruned.value)
    return above / below if below else math.nan


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _result(task: str, data: Mapping[str, Any]) -> TaskResult:
    scores = {
        metric: Score(_number(score["value"]), _number(score["se"]), int(score["n"]))
        for metric, score in data["scores"].items()
    }
    items = tuple(
        Item(
            str(item["id"]),
            str(item["prompt"]),
            str(item["expected"]),
            str(item["got"]),
            item["correct"],
            {metric: _number(value) for metric, value in item["scores"].items()},
            line=str(item["id"]) if is_hidden(str(item["prompt"])) else "",
        )
        for item in data["items"]
    )
    return TaskResult(task, scores, items, str(data.get("error", "")), bool(data.get("general")))
