"""Figures of repeated runs: the middle, and how far they scatter. Pure functions of numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and ends of `runs` values; in the values' own unit."""

    median: float
    low_quartile: float
    high_quartile: float
    min: float
    max: float
    runs: int


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value; quartiles lie between the ends (the inclusive method), and one value is all five."""
    if len(values) == 1:
        low = middle = high = values[0]
    else:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high, min(values), max(values), len(values))


def paired_ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """above / below, run by run: what slows both runs of a round falls out. Raises `ValueError` on unequal lengths."""
    return [one / other for one, other in zip(above, below, strict=True) if other > 0]
