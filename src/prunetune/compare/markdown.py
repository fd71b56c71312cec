"""The table as text: printed at the end, and kept as table.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prunetune.report import formatting

ABSENT = ""


def render_markdown(comparison: Mapping[str, Any]) -> str:
    """One Markdown table for each budget, the trials of learning rates, and what failed."""
    parts = [_budget_table(comparison, keep) for keep in comparison["keeps"]]
    if comparison["rates"]:
        parts.append(_learning_rate_table(comparison["rates"]))
    if comparison["errors"]:
        parts.append("Failed:\n\n" + "\n".join(f"- {one['cell']}: {one['error']}" for one in comparison["errors"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _budget_table(found: Mapping[str, Any], keep: float) -> str:
    rows = [row for row in found["rows"] if row["keep"] == keep]
    if not rows:
        return ""
    metrics, versus = found["metrics"], found["reference"]
    head = ["method", "lr", "seeds", "kept", "gap", "acc of dense"]
    for metric in metrics:
        head += [metric, "sd", "se", f"- {versus}"]
    head += ["s", "teacher s", "MB"]
    lines = [_table_line(head), "|" + "---|" * len(head), *(_table_line(_row_cells(row, metrics)) for row in rows)]
    title = f"Keep {keep:g}, split {found['split']}: means over seeds; sd over seeds, se over items; "
    note = f"minus {versus} with its standard error over paired items, * beyond two of them; gap: nll minus dense."
    return "\n".join([title + note, "", *lines])


def _row_cells(row: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    share = row["acc_of_dense"]
    cells = [
        row["method"],
        format_learning_rate(row),
        format_seeds(row),
        formatting.share(row["kept"], 1),
        format_signed(row["gap"]),
    ]
    cells.append(ABSENT if share is None else formatting.share(share, 1))
    for metric in metrics:
        score = row["scores"].get(metric, {})
        cells += [
            format_number(score.get("value")),
            format_number(score.get("sd")),
            format_number(score.get("se")),
            format_difference(score),
        ]
    memory = ABSENT if row["peak_mb"] is None else formatting.count(row["peak_mb"])
    return [*cells, format_seconds(row["train_seconds"]), format_seconds(row["teacher_seconds"]), memory]


def format_learning_rate(row: Mapping[str, Any]) -> str:
    """The learning rate that a row was tuned with."""
    return f"{row['learning_rate']:g}" if row["train_seconds"] else ABSENT


def format_seeds(row: Mapping[str, Any]) -> str:
    """How many seeds went in, and how many failed."""
    return str(len(row["seeds"])) + (f" ({row['failed']} failed)" if row["failed"] else "")


def format_number(value: float | None) -> str:
    """Nothing where there is none."""
    return ABSENT if value is None else formatting.decimal(value)


def format_signed(value: float | None) -> str:
    """With its sign."""
    return ABSENT if value is None else formatting.signed_decimal(value)


def format_difference(score: Mapping[str, Any]) -> str:
    """A difference with its standard error; marked where it is more than two of them."""
    if score.get("difference") is None:
        return ABSENT
    error = score.get("difference_se")
    if error is None:
        return format_signed(score["difference"])
    clear = "*" if abs(score["difference"]) > 2 * error else ""
    return f"{format_signed(score['difference'])} ± {format_number(error)}{clear}"


def format_seconds(value: float | None) -> str:
    """Whole seconds; nothing for none."""
    return ABSENT if not value else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _learning_rate_table(trials: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        _table_line(
            [
                one["method"],
                f"{one['learning_rate']:g}",
                format_number(one["valid_nll"]),
                "chosen" if one["chosen"] else "",
            ]
        )
        for one in trials
    ]
    head = ["method", "lr", "nll on valid", ""]
    title = "Learning rates, chosen on valid at the first seed and budget:"
    return "\n".join([title, "", _table_line(head), "|" + "---|" * len(head), *lines])


def _table_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
