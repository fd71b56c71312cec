"""Speed of the pruned model over the dense one's, both measured in turns."""

from collections.abc import Callable

from prunetune.manifest import Manifest, SpeedupFacts
from prunetune.report import formatting


def speedup(manifest: Manifest, kind: str) -> SpeedupFacts | None:
    """Of "throughput", "decode" or "prefill"; None where it was not measured in turns."""
    facts = manifest.gain.speedups.get(kind)
    return facts if facts is not None and facts.median is not None else None


def speedup_text(facts: SpeedupFacts | None) -> str:
    """The median of the rounds and their range: "1.28× (1.25 to 1.32)"; "" for None."""
    if facts is None:
        return ""
    is_range_known = facts.min is not None and facts.max is not None
    return f"{formatting.ratio(facts.median)}{f' ({facts.min:.2f} to {facts.max:.2f})' if is_range_known else ''}"


def speed_rows(manifest: Manifest) -> list[tuple[str, str, str, str]]:
    """(what, dense, pruned, ratio) of latency and memory; above 1 the pruned model is better, in every row."""
    dense, pruned, measured = manifest.model, manifest.pruned, manifest.gain.figures
    rows: list[tuple[str, float | None, float | None, Callable[[float | None], str], str]] = [
        (name, measured[kind].dense, measured[kind].pruned, formatted, speedup_text(speedup(manifest, kind)))
        for name, kind, formatted in (
            ("Tokens a second", "throughput", formatting.decimal),
            ("Prefill", "prefill", formatting.milliseconds),
            ("Decode, a token", "decode", formatting.milliseconds),
        )
        if kind in measured
    ]
    rows += [
        ("Weights", dense.bytes, pruned.bytes, formatting.size, ""),
        ("Parameters", dense.params, pruned.params, formatting.short, ""),
    ]
    return [
        (name, formatted(before), formatted(after), ratio or formatting.ratio(before / after))
        for name, before, after, formatted, ratio in rows
        if before and after
    ]
