"""The table of a comparison as Markdown text: printed at the end, and kept as table.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prunetune.report import formatting

ABSENT = ""  # a value that a cell of the table does not have


def render_markdown(comparison: Mapping[str, Any]) -> str:
    """A Markdown table for each budget, one of the learning-rate trials, and a list of failed cells."""
    sections = [_budget_table(comparison, keep) for keep in comparison["keeps"]]
    if comparison["rates"]:
        sections.append(_learning_rate_table(comparison["rates"]))
    if comparison["errors"]:
        failures = (f"- {failure['cell']}: {failure['error']}" for failure in comparison["errors"])
        sections.append("Failed:\n\n" + "\n".join(failures))
    return "\n\n".join(filter(None, sections)) + "\n"


def _budget_table(comparison: Mapping[str, Any], keep: float) -> str:
    rows = [row for row in comparison["rows"] if row["keep"] == keep]
    if not rows:
        return ""
    metrics, reference = comparison["metrics"], comparison["reference"]
    head = ["method", "lr", "seeds", "kept", "gap", "acc of dense"]
    for metric in metrics:
        head += [metric, "sd", "se", f"- {reference}"]
    head += ["s", "teacher s", "MB"]
    title = (
        f"Keep {keep:g}, split {comparison['split']}: means over seeds; sd over seeds, se over items; "
        f"minus {reference} with its standard error over paired items, * beyond two of them; gap: nll minus dense."
    )
    return f"{title}\n\n" + _table(head, [_row_cells(row, metrics) for row in rows])


def _row_cells(row: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    share = row["acc_of_dense"]
    cells = [row["method"], format_learning_rate(row), format_seeds(row), formatting.share(row["kept"], 1)]
    cells += [format_signed(row["gap"]), ABSENT if share is None else formatting.share(share, 1)]
    for metric in metrics:
        score = row["scores"].get(metric, {})
        cells += [format_number(score.get(name)) for name in ("value", "sd", "se")] + [format_difference(score)]
    memory = ABSENT if row["peak_mb"] is None else formatting.count(row["peak_mb"])
    return [*cells, format_seconds(row["train_seconds"]), format_seconds(row["teacher_seconds"]), memory]


def format_learning_rate(row: Mapping[str, Any]) -> str:
    """The learning rate of a row; "" if nothing was trained."""
    return f"{row['learning_rate']:g}" if row["train_seconds"] else ABSENT


def format_seeds(row: Mapping[str, Any]) -> str:
    """The number of seeds in a row, and of those that failed."""
    return str(len(row["seeds"])) + (f" ({row['failed']} failed)" if row["failed"] else "")


def format_number(value: float | None) -> str:
    """A decimal number; "" for None."""
    return ABSENT if value is None else formatting.decimal(value)


def format_signed(value: float | None) -> str:
    """A decimal number with its sign; "" for None."""
    return ABSENT if value is None else formatting.signed_decimal(value)


def format_difference(score: Mapping[str, Any]) -> str:
    """A difference ± its standard error, with * if it is more than two of them; "" if there is none."""
    if score.get("difference") is None:
        return ABSENT
    error = score.get("difference_se")
    if error is None:
        return format_signed(score["difference"])
    mark = "*" if abs(score["difference"]) > 2 * error else ""
    return f"{format_signed(score['difference'])} ± {format_number(error)}{mark}"


def format_seconds(value: float | None) -> str:
    """Seconds, whole from ten on; "" for None and zero."""
    return ABSENT if not value else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _learning_rate_table(trials: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for trial in trials:
        nll, chosen = format_number(trial["valid_nll"]), "chosen" if trial["chosen"] else ""
        rows.append([trial["method"], f"{trial['learning_rate']:g}", nll, chosen])
    title = "Learning rates, chosen on valid at the first seed and budget:"
    return f"{title}\n\n" + _table(["method", "lr", "nll on valid", ""], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
