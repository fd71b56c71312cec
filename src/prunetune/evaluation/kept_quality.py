"""What a model keeps of a reference's quality, and its own, each score with the benefit of one standard error."""

import math
from collections.abc import Sequence

from prunetune.errors import ConfigError
from prunetune.evaluation.results import Evaluation, Score, higher_is_better
from prunetune.evaluation.statistics import paired_difference

MEAN_LOSS = "nll"  # over all tasks with answers, weighing the same


def kept_quality(evaluation: Evaluation, reference: Evaluation, names: Sequence[str] = ()) -> dict[str, float]:
    """Share of the reference's score that is kept, 1 = all, of the mean loss and of each task's accuracy or else loss.

    Keys are "nll" and such as "triage.accuracy"; `names` are other keys, or tasks. A score below the reference's first
    moves towards it by the standard error of their paired difference. Shares of a loss are the reference's divided by
    the model's. Raises `ConfigError` for a name that is no such score, and where there is none at all.
    """
    shares: dict[str, float] = {}
    own: dict[str, str] = {}  # of each task, the key of the score that stands for it
    losses: list[Score] = []
    for task, result in evaluation.tasks.items():
        theirs = reference.tasks[task]
        for metric in ("accuracy", "nll"):
            if metric in result.scores:
                found = paired_difference(result, theirs, metric)
                shares[f"{task}.{metric}"] = _share(theirs.scores[metric].value, found, metric)
                own.setdefault(task, f"{task}.{metric}")
                losses += [found] if metric == "nll" else []
    if losses:
        error = math.hypot(*(loss.se for loss in losses)) / len(losses)
        mean = Score(math.fsum(loss.value for loss in losses) / len(losses), error, len(losses))
        shares[MEAN_LOSS] = _share(reference.mean_nll(), mean, "nll")
    wanted = [own.get(name, name) for name in names] or [*own.values(), *([MEAN_LOSS] if losses else [])]
    unknown = [name for name in wanted if name not in shares]
    if unknown or not wanted:
        known = ", ".join((*shares, *own)) or "nothing: it has no row with an answer"
        raise ConfigError(f"budget.quality_of: {', '.join(unknown) or 'a score'} is wanted, and valid scores {known}")
    return {name: shares[name] for name in wanted}


def absolute_quality(evaluation: Evaluation, names: Sequence[str]) -> dict[str, float]:
    """The scores of these names, each better than measured by its standard error.

    Names: "accuracy" and "nll", the means over tasks, and such as "triage.accuracy". Raises `ConfigError` for any else.
    """
    means = {metric: evaluation.mean(metric) for metric in ("accuracy", MEAN_LOSS)}
    scores = {metric: mean for metric, mean in means.items() if mean.n}
    for task, result in evaluation.tasks.items():
        scores |= {f"{task}.{metric}": score for metric, score in result.scores.items()}
    if unknown := [name for name in names if name not in scores]:
        known = ", ".join(scores) or "nothing: it has no row with an answer"
        raise ConfigError(f"budget.quality_limits: {', '.join(unknown)} is limited, and valid scores {known}")
    errors = {name: scores[name].se if math.isfinite(scores[name].se) else 0.0 for name in names}
    signs = {name: 1 if higher_is_better(name.rpartition(".")[2]) else -1 for name in names}
    return {name: scores[name].value + signs[name] * errors[name] for name in names}


def _share(reference: float, difference: Score, metric: str) -> float:
    """The share of a reference's score that is kept by one that differs; nan over zero."""
    sign = 1 if higher_is_better(metric) else -1
    gain = sign * difference.value
    if gain < 0 and math.isfinite(difference.se):
        gain = min(0.0, gain + difference.se)
    kept = reference + sign * gain
    above, below = (kept, reference) if sign > 0 else (reference, kept)
    return above / below if below else math.nan
