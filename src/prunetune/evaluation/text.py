"""How near one text is to another, and what makes two equal."""

from __future__ import annotations

from collections.abc import Sequence


def normalised(text: str) -> str:
    """Case folded, white space collapsed."""
    return " ".join(text.casefold().split())


def exact_match(expected: str, got: str) -> bool:
    """Equal but for case and white space."""
    return normalised(expected) == normalised(got)


def rouge_l(expected: Sequence[str], got: Sequence[str]) -> list[float]:
    """ROUGE-L F1 of each pair in 0..1 (rouge_score, no stemmer): it sees only a-z and 0-9."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return [float(scorer.score(want, have)["rougeL"].fmeasure) for want, have in zip(expected, got, strict=True)]
