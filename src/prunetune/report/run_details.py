"""Tables of what went in and what it ran on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunetune.report import formatting
from prunetune.report.run_folder import RunFiles, get_mapping, get_number, lookup

SPLITS = ("train", "search", "texts", "guard", "valid", "test")


@dataclass(frozen=True)
class SplitSummary:
    """One split of the data."""

    name: str
    count: str
    sha256: str


def split_summaries(manifest: Mapping[str, Any]) -> list[SplitSummary]:
    """The splits that the manifest names, in the order of their use."""
    counts, hashes = get_mapping(manifest, "data", "counts"), get_mapping(manifest, "data", "hashes")
    names = [name for name in SPLITS if name in counts or name in hashes]
    names += sorted({str(name) for name in (*counts, *hashes)} - set(SPLITS))
    return [
        SplitSummary(name, formatting.count(get_number(counts, name)), str(hashes.get(name, formatting.NOT_KNOWN)))
        for name in names
    ]


def data_notes(manifest: Mapping[str, Any]) -> list[str]:
    """Rows that did not go in as they were."""
    too_long, dropped = get_number(manifest, "data", "too_long"), get_number(manifest, "data", "dropped")
    notes = []
    if too_long:
        notes.append(f"{formatting.count(too_long)} rows were longer than the limit and were cut or dropped.")
    if dropped:
        notes.append(f"{formatting.count(dropped)} rows that also stood in another split were dropped.")
    return notes


def environment_rows(run: RunFiles) -> list[tuple[str, str]]:
    """What ran on what, as (name, value)."""
    manifest = run.manifest
    memory = get_number(manifest, "peak_memory_mb")
    if memory is None:
        memory = max(
            (value for line in run.metrics if (value := get_number(line, "memory_mb")) is not None), default=None
        )
    found = {
        "Model": lookup(manifest, "model", "name") or lookup(run.config, "model"),
        "Result": _joined(lookup(manifest, "pruned", "class"), lookup(manifest, "pruned", "layout")),
        "Device": lookup(manifest, "device"),
        "Arithmetic": lookup(manifest, "dtype"),
        "Base": _base(manifest),
        "Seed": _plain(lookup(manifest, "seeds")) or _plain(lookup(run.config, "seed")),
        "Budgets": "; ".join(f"{row['budget']} {row['words']}" for row in lookup(manifest, "budgets") or ()),
        "Peak memory": None if memory is None else f"{formatting.count(memory)} MB",
        **{str(name): version for name, version in get_mapping(manifest, "versions").items()},
    }
    return [(name, _plain(value)) for name, value in found.items() if value not in (None, "")]


def _base(manifest: Mapping[str, Any]) -> str:
    """How the tuned linears were held, and how far the written model is from what was tuned so."""
    error, same = get_number(manifest, "quantised", "error"), get_number(manifest, "quantised", "same")
    if error is None or same is None:
        return ""
    return (
        f"{lookup(manifest, 'quantised', 'scheme')}; merged differs from it by {formatting.share(error, 2)} "
        f"(root mean square of logits), {formatting.share(same)} of most likely tokens equal"
    )


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(str(each) for each in value)
    return "" if value is None else str(value)


def command_line(manifest: Mapping[str, Any]) -> str:
    """The command line, as one string."""
    found = lookup(manifest, "command")
    return (
        found
        if isinstance(found, str)
        else " ".join(_quoted(str(part)) for part in found)
        if isinstance(found, list)
        else ""
    )


def _quoted(part: str) -> str:
    import shlex

    return shlex.quote(part)


def timing_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How long each stage took, as (stage, duration), the total last."""
    seconds = {
        str(stage): get_number(get_mapping(manifest, "timings"), stage) for stage in get_mapping(manifest, "timings")
    }
    known = {stage: value for stage, value in seconds.items() if value is not None}
    rows = [(stage, formatting.duration(value)) for stage, value in known.items()]
    if len(known) > 1 and "total" not in known:
        rows.append(("total", formatting.duration(sum(known.values()))))
    return rows


def cost_rows(run: RunFiles) -> list[tuple[str, str]]:
    """What the run itself took, as (what, how much)."""
    manifest, validation = run.manifest, get_mapping(run.manifest, "validation")
    paces = sorted(value for line in run.metrics if (value := get_number(line, "tokens_per_s")) is not None)
    steps = [value for line in run.metrics if (value := get_number(line, "step")) is not None]
    share, seconds = get_number(validation, "share"), get_number(validation, "seconds")
    memory = get_number(manifest, "peak_memory_mb")
    found = {
        "Tuning steps": formatting.count(max(steps)) if steps else "",
        "Tuning speed": f"{formatting.count(paces[len(paces) // 2])} tokens a second (median)" if paces else "",
        "Validation": f"every {formatting.count(get_number(validation, 'every'))} steps, {formatting.duration(seconds)} in all, "
        f"{formatting.share(share, 1)} of the tuning time" if share is not None else "",
        "Peak memory": f"{formatting.count(memory)} MB" if memory is not None else "",
    }  # fmt: skip
    return [(name, words) for name, words in found.items() if words]
