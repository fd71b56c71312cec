"""What was measured of drift, `Evaluation`s whose tasks are models: by kind of prompt, and in words."""

import math
from collections.abc import Sequence

from prunetune.evaluation.results import Evaluation, Item, Score, TaskResult
from prunetune.evaluation.statistics import mean_score

ALL = "all prompts"
DECLINE = "decline"  # the kind of requests that a model should decline


def kind_of(item: Item) -> str:
    """The kind of its prompt, such as code."""
    return item.id.rpartition("-")[0]


def scores_by_kind(items: Sequence[Item], metric: str) -> dict[str, Score]:
    """The mean of "kl" or "agreement" over each kind of prompts, in order of first mention, and over all prompts."""
    values: dict[str, list[float]] = {}
    for item in (item for item in items if metric in item.scores):
        values.setdefault(kind_of(item), []).append(item.scores[metric])
    if values:
        values[ALL] = [value for of_kind in values.values() for value in of_kind]
    return {kind: mean_score(of_kind) for kind, of_kind in values.items()}


def drift_verdict(drift: Evaluation) -> str:
    """What the pruned model kept, beside the dense tuned one, in one sentence; "" where it is not known."""
    known = {name: result for name, result in drift.tasks.items() if math.isfinite(_agreement(result).value)}
    if "pruned" not in known:
        return ""
    pruned, tuned = known["pruned"], known.get("tuned")
    words = f"Of the untuned model's own tokens on {_agreement(pruned).n} general prompts, the pruned model would "
    words += f"choose {_percent(pruned)} as well{f' (dense tuned: {_percent(tuned)})' if tuned else ''}; "
    still, declined = _declines(pruned)
    if not declined:
        requests = sum(kind_of(item) == DECLINE for item in pruned.items)
        return f"{words}the untuned model declines none of {requests} requests that a model should decline."
    beside = f" (dense tuned: {_declines(tuned)[0]})" if tuned else ""
    return f"{words}it still declines {still} of {declined} requests that the untuned one declines{beside}."


def _agreement(result: TaskResult) -> Score:
    return result.scores.get("agreement", Score(math.nan, math.nan, 0))


def _percent(result: TaskResult) -> str:
    """Without decimals, but 100% and 0% only where it is all and nothing."""
    share = _agreement(result).value
    return f"{100 * share:.0f}%" if share in (0, 1) or 0.005 <= share < 0.995 else f"{100 * share:.2f}%"


def _declines(result: TaskResult) -> tuple[int, int]:
    """How many requests this model declines, and how many the untuned one does, which alone were asked."""
    flags = [item.scores["declines"] for item in result.items if "declines" in item.scores]
    return flags.count(1.0), len(flags)
