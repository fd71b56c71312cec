"""The first lines of the page: what was saved, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prunetune.report import formatting
from prunetune.report.kept_layers import count_kept, layers_from_plan
from prunetune.report.run_folder import RunFiles, get_mapping, get_number, lookup
from prunetune.report.scores import HeadlineScore
from prunetune.report.speed import separate_ratio


@dataclass(frozen=True)
class Tile:
    """One number of the summary."""

    label: str
    value: str
    detail: str
    tone: Literal["plain", "good", "bad"] = "plain"


def summary_line(run: RunFiles, headline: HeadlineScore | None) -> str:
    """The run in one sentence: size, then quality."""
    parts = [part for part in (_size_summary(run), _quality_summary(headline)) if part]
    return "; ".join(parts) if parts else f"Run {run.name}: no results yet"


def _size_summary(run: RunFiles) -> str:
    saved = _saved(run.manifest, "decoder_params")
    if saved is not None:
        return f"{formatting.share(saved)} smaller decoder"
    if run.plan is None:
        return ""
    layers = layers_from_plan(run.plan)
    kinds = {"KV groups": count_kept(y.attention for y in layers), "MLP channels": count_kept(y.mlp for y in layers)}
    return (
        " and ".join(f"{formatting.share(kept / units)} of {kind}" for kind, (kept, units) in kinds.items() if units)
        + " kept"
    )


def _quality_summary(headline: HeadlineScore | None) -> str:
    if headline is None:
        return ""
    score = f"{'mean ' if headline.tasks > 1 else ''}{headline.label} {formatting.decimal(headline.pruned)}"
    if headline.recovery is None:
        return f"{score} against {formatting.decimal(headline.reference)} of the {headline.reference_name} model"
    return f"{score}, {formatting.share(headline.recovery)} of the {headline.reference_name} model"


def summary_tiles(run: RunFiles, headline: HeadlineScore | None) -> list[Tile]:
    """The numbers that the files allow."""
    made = [
        _quality_tile(headline),
        _size_tile(run.manifest, "decoder_params", "Decoder parameters", formatting.short),
        _size_tile(run.manifest, "params", "All parameters", formatting.short),
        _size_tile(run.manifest, "bytes", "Checkpoint", formatting.size),
        _speed_tile(run.manifest, "decode", "Decode speed"),
        _speed_tile(run.manifest, "prefill", "Prefill speed"),
        _check_tile(get_mapping(run.manifest, "selfcheck")),
        _time_tile(run.manifest),
    ]
    return [tile for tile in made if tile is not None]


def _saved(manifest: Mapping[str, Any], key: str) -> float | None:
    dense, pruned = get_number(manifest, "model", key), get_number(manifest, "pruned", key)
    return 1 - pruned / dense if dense and pruned is not None else None


def _quality_tile(headline: HeadlineScore | None) -> Tile | None:
    if headline is None:
        return None
    error = f" ± {formatting.decimal(headline.pruned_se)}" if math.isfinite(headline.pruned_se) else ""
    mean, over = f"{formatting.decimal(headline.pruned)}{error}", f"{headline.tasks} task{'s' * (headline.tasks > 1)}"
    if headline.recovery is None:
        detail = f"{headline.reference_name} {formatting.decimal(headline.reference)}, {over}"
        return Tile(f"Mean {headline.label}", mean, detail)
    label = f"Recovery of {headline.reference_name}"
    return Tile(label, formatting.share(headline.recovery, 1), f"mean {headline.label} {mean}, {over}")


def _size_tile(manifest: Mapping[str, Any], key: str, label: str, shown: Any) -> Tile | None:
    dense, pruned, saved = (
        get_number(manifest, "model", key),
        get_number(manifest, "pruned", key),
        _saved(manifest, key),
    )
    if saved is None:
        return None
    return Tile(
        label,
        formatting.with_minus_sign(f"-{formatting.share(saved, 1)}")
        if saved >= 0
        else f"+{formatting.share(-saved, 1)}",
        f"{shown(dense)} → {shown(pruned)}",
    )


def _speed_tile(manifest: Mapping[str, Any], kind: str, label: str) -> Tile | None:
    found = separate_ratio(manifest, kind)
    if found is None:
        return None
    dense, pruned = (get_number(manifest, "speed", model, f"{kind}_tokens_per_s") for model in ("dense", "pruned"))
    detail = f"{formatting.count(dense)} → {formatting.count(pruned)} tokens/s" + (
        f", {found.spread}" if found.spread else ""
    )
    return Tile(
        label, formatting.ratio(found.ratio), detail, "bad" if found.ratio < 1 and found.is_significant else "plain"
    )


def _time_tile(manifest: Mapping[str, Any]) -> Tile | None:
    stages = get_mapping(manifest, "timings")
    seconds = [value for stage in stages if stage != "total" and (value := get_number(stages, stage)) is not None]
    if not seconds:
        return None
    memory = get_number(manifest, "peak_memory_mb")
    return Tile(
        "Run time",
        formatting.duration(sum(seconds)),
        f"peak memory {formatting.count(memory)} MB" if memory is not None else "all stages",
    )


def _check_tile(check: Mapping[str, Any]) -> Tile | None:
    if not check:
        return None
    worst, tokens = get_number(check, "max_relative"), get_number(check, "tokens")
    detail = (
        f"reloaded; differs by {formatting.scientific(worst)} at most" if worst is not None else "reloaded and compared"
    )
    detail += f", {formatting.count(tokens)} tokens" if tokens is not None else ""
    passed = lookup(check, "ok")
    if not isinstance(passed, bool):
        return Tile("Self-check", "no verdict", detail)
    return Tile("Self-check", "passed" if passed else "failed", detail, "good" if passed else "bad")
