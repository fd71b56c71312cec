"""What a model keeps of a reference's quality: computed by hand."""

from __future__ import annotations

import pytest

from prunetune.errors import ConfigError
from prunetune.evaluation.kept_quality import absolute_quality, kept_quality
from prunetune.evaluation.results import Evaluation, Item, Score, TaskResult
from prunetune.evaluation.statistics import aggregate_items


def task(name: str, **scores: list[float]) -> TaskResult:
    rows = [dict(zip(scores, values, strict=True)) for values in zip(*scores.values(), strict=True)]
    items = tuple(Item(f"{name}-{index}", f"{name} {index}", "", "", None, row) for index, row in enumerate(rows))
    return TaskResult(name, {metric: aggregate_items(items, metric) for metric in scores}, items)


def evaluation(*tasks: TaskResult) -> Evaluation:
    return Evaluation({one.task: one for one in tasks})


def test_each_score_keeps_its_share_with_the_benefit_of_one_standard_error() -> None:
    dense = evaluation(task("triage", accuracy=[1, 1, 1, 0], nll=[1, 1, 1, 1]), task("open", nll=[2.0, 2.0, 2.0, 2.0]))
    pruned = evaluation(task("triage", accuracy=[1, 1, 0, 0], nll=[1, 1, 1, 1]), task("open", nll=[2.0, 2.5, 2.5, 3.0]))
    # Accuracy: -.25 with a standard error of .25 over four items: all of it may be chance. Loss of `open`: + .5 with
    # sqrt(.5 / 3) / 2 = .2041. The mean loss of the two tasks: + .25 with .1021.
    assert kept_quality(pruned, dense) == {
        "triage.accuracy": pytest.approx(1.0),
        "open.nll": pytest.approx(2 / (2 + 0.5 - 0.20412), abs=1e-4),
        "nll": pytest.approx(1.5 / (1.5 + 0.25 - 0.10206), abs=1e-4),
    }


def test_better_scores_count_as_they_are() -> None:
    dense, pruned = evaluation(task("t", nll=[2.0, 4.0])), evaluation(task("t", nll=[1.0, 3.0]))
    assert kept_quality(pruned, dense) == {"t.nll": 3 / 2, "nll": 3 / 2}


def test_names_select_tasks_metrics_of_tasks_and_the_mean_loss() -> None:
    both = evaluation(task("a", accuracy=[1.0, 0.0], nll=[1.0, 1.0]), task("b", nll=[1.0, 1.0]))
    assert list(kept_quality(both, both, ["b", "a.nll", "nll"])) == ["b.nll", "a.nll", "nll"]
    assert list(kept_quality(both, both, ["a"])) == ["a.accuracy"]
    with pytest.raises(ConfigError, match=r"budget\.quality_of: c is wanted, and valid scores a\.accuracy, a\.nll"):
        kept_quality(both, both, ["c"])


def test_valid_without_an_answer_is_refused() -> None:
    texts = evaluation(TaskResult("texts", {"perplexity": Score(9.0, 1.0, 2)}, ()))
    with pytest.raises(ConfigError, match="it has no row with an answer"):
        kept_quality(texts, texts)


def test_absolute_scores_have_the_benefit_of_one_standard_error() -> None:
    both = evaluation(task("a", accuracy=[1.0, 0.0, 1.0, 0.0], nll=[1.0, 1.0, 1.0, 1.0]), task("b", nll=[1.0, 3.0]))
    error = 0.5 / 3**0.5  # of four halves
    assert absolute_quality(both, ["accuracy", "a.accuracy", "a.nll", "b.nll", "nll"]) == pytest.approx(
        {"accuracy": 0.5 + error, "a.accuracy": 0.5 + error, "a.nll": 1.0, "b.nll": 1.0, "nll": 1.5 - 0.5}
    )
    with pytest.raises(ConfigError, match=r"budget\.quality_limits: b\.accuracy is limited, and valid scores accuracy"):
        absolute_quality(both, ["b.accuracy"])
