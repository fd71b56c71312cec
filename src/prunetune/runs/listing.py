"""The list of runs (`prunetune runs`): filters by model, status and conditions, the table, and JSON."""

import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict

from prunetune.errors import ConfigError
from prunetune.evaluation.results import HEADLINE_METRICS
from prunetune.runs.history import STATUSES, RunEntry
from prunetune.utils.suggest import validate_name
from prunetune.utils.tables import table_lines
from prunetune.utils.untrusted import short_repr

CONDITION = re.compile(r"(?P<name>[^<>=!]+)(?P<sign><=|>=|<|>|=)(?P<value>[-+\d.e\s]+)")
SIGNS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "=": operator.eq,
}  # fmt: skip

RUN_VALUES: dict[str, Callable[[RunEntry], float | None]] = {
    "kept": lambda entry: entry.kept,
    "keep": lambda entry: entry.requested_keep,
    "seed": lambda entry: float(entry.seed),
}


def filter_runs(
    entries: Sequence[RunEntry], *, model: str = "", status: str = "", where: Sequence[str] = ()
) -> list[RunEntry]:
    """Runs whose model's name contains `model`, with that status, and for which every condition holds.

    A condition is on kept, keep, seed, or a metric: "accuracy >= 0.7", "TASK.accuracy > 0.5". A run that lacks the
    value is left out. Raises `ConfigError` for a condition that cannot be read, and for an unknown status or name.
    """
    if status:
        validate_name(status, STATUSES, "--status")
    known = dict.fromkeys([*RUN_VALUES, *HEADLINE_METRICS, *(name for entry in entries for name in entry.metrics)])
    conditions = [_parse_condition(text, known) for text in where]
    return [
        entry
        for entry in entries
        if model.casefold() in entry.model.casefold()
        and (not status or entry.status == status)
        and all(holds(entry) for holds in conditions)
    ]


def _parse_condition(text: str, known: Iterable[str]) -> Callable[[RunEntry], bool]:
    match, value = CONDITION.fullmatch(text), math.nan
    with suppress(ValueError):
        value = float(match["value"]) if match else math.nan
    if match is None or math.isnan(value):
        raise ConfigError(
            f"--where {short_repr(text)} is no condition: write one such as 'accuracy >= 0.7' or 'kept < 0.6'"
        )
    sign, name = SIGNS[match["sign"]], validate_name(match["name"].strip(), known, "--where")

    def holds(entry: RunEntry) -> bool:
        own = RUN_VALUES[name](entry) if name in RUN_VALUES else entry.metrics.get(name)
        return own is not None and sign(own, value)

    return holds


def render_runs_table(entries: Sequence[RunEntry]) -> str:
    """The runs in lines of text, newest first."""
    if not entries:
        return "no runs"
    rows = []
    for entry in entries:
        scores = [f"{name} {entry.metrics[name]:.3f}" for name in HEADLINE_METRICS if name in entry.metrics]
        if entry.kind == "comparison":  # how many scores there are, which `--json` lists
            scores = ["comparison", *([f"{len(entry.metrics)} scores"] if entry.metrics else [])]
        started = entry.started[:16].replace("T", " ")
        model = entry.model if len(entry.model) <= 36 else "…" + entry.model[-35:]
        kept = f"{entry.kept:.1%}" if entry.kept is not None else f"({entry.requested_keep:.0%} asked)"
        rows.append((entry.name, entry.status, started, model, kept, ", ".join(scores) or "–"))
    return "\n".join(table_lines(("run", "status", "started (UTC)", "model", "kept", "scores"), rows))


def runs_to_json(entries: Sequence[RunEntry]) -> str:
    """The runs with all that is known of them, as a JSON list."""
    return json.dumps([{"name": entry.name, **asdict(entry), "path": str(entry.path)} for entry in entries], indent=1)
