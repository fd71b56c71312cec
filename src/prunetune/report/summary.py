"""The headline of the page, and its tiles: what was saved, and what it cost."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from prunetune.report import formatting
from prunetune.report.kept_layers import CHANNELS, GROUPS, count_kept, kept_by_kind
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
    dense, pruned, parts = run.manifest.model, run.manifest.pruned, []
    of_decoder, of_all = (
        share_saved(dense.decoder_params, pruned.decoder_params),
        share_saved(dense.params, pruned.params),
    )
    if of_decoder is not None:
        words = f"{formatting.share(of_decoder)} smaller decoder"
        parts.append(words if of_all is None else f"{formatting.share(of_all)} smaller ({words})")
    elif run.plan is not None:
        counts = {kind: count_kept(kept_by_kind(run.plan)[kind].values()) for kind in (GROUPS, CHANNELS)}
        shares = [f"{formatting.share(kept / units)} of {kind}" for kind, (kept, units) in counts.items() if units]
        parts.append(f"{' and '.join(shares)} kept")
    if headline is not None:
        score = f"{'mean ' if headline.tasks > 1 else ''}{headline.label} {formatting.decimal(headline.pruned)}"
        of = f", {formatting.share(headline.recovery)} of" if headline.recovery is not None else ""
        of = of or f" against {formatting.decimal(headline.reference)} of"
        parts.append(f"{score}{of} the {headline.reference_name} model")
    return "; ".join(parts) if parts else f"Run {run.name}: no results yet"


def share_saved(dense: float | None, pruned: float | None) -> float | None:
    """Share of the dense model's size that is gone; None where a size is not known."""
    return 1 - pruned / dense if dense and pruned is not None else None


def summary_tiles(run: RunFiles, headline: HeadlineScore | None) -> list[Tile]:
    """The numbers that the files allow."""
    manifest, tiles = run.manifest, []
    dense, pruned, memory, check = manifest.model, manifest.pruned, manifest.peak_memory_mb, manifest.selfcheck
    if headline is not None:
        error = f" ± {formatting.decimal(headline.pruned_se)}" if math.isfinite(headline.pruned_se) else ""
        mean, tasks = formatting.decimal(headline.pruned) + error, f"{headline.tasks} task{'s' * (headline.tasks > 1)}"
        if headline.recovery is None:
            detail = f"{headline.reference_name} {formatting.decimal(headline.reference)}, {tasks}"
            tiles.append(Tile(f"Mean {headline.label}", mean, detail))
        else:
            share, detail = formatting.share(headline.recovery, 1), f"mean {headline.label} {mean}, {tasks}"
            tiles.append(Tile(f"Recovery of {headline.reference_name}", share, detail))
    hidden = next((name for name in run.plan.units if name.endswith(":hidden-channels")), "") if run.plan else ""
    widths = (run.plan.units[hidden], len(run.plan.kept[hidden])) if run.plan and hidden else (None, None)
    sizes: list[tuple[str, float | None, float | None, Callable[[float | None], str]]] = [
        ("All parameters", dense.params, pruned.params, formatting.short),
        ("Checkpoint", dense.bytes, pruned.bytes, formatting.size),
        ("Decoder parameters", dense.decoder_params, pruned.decoder_params, formatting.short),
        ("Vocabulary", dense.tokens, dense.kept_tokens, formatting.count),
        ("Hidden size", *widths, formatting.count),
    ]
    for label, before, after, formatted in sizes:
        if (saved := share_saved(before, after)) is not None:
            change = f"-{formatting.share(saved, 1)}" if saved >= 0 else f"+{formatting.share(-saved, 1)}"
            tiles.append(Tile(label, formatting.with_minus_sign(change), f"{formatted(before)} → {formatted(after)}"))
    if check:
        worst = check.max_relative
        differs = "" if worst is None else f"reloaded; differs by {formatting.scientific(worst)} at most"
        detail = differs or "reloaded and compared"
        detail += f", {formatting.count(check.tokens)} tokens" if check.tokens is not None else ""
        word = "no verdict" if check.ok is None else "passed" if check.ok else "failed"
        tiles.append(Tile("Self-check", word, detail, "plain" if check.ok is None else "good" if check.ok else "bad"))
    seconds = [value for stage, value in manifest.timings.items() if stage != "total" and value is not None]
    if seconds:
        detail = f"peak memory {formatting.count(memory)} MB" if memory is not None else "all stages"
        tiles.append(Tile("Run time", formatting.duration(sum(seconds)), detail))
    return tiles
