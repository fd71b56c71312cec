"""BLEU and chrF (sacrebleu) of a pair, of a whole corpus and of its bootstrap resamples: no means over items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from prunetune.evaluation.results import Item, is_hidden
from prunetune.evaluation.statistics import Array, Statistic
from prunetune.utils.optional import import_optional


def _metric(name: str, **options: Any) -> Any:
    return getattr(import_optional("sacrebleu.metrics", extra="eval", use=f"scorer {name.lower()}"), name)(**options)


def sentence_bleu(expected: Sequence[str], got: Sequence[str]) -> list[float]:
    """BLEU of each pair, 0..100, with effective n-gram order: a text of two words counts no trigrams."""
    bleu = _metric("BLEU", effective_order=True)
    return [float(bleu.sentence_score(text, [wanted]).score) for wanted, text in zip(expected, got, strict=True)]


def sentence_chrf(expected: Sequence[str], got: Sequence[str]) -> list[float]:
    """chrF2 of each pair, 0..100."""
    chrf = _metric("CHRF")
    return [float(chrf.sentence_score(text, [wanted]).score) for wanted, text in zip(expected, got, strict=True)]


def _statistic(name: str) -> Callable[[Sequence[Item]], Statistic]:
    def make_statistic(items: Sequence[Item]) -> Statistic:
        if any(is_hidden(item.expected) for item in items):  # the score needs the texts
            return lambda weights: np.full(len(weights), np.nan)
        metric = _metric(name)
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


corpus_bleu = _statistic("BLEU")
corpus_chrf = _statistic("CHRF")
