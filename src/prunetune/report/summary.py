"""The first lines of the page: what was saved, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prunetune.report import text
from prunetune.report.layers import layers_of, total
from prunetune.report.run_folder import RunFiles, lookup, mapping, number
from prunetune.report.scores import Headline
from prunetune.report.speed import one_by_one


@dataclass(frozen=True)
class Tile:
    """One number of the summary."""

    label: str
    value: str
    detail: str
    tone: Literal["plain", "good", "bad"] = "plain"


def verdict(run: RunFiles, headline: Headline | None) -> str:
    """The run in one sentence: size, then quality."""
    parts = [part for part in (_size_verdict(run), _quality_verdict(headline)) if part]
    return "; ".join(parts) if parts else f"Run {run.name}: no results yet"


def _size_verdict(run: RunFiles) -> str:
    saved = _saved(run.manifest, "decoder_params")
    if saved is not None:
        return f"{text.share(saved)} smaller decoder"
    if run.plan is None:
        return ""
    layers = layers_of(run.plan)
    kinds = {"KV groups": total(y.attention for y in layers), "MLP channels": total(y.mlp for y in layers)}
    return (
        " and ".join(f"{text.share(kept / units)} of {kind}" for kind, (kept, units) in kinds.items() if units)
        + " kept"
    )


def _quality_verdict(headline: Headline | None) -> str:
    if headline is None:
        return ""
    score = f"{'mean ' if headline.tasks > 1 else ''}{headline.label} {text.decimal(headline.pruned)}"
    if headline.recovery is None:
        return f"{score} against {text.decimal(headline.reference)} of the {headline.reference_name} model"
    return f"{score}, {text.share(headline.recovery)} of the {headline.reference_name} model"


def tiles(run: RunFiles, headline: Headline | None) -> list[Tile]:
    """The numbers that the files allow."""
    made = [
        _quality_tile(headline),
        _size_tile(run.manifest, "decoder_params", "Decoder parameters", text.short),
        _size_tile(run.manifest, "params", "All parameters", text.short),
        _size_tile(run.manifest, "bytes", "Checkpoint", text.size),
        _speed_tile(run.manifest, "decode", "Decode speed"),
        _speed_tile(run.manifest, "prefill", "Prefill speed"),
        _check_tile(mapping(run.manifest, "selfcheck")),
        _time_tile(run.manifest),
    ]
    return [tile for tile in made if tile is not None]


def _saved(manifest: Mapping[str, Any], key: str) -> float | None:
    dense, pruned = number(manifest, "model", key), number(manifest, "pruned", key)
    return 1 - pruned / dense if dense and pruned is not None else None


def _quality_tile(headline: Headline | None) -> Tile | None:
    if headline is None:
        return None
    error = f" ± {text.decimal(headline.pruned_se)}" if math.isfinite(headline.pruned_se) else ""
    mean, over = f"{text.decimal(headline.pruned)}{error}", f"{headline.tasks} task{'s' * (headline.tasks > 1)}"
    if headline.recovery is None:
        detail = f"{headline.reference_name} {text.decimal(headline.reference)}, {over}"
        return Tile(f"Mean {headline.label}", mean, detail)
    label = f"Recovery of {headline.reference_name}"
    return Tile(label, text.share(headline.recovery, 1), f"mean {headline.label} {mean}, {over}")


def _size_tile(manifest: Mapping[str, Any], key: str, label: str, shown: Any) -> Tile | None:
    dense, pruned, saved = number(manifest, "model", key), number(manifest, "pruned", key), _saved(manifest, key)
    if saved is None:
        return None
    return Tile(
        label,
        text.signed(f"-{text.share(saved, 1)}") if saved >= 0 else f"+{text.share(-saved, 1)}",
        f"{shown(dense)} → {shown(pruned)}",
    )


def _speed_tile(manifest: Mapping[str, Any], kind: str, label: str) -> Tile | None:
    found = one_by_one(manifest, kind)
    if found is None:
        return None
    dense, pruned = (number(manifest, "speed", model, f"{kind}_tokens_per_s") for model in ("dense", "pruned"))
    detail = f"{text.count(dense)} → {text.count(pruned)} tokens/s" + (f", {found.spread}" if found.spread else "")
    return Tile(label, text.ratio(found.ratio), detail, "bad" if found.ratio < 1 and found.clear else "plain")


def _time_tile(manifest: Mapping[str, Any]) -> Tile | None:
    stages = mapping(manifest, "timings")
    seconds = [value for stage in stages if stage != "total" and (value := number(stages, stage)) is not None]
    if not seconds:
        return None
    memory = number(manifest, "peak_memory_mb")
    return Tile(
        "Run time",
        text.duration(sum(seconds)),
        f"peak memory {text.count(memory)} MB" if memory is not None else "all stages",
    )


def _check_tile(check: Mapping[str, Any]) -> Tile | None:
    if not check:
        return None
    worst, tokens = number(check, "max_relative"), number(check, "tokens")
    detail = f"reloaded; differs by {text.tiny(worst)} at most" if worst is not None else "reloaded and compared"
    detail += f", {text.count(tokens)} tokens" if tokens is not None else ""
    passed = lookup(check, "ok")
    if not isinstance(passed, bool):
        return Tile("Self-check", "no verdict", detail)
    return Tile("Self-check", "passed" if passed else "failed", detail, "good" if passed else "bad")
