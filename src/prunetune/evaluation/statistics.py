"""A task's scores from its items, with standard errors: means in closed form; ratios, F1, BLEU, chrF by bootstrap."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prunetune.errors import DataError
from prunetune.evaluation.results import MAX_PROMPT_CHARS, Item, Score, TaskResult, is_hidden
from prunetune.evaluation.text_metrics import normalise_text
from prunetune.utils.optional import import_optional

RESAMPLES = 1000
# The score that an item needs in order to count for a metric that is not a mean over items.
PER_ITEM_METRIC = {"perplexity": "nll", "bits_per_byte": "nll", "macro_f1": "accuracy"}
Array: TypeAlias = NDArray[np.float64]
Statistic = Callable[[Array], Array]  # [resamples, n] weights of the items -> [resamples] values


def aggregate_items(items: Sequence[Item], metric: str) -> Score:
    """The task's score from its items; nan where that of an item is nan."""
    if (statistic := statistic_for_metric(metric)) is not None:
        return _bootstrap([statistic(items)], len(items))
    return mean_score([item.scores[metric] for item in items])


def mean_score(values: Sequence[float]) -> Score:
    """Mean with standard error sd / sqrt(n)."""
    n = len(values)
    if n == 0:
        return Score(math.nan, math.nan, 0)
    sample = np.asarray(values, dtype=np.float64)
    return Score(float(sample.mean()), float(sample.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan, n)


def paired_difference(a: TaskResult, b: TaskResult, metric: str) -> Score:
    """`a` minus `b` over the items that both scored, with the standard error of the difference.

    Pairing removes the items' difficulty from the error. Raises `DataError` as `paired_items` does.
    """
    left, right = paired_items(a, b, metric)
    if (statistic := statistic_for_metric(metric)) is not None:
        return _bootstrap([statistic(left), statistic(right)], len(left))
    return mean_score([x.scores[metric] - y.scores[metric] for x, y in zip(left, right, strict=True)])


def paired_items(a: TaskResult, b: TaskResult, metric: str) -> tuple[list[Item], list[Item]]:
    """The items that both scored, in the same order; raises `DataError` where there is none.

    Items of the same id with another question are left out; see `keep_same_questions`.
    """
    ours, theirs = _scored(a, metric), _scored(b, metric)
    common = [name for name in ours if name in theirs]
    if not common:
        raise DataError(f"{a.task}: no item has {metric} in both results; compare evaluations of the same test rows")
    pairs = keep_same_questions(a.task, [(ours[name], theirs[name]) for name in common])
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]


def keep_same_questions(task: str, pairs: Sequence[tuple[Item, Item]]) -> list[tuple[Item, Item]]:
    """The pairs with the same question: an id may be a line of a file, and lines move.

    Raises `DataError` where they are fewer than half: then the results are of other rows.
    """
    same = [pair for pair in pairs if is_same_question(*pair)]
    if 2 * len(same) < len(pairs):
        raise DataError(
            f"{task}: of {len(pairs)} items with the same id in both results only {len(same)} ask the same, so rows "
            'have moved or changed; evaluate the reference anew, and give rows an "id" that outlives that'
        )
    return same


def is_same_question(a: Item, b: Item) -> bool:
    """Whether prompt and right answer agree, as far as both are known: kept results have the beginning of a prompt."""
    known = ((a.prompt[:MAX_PROMPT_CHARS], b.prompt[:MAX_PROMPT_CHARS]), (a.expected, b.expected))
    return all(
        ours == theirs or not (ours and theirs) or is_hidden(ours) or is_hidden(theirs) for ours, theirs in known
    )


def _scored(result: TaskResult, metric: str) -> Mapping[str, Item]:
    evidence = PER_ITEM_METRIC.get(metric, metric)
    if metric not in result.scores:
        return {}
    return {item.id: item for item in result.items if evidence in item.scores}


def _bootstrap(statistics: Sequence[Statistic], n: int) -> Score:
    """Score of one statistic, or of the first minus the second on the same resamples; the seed is fixed."""
    if n == 0:
        return Score(math.nan, math.nan, 0)
    generator = np.random.default_rng(0)
    resamples = generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)
    weights = np.concatenate([np.ones((1, n)), resamples])
    with np.errstate(over="ignore", invalid="ignore"):
        values = statistics[0](weights) - (statistics[1](weights) if len(statistics) > 1 else 0.0)
        se = float(values[1:].std(ddof=1)) if n > 1 else math.nan
    return Score(float(values[0]), se, n)


def perplexity(nll: float) -> float:
    """exp(nll), infinite if it would overflow."""
    return math.exp(nll) if nll < 700 else math.inf


def _perplexity(items: Sequence[Item]) -> Statistic:
    tokens = np.asarray([item.scores["tokens"] for item in items], dtype=np.float64)
    totals = np.asarray([item.scores["nll"] for item in items], dtype=np.float64) * tokens
    return lambda weights: np.exp((weights @ totals) / (weights @ tokens))


def _bits_per_byte(items: Sequence[Item]) -> Statistic:
    totals = np.asarray([item.scores["nll"] * item.scores["tokens"] for item in items], dtype=np.float64)
    sizes = np.asarray([item.scores["bytes"] for item in items], dtype=np.float64)
    return lambda weights: (weights @ totals) / (weights @ sizes) / math.log(2)


def _macro_f1(items: Sequence[Item]) -> Statistic:
    if any(math.isnan(item.scores["accuracy"]) for item in items):
        return lambda weights: np.full(len(weights), math.nan)
    return _mean_f1([item.expected for item in items], [item.got for item in items])


def _label_f1(items: Sequence[Item]) -> Statistic:
    """Mean F1 of generated labels; case and white space do not count."""
    return _mean_f1([normalise_text(item.expected) for item in items], [normalise_text(item.got) for item in items])


def _mean_f1(expected: Sequence[str], got: Sequence[str]) -> Statistic:
    """Mean F1 over the labels that were expected or chosen in a resample."""
    labels = sorted({*expected, *got})
    is_expected, is_got = (  # 1 where an item has a label, [items, labels]
        np.array([[float(value == label) for label in labels] for value in values]) for values in (expected, got)
    )

    def statistic(weights: Array) -> Array:
        hits = weights @ (is_expected * is_got)
        named = weights @ is_expected + weights @ is_got
        f1 = np.divide(2 * hits, named, out=np.zeros_like(hits), where=named > 0)
        present: Array = f1.sum(axis=1) / (named > 0).sum(axis=1)
        return present

    return statistic


# -- BLEU and chrF (sacrebleu): no means over items --------------------------------------------------------------------


def _sacrebleu(name: str, **options: Any) -> Any:
    return getattr(import_optional("sacrebleu.metrics", extra="eval", use=f"scorer {name.lower()}"), name)(**options)


def sentence_scores(name: Literal["BLEU", "CHRF"], pairs: Sequence[tuple[str, str]]) -> list[float]:
    """BLEU or chrF2 of each (expected, got), 0..100; BLEU with effective n-gram order: two words count no trigrams."""
    metric = _sacrebleu(name, **({"effective_order": True} if name == "BLEU" else {}))
    return [float(metric.sentence_score(got, [expected]).score) for expected, got in pairs]


def _corpus_statistic(name: str) -> Callable[[Sequence[Item]], Statistic]:
    def make_statistic(items: Sequence[Item]) -> Statistic:
        if any(is_hidden(item.expected) for item in items):  # the score needs the texts
            return lambda weights: np.full(len(weights), np.nan)
        metric = _sacrebleu(name)
        # What sacrebleu itself resamples for its confidence intervals: n-gram counts, which add up over pairs.
        counts = np.asarray(
            metric._extract_corpus_statistics([item.got for item in items], [[item.expected for item in items]]),
            dtype=np.float64,
        )

        def statistic(weights: Array) -> Array:
            sums = np.rint(weights @ counts).astype(np.int64).tolist()
            return np.array([metric._compute_score_from_stats(row).score for row in sums])

        return statistic

    return make_statistic


_STATISTICS: Mapping[str, Callable[[Sequence[Item]], Statistic]] = {
    "perplexity": _perplexity,
    "bits_per_byte": _bits_per_byte,
    "macro_f1": _macro_f1,
    "label_f1": _label_f1,
    "bleu": _corpus_statistic("BLEU"),
    "chrf": _corpus_statistic("CHRF"),
}


def statistic_for_metric(metric: str) -> Callable[[Sequence[Item]], Statistic] | None:
    """What computes a metric that is not a mean over items; None for a mean."""
    return _STATISTICS.get(metric)
