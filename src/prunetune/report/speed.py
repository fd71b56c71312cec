"""Speed of the pruned model over the dense one's, with the spread of the runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prunetune.manifest import Manifest
from prunetune.report import formatting


@dataclass(frozen=True)
class SpeedRatio:
    """Pruned over dense."""

    ratio: float
    spread: str = ""  # in words; "" where it was not kept
    is_significant: bool = True  # noise alone would not turn it

    def __str__(self) -> str:
        return f"{formatting.ratio(self.ratio)} ({self.spread})" if self.spread else formatting.ratio(self.ratio)


def interleaved_ratio(manifest: Manifest, kind: str) -> SpeedRatio | None:
    """Ratio of "throughput", "decode" or "prefill", run by run, both models in turns: "1.28× (1.25 to 1.32)"."""
    speedup = manifest.gain.speedups.get(kind)
    if speedup is None or speedup.median is None:
        return None
    is_spread_known = speedup.min is not None and speedup.max is not None
    return SpeedRatio(speedup.median, f"{speedup.min:.2f} to {speedup.max:.2f}" if is_spread_known else "")


def separate_ratio(manifest: Manifest, kind: str) -> SpeedRatio | None:
    """Ratio of "decode" or "prefill", each model measured alone: "1.28× (runs differ by 4%)".

    Not significant where the two models differ less than the runs of one.
    """
    models = (manifest.speed.dense, manifest.speed.pruned)
    dense, pruned = (model.tokens_per_s(kind) for model in models)
    if not dense or not pruned:
        return None
    spreads = [spread for model in models if (spread := model.spread(kind)) is not None]
    ratio, noise = pruned / dense, max(spreads, default=0.0)
    words = f"runs differ by {formatting.share(noise)}" if spreads else ""
    return SpeedRatio(ratio, words, is_significant=noise <= max(ratio, 1 / ratio) - 1)


def speed_rows(manifest: Manifest) -> list[tuple[str, str, str, str]]:
    """(what, dense, pruned, ratio) of latency and memory; above 1 the pruned model is better, in every row."""
    dense, pruned, speed = manifest.model, manifest.pruned, manifest.speed
    decode, prefill = (
        tuple(model.tokens_per_s(kind) for model in (speed.dense, speed.pruned)) for kind in ("decode", "prefill")
    )
    token_ms = tuple(1000 / per_second if per_second else None for per_second in decode)
    rows: list[tuple[str, tuple[float | None, ...], Callable[[float | None], str], SpeedRatio | None]] = [
        ("Decode, tokens a second", decode, formatting.count, separate_ratio(manifest, "decode")),
        ("Decode, ms a token", token_ms, formatting.decimal, None),
        ("Prefill, tokens a second", prefill, formatting.count, separate_ratio(manifest, "prefill")),
        ("Weights", (dense.bytes, pruned.bytes), formatting.size, None),
        ("Parameters", (dense.params, pruned.params), formatting.short, None),
    ]
    return [
        (name, formatted(before), formatted(after), str(ratio or SpeedRatio(before / after)))
        for name, (before, after), formatted, ratio in rows
        if before and after
    ]
