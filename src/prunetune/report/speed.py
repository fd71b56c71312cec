"""How many times the dense model's speed a pruned model has, told with how far its runs scatter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prunetune.report import text
from prunetune.report.run_folder import number


@dataclass(frozen=True)
class Times:
    """Pruned over dense."""

    ratio: float
    spread: str = ""  # in words; "" where it was not kept
    clear: bool = True  # noise alone would not turn it

    def __str__(self) -> str:
        return f"{text.ratio(self.ratio)} ({self.spread})" if self.spread else text.ratio(self.ratio)


def in_turns(manifest: Mapping[str, Any], kind: str) -> Times | None:
    """Of "throughput", "decode" or "prefill", run by run, where the models took turns: "1.28× (1.25 to 1.32)"."""
    middle, low, high = (number(manifest, "gain", "speed", kind, end) for end in ("median", "min", "max"))
    if middle is None:
        return None
    return Times(middle, "" if low is None or high is None else f"{low:.2f} to {high:.2f}")


def one_by_one(manifest: Mapping[str, Any], kind: str) -> Times | None:
    """Of "decode" or "prefill", each model measured alone: "1.28× (runs differ by 4%)".

    Not clear where the two models differ less than the runs of one.
    """
    dense, pruned = _both(manifest, "speed", f"{kind}_tokens_per_s")
    if not dense or not pruned:
        return None
    spreads = [spread for spread in _both(manifest, "speed", f"{kind}_spread") if spread is not None]
    ratio, noise = pruned / dense, max(spreads, default=0.0)
    return Times(ratio, f"runs differ by {text.share(noise)}" if spreads else "", noise <= max(ratio, 1 / ratio) - 1)


def speeds(manifest: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, dense, pruned, ratio) of latency and memory."""
    decode, prefill = (_both(manifest, "speed", kind) for kind in ("decode_tokens_per_s", "prefill_tokens_per_s"))
    waits = tuple(1000 / speed if speed else None for speed in decode)
    weights = tuple(number(manifest, model, "bytes") for model in ("model", "pruned"))
    params = tuple(number(manifest, model, "params") for model in ("model", "pruned"))
    rows: list[tuple[str, tuple[float | None, ...], Callable[[float | None], str], Times | None]] = [
        ("Decode, tokens a second", decode, text.count, one_by_one(manifest, "decode")),
        ("Decode, ms a token", waits, text.decimal, None),
        ("Prefill, tokens a second", prefill, text.count, one_by_one(manifest, "prefill")),
        ("Weights", weights, text.size, None),
        ("Parameters", params, text.short, None),
    ]
    return [
        (name, shown(dense), shown(pruned), str(times or Times(pruned / dense)))
        for name, (dense, pruned), shown, times in rows
        if dense and pruned
    ]


def _both(manifest: Mapping[str, Any], section: str, key: str) -> tuple[float | None, ...]:
    return tuple(number(manifest, section, model, key) for model in ("dense", "pruned"))
