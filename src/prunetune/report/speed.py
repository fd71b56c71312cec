"""How many times the dense model's speed a pruned model has, told with how far its runs scatter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prunetune.report import formatting
from prunetune.report.run_folder import get_number


@dataclass(frozen=True)
class SpeedRatio:
    """Pruned over dense."""

    ratio: float
    spread: str = ""  # in words; "" where it was not kept
    is_significant: bool = True  # noise alone would not turn it

    def __str__(self) -> str:
        return f"{formatting.ratio(self.ratio)} ({self.spread})" if self.spread else formatting.ratio(self.ratio)


def interleaved_ratio(manifest: Mapping[str, Any], kind: str) -> SpeedRatio | None:
    """Of "throughput", "decode" or "prefill", run by run, where the models took turns: "1.28× (1.25 to 1.32)"."""
    middle, low, high = (get_number(manifest, "gain", "speed", kind, end) for end in ("median", "min", "max"))
    if middle is None:
        return None
    return SpeedRatio(middle, "" if low is None or high is None else f"{low:.2f} to {high:.2f}")


def separate_ratio(manifest: Mapping[str, Any], kind: str) -> SpeedRatio | None:
    """Of "decode" or "prefill", each model measured alone: "1.28× (runs differ by 4%)".

    Not clear where the two models differ less than the runs of one.
    """
    dense, pruned = _both(manifest, "speed", f"{kind}_tokens_per_s")
    if not dense or not pruned:
        return None
    spreads = [spread for spread in _both(manifest, "speed", f"{kind}_spread") if spread is not None]
    ratio, noise = pruned / dense, max(spreads, default=0.0)
    return SpeedRatio(
        ratio, f"runs differ by {formatting.share(noise)}" if spreads else "", noise <= max(ratio, 1 / ratio) - 1
    )


def speed_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, dense, pruned, ratio) of latency and memory."""
    decode, prefill = (_both(manifest, "speed", kind) for kind in ("decode_tokens_per_s", "prefill_tokens_per_s"))
    waits = tuple(1000 / speed if speed else None for speed in decode)
    weights = tuple(get_number(manifest, model, "bytes") for model in ("model", "pruned"))
    params = tuple(get_number(manifest, model, "params") for model in ("model", "pruned"))
    rows: list[tuple[str, tuple[float | None, ...], Callable[[float | None], str], SpeedRatio | None]] = [
        ("Decode, tokens a second", decode, formatting.count, separate_ratio(manifest, "decode")),
        ("Decode, ms a token", waits, formatting.decimal, None),
        ("Prefill, tokens a second", prefill, formatting.count, separate_ratio(manifest, "prefill")),
        ("Weights", weights, formatting.size, None),
        ("Parameters", params, formatting.short, None),
    ]
    return [
        (name, shown(dense), shown(pruned), str(times or SpeedRatio(pruned / dense)))
        for name, (dense, pruned), shown, times in rows
        if dense and pruned
    ]


def _both(manifest: Mapping[str, Any], section: str, key: str) -> tuple[float | None, ...]:
    return tuple(get_number(manifest, section, model, key) for model in ("dense", "pruned"))
