"""Speed of the pruned model over the dense one's, both measured in turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prunetune.manifest import Manifest
from prunetune.report import formatting


@dataclass(frozen=True)
class SpeedRatio:
    """How many times faster the pruned model is: the median of the rounds, and the range of all where it was kept."""

    median: float
    lowest: float | None = None
    highest: float | None = None

    @property
    def is_significant(self) -> bool:
        """Whether all rounds agree on which model is faster."""
        return self.lowest is None or self.highest is None or not self.lowest <= 1 <= self.highest

    def __str__(self) -> str:
        is_known = self.lowest is not None and self.highest is not None
        spread = f" ({self.lowest:.2f} to {self.highest:.2f})" if is_known else ""
        return f"{formatting.ratio(self.median)}{spread}"


def speed_ratio(manifest: Manifest, kind: str) -> SpeedRatio | None:
    """Ratio of "throughput", "decode" or "prefill", run by run, both models in turns: "1.28× (1.25 to 1.32)"."""
    speedup = manifest.gain.speedups.get(kind)
    return None if speedup is None or speedup.median is None else SpeedRatio(speedup.median, speedup.min, speedup.max)


def speed_rows(manifest: Manifest) -> list[tuple[str, str, str, str]]:
    """(what, dense, pruned, ratio) of latency and memory; above 1 the pruned model is better, in every row."""
    dense, pruned, measured = manifest.model, manifest.pruned, manifest.gain.figures
    rows: list[tuple[str, float | None, float | None, Callable[[float | None], str], SpeedRatio | None]] = [
        (name, measured[kind].dense, measured[kind].pruned, formatted, speed_ratio(manifest, kind))
        for name, kind, formatted in (
            ("Tokens a second", "throughput", formatting.decimal),
            ("Prefill", "prefill", formatting.milliseconds),
            ("Decode, a token", "decode", formatting.milliseconds),
        )
        if kind in measured
    ]
    rows += [
        ("Weights", dense.bytes, pruned.bytes, formatting.size, None),
        ("Parameters", dense.params, pruned.params, formatting.short, None),
    ]
    return [
        (name, formatted(before), formatted(after), str(ratio or SpeedRatio(before / after)))
        for name, before, after, formatted, ratio in rows
        if before and after
    ]
