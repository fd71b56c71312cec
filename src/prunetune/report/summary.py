"""The headline of the page, and its tiles: what was saved, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from prunetune.manifest import Manifest, SelfCheckFacts
from prunetune.report import formatting
from prunetune.report.kept_layers import count_kept, layers_from_plan
from prunetune.report.run_folder import RunFiles
from prunetune.report.scores import HeadlineScore


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
    dense, pruned = run.manifest.model, run.manifest.pruned
    of_decoder = share_saved(dense.decoder_params, pruned.decoder_params)
    if of_decoder is not None:
        of_all = share_saved(dense.params, pruned.params)
        words = f"{formatting.share(of_decoder)} smaller decoder"
        return words if of_all is None else f"{formatting.share(of_all)} smaller ({words})"
    if run.plan is None:
        return ""
    layers = layers_from_plan(run.plan)
    counts = {
        "KV groups": count_kept(layer.attention for layer in layers),
        "MLP channels": count_kept(layer.mlp for layer in layers),
    }
    shares = [f"{formatting.share(kept / units)} of {kind}" for kind, (kept, units) in counts.items() if units]
    return f"{' and '.join(shares)} kept"


def share_saved(dense: float | None, pruned: float | None) -> float | None:
    """Share of the dense model's size that is gone; None where a size is not known."""
    return 1 - pruned / dense if dense and pruned is not None else None


def _quality_summary(headline: HeadlineScore | None) -> str:
    if headline is None:
        return ""
    score = f"{'mean ' if headline.tasks > 1 else ''}{headline.label} {formatting.decimal(headline.pruned)}"
    if headline.recovery is None:
        return f"{score} against {formatting.decimal(headline.reference)} of the {headline.reference_name} model"
    return f"{score}, {formatting.share(headline.recovery)} of the {headline.reference_name} model"


def summary_tiles(run: RunFiles, headline: HeadlineScore | None) -> list[Tile]:
    """The numbers that the files allow."""
    manifest = run.manifest
    dense, pruned = manifest.model, manifest.pruned
    tiles = [
        _quality_tile(headline),
        _size_tile("All parameters", dense.params, pruned.params, formatting.short),
        _size_tile("Checkpoint", dense.bytes, pruned.bytes, formatting.size),
        _size_tile("Decoder parameters", dense.decoder_params, pruned.decoder_params, formatting.short),
        _size_tile("Vocabulary", dense.tokens, dense.kept_tokens, formatting.count),
        _hidden_size_tile(run),
        _selfcheck_tile(manifest.selfcheck),
        _time_tile(manifest),
    ]
    return [tile for tile in tiles if tile is not None]


def _hidden_size_tile(run: RunFiles) -> Tile | None:
    name = next((name for name in run.plan.units if name.endswith(":hidden-channels")), "") if run.plan else ""
    if not run.plan or not name:
        return None
    return _size_tile("Hidden size", run.plan.units[name], len(run.plan.kept[name]), formatting.count)


def _quality_tile(headline: HeadlineScore | None) -> Tile | None:
    if headline is None:
        return None
    error = f" ± {formatting.decimal(headline.pruned_se)}" if math.isfinite(headline.pruned_se) else ""
    mean, tasks = f"{formatting.decimal(headline.pruned)}{error}", f"{headline.tasks} task{'s' * (headline.tasks > 1)}"
    if headline.recovery is None:
        detail = f"{headline.reference_name} {formatting.decimal(headline.reference)}, {tasks}"
        return Tile(f"Mean {headline.label}", mean, detail)
    label = f"Recovery of {headline.reference_name}"
    return Tile(label, formatting.share(headline.recovery, 1), f"mean {headline.label} {mean}, {tasks}")


def _size_tile(
    label: str, dense: float | None, pruned: float | None, formatted: Callable[[float | None], str]
) -> Tile | None:
    saved = share_saved(dense, pruned)
    if saved is None:
        return None
    change = f"-{formatting.share(saved, 1)}" if saved >= 0 else f"+{formatting.share(-saved, 1)}"
    return Tile(label, formatting.with_minus_sign(change), f"{formatted(dense)} → {formatted(pruned)}")


def _time_tile(manifest: Manifest) -> Tile | None:
    seconds = [value for stage, value in manifest.timings.items() if stage != "total" and value is not None]
    if not seconds:
        return None
    memory = manifest.peak_memory_mb
    detail = f"peak memory {formatting.count(memory)} MB" if memory is not None else "all stages"
    return Tile("Run time", formatting.duration(sum(seconds)), detail)


def _selfcheck_tile(check: SelfCheckFacts) -> Tile | None:
    if not check:
        return None
    worst = check.max_relative
    detail = (
        "reloaded and compared" if worst is None else f"reloaded; differs by {formatting.scientific(worst)} at most"
    )
    detail += f", {formatting.count(check.tokens)} tokens" if check.tokens is not None else ""
    if check.ok is None:
        return Tile("Self-check", "no verdict", detail)
    return Tile("Self-check", "passed" if check.ok else "failed", detail, "good" if check.ok else "bad")
