"""The table of a comparison as Markdown text, kept as table.md; and the words and numbers that other views share."""

from collections.abc import Mapping, Sequence
from typing import Any

from prunetune.compare.methods import DENSE
from prunetune.compare.table import as_good_as_dense, smallest_file
from prunetune.report import formatting
from prunetune.utils.untrusted import markdown_text

FLOORS = ("chance", "majority", "longest")  # rows of the table of tasks that need no model
TIMES = ("ms a token", "ms to the first", "memory MB", "timed in")  # of one prompt, in turns with the other rows
ABSENT = ""  # a value that a cell of the table does not have


def render_markdown(comparison: Mapping[str, Any]) -> str:
    """Markdown tables: of each budget the means, what was forgotten and the tasks; the learning rates; failed cells."""
    sections = [markdown_text(text) for text in (format_made(comparison), " ".join(verdict_sentences(comparison)))]
    for keep in comparison["keeps"]:
        if rows := [row for row in comparison["rows"] if row["keep"] == keep]:
            sections += _budget_tables(comparison, keep, rows)
    if comparison["rates"]:
        trials = [
            (trial["method"], f"{trial['learning_rate']:g}", format_number(trial["valid_nll"]), chosen)
            for trial in comparison["rates"]
            for chosen in ["chosen" if trial["chosen"] else ""]
        ]
        title = "Learning rates, chosen on valid at the first seed and budget:"
        sections.append(f"{title}\n\n" + markdown_table(["method", "lr", "nll on valid", ""], trials))
    if comparison["errors"]:
        failures = (f"{failure['cell']}: {failure['error']}" for failure in comparison["errors"])
        sections.append("Failed:\n\n" + "\n".join(f"- {markdown_text(failure)}" for failure in failures))
    return "\n\n".join(filter(None, sections)) + "\n"


def _budget_tables(comparison: Mapping[str, Any], keep: float, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    reference = comparison["reference"]
    head = ["method", "help", "lr", "seeds", "kept", "gap", "acc of dense"]
    for metric in comparison["metrics"]:
        head += [metric, "sd", "se", f"- {reference}"]
    timed = any(row.get("speed") for row in rows)
    head += ["weights MB", *(TIMES if timed else ()), "cost s", "train s", "teacher s", "peak MB"]
    title = (
        f"Keep {keep:g}, split {comparison['split']}: means over seeds; sd over seeds, se over items; "
        f"minus {reference} with its standard error over paired items (over seeds), * beyond two of both; "
        "gap: nll minus dense; cost: training and its teacher's tuning."
    )
    cells = [_row_cells(row, comparison["metrics"], timed=timed) for row in rows]
    sections = [f"{title}\n\n" + markdown_table(head, cells)]
    if notes := timing_notes(rows):
        sections.append("Not timed:\n\n" + "\n".join(f"- {markdown_text(note)}" for note in notes))
    if forgetting := comparison["forgetting"]:
        title = f"Keep {keep:g}, outside the domain: zero-shot accuracy and perplexity, minus {reference}."
        sections.append(f"{title}\n\n" + markdown_table(["method", *forgetting], _score_rows(rows, forgetting)))
    if tasks := comparison["tasks"]:
        title = f"Keep {keep:g}, each task, minus {reference}; first what needs no model, on the same rows."
        by_task = [comparison["floors"].get(task.removeprefix("acc "), {}) for task in tasks]
        floors = [[name, *(format_number(floor.get(name)) for floor in by_task)] for name in FLOORS if any(by_task)]
        sections.append(f"{title}\n\n" + markdown_table(["method", *tasks], [*floors, *_score_rows(rows, tasks)]))
    return sections


def _score_rows(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[list[str]]:
    """Each method's scores, each followed by its difference to the reference."""
    table = []
    for row in rows:
        scores = [row["scores"].get(metric, {}) for metric in metrics]
        pairs = [(format_number(score.get("value")), format_difference(score)) for score in scores]
        table.append([row["method"], *(" Δ ".join(filter(None, pair)) for pair in pairs)])
    return table


def timing_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each row that could not be timed, its method and why."""
    notes = ((row["method"], (row.get("speed") or {}).get("note")) for row in rows)
    return [f"{method}: {note}" for method, note in notes if note]


def format_times(row: Mapping[str, Any]) -> list[str]:
    """The cells of `TIMES`, empty where the row was not timed."""
    speed = row.get("speed") or {}
    first, place = (
        speed.get("first_token_s"),
        f"{speed['runtime']}, {speed['device']}" if "runtime" in speed else ABSENT,
    )
    first_ms = ABSENT if first is None else f"{first * 1e3:.3g}"
    return [token_ms(row), first_ms, format_megabytes(speed.get("peak_bytes")), place]


def _row_cells(row: Mapping[str, Any], metrics: Sequence[str], *, timed: bool) -> list[str]:
    share = row["acc_of_dense"]
    cells = [row["method"], row["help"] or ABSENT, format_learning_rate(row), format_seeds(row)]
    cells += [formatting.share(row["kept"], 1), format_signed(row["gap"])]
    cells += [ABSENT if share is None else formatting.share(share, 1)]
    for metric in metrics:
        score = row["scores"].get(metric, {})
        cells += [format_number(score.get(name)) for name in ("value", "sd", "se")] + [format_difference(score)]
    cells += [format_megabytes(row.get("bytes")), *(format_times(row) if timed else ())]
    seconds = [format_seconds(row[key]) for key in ("cost_seconds", "train_seconds", "teacher_seconds")]
    return [*cells, *seconds, ABSENT if row["peak_mb"] is None else formatting.count(row["peak_mb"])]


def format_made(comparison: Mapping[str, Any]) -> str:
    """When the cells ran, and by which version and commit."""
    made = comparison["made"]
    days = " to ".join(dict.fromkeys(made["dates"][:1] + made["dates"][-1:]))
    parts = [days, *(f"prunetune {version}" for version in made["versions"])]
    parts += [f"commit {commit[:9]}" for commit in made["commits"]]
    return ", ".join([comparison["model"], *filter(None, parts)]) + "."


def verdict_sentences(comparison: Mapping[str, Any]) -> list[str]:
    """Which weights are the smallest that are about as good as dense, where they are kept, and which are the fastest.

    Empty where there is no choice between formats, models or times.
    """
    good = as_good_as_dense(dict(comparison))
    row, timed = smallest_file(dict(comparison)), [other for other in good if token_ms(other)]
    has_choice = any("+" in other["method"] or "rival-" in other["method"] for other in comparison["rows"])
    if row is None or not (has_choice or timed or comparison.get("best")):
        return []
    largest = max(other["bytes"] for other in comparison["rows"] if other.get("bytes"))
    size = "" if row["kind"] == "dense" else f" with {formatting.share(1 - row['kept'])} removed"
    sentences = [
        f"The smallest weights within {100 * comparison['within']:g}% of dense in loss: {row['method']}{size}, "
        f"{format_megabytes(row['bytes'])} of {format_megabytes(largest)} MB."
    ]
    if best := comparison.get("best"):
        has_file = "+" not in best["method"] or "/" in best["path"]
        but = "" if has_file else f", but could not be written as {best['method'].partition('+')[2]}: see the log"
        sentences.append(f"Those of seed {best['seed']} are kept in {best['path']}{but}.")
    if timed:
        fastest = min(timed, key=lambda other: float(other["speed"]["token_s"]))
        dense = next((other for other in timed if other["method"] == DENSE and other is not fastest), None)
        against = f"; dense takes {_format_time(dense)}" if dense else ""
        sentences.append(f"The fastest of those as good: {fastest['method']}, {_format_time(fastest)}{against}.")
    return sentences


def _format_time(row: Mapping[str, Any]) -> str:
    speed = row["speed"]
    times = speed.get("times_faster")
    faster = f", {times[0]:.2f} times as fast as dense ({times[1]:.2f} to {times[2]:.2f})" if times else ""
    return f"{token_ms(row)} ms a token in {speed['runtime']} on {speed['device']}{faster}"


def token_ms(row: Mapping[str, Any]) -> str:
    """Milliseconds of a decode step; "" if the row was not timed."""
    seconds = (row.get("speed") or {}).get("token_s")
    return ABSENT if seconds is None else f"{seconds * 1e3:.3g}"


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
    """A difference ± its standard error over items (over seeds), * beyond two of both; "" if there is none."""
    if score.get("difference") is None:
        return ABSENT
    error = score.get("difference_se")
    if error is None:
        return format_signed(score["difference"])
    mark, over_seeds = "*" if is_significant(score) else "", score.get("difference_seed_se")
    seeds = "" if over_seeds is None else f" ({format_number(over_seeds)})"
    return f"{format_signed(score['difference'])} ± {format_number(error)}{mark}{seeds}"


def is_significant(score: Mapping[str, Any]) -> bool:
    """Whether a difference is more than two standard errors over items, and two over seeds if there are several."""
    difference, error = score.get("difference"), score.get("difference_se")
    if difference is None or error is None:
        return False
    return bool(abs(difference) > 2 * max(error, score.get("difference_seed_se") or 0.0))


def format_megabytes(value: float | None) -> str:
    """Bytes as megabytes, 10**6; "" for None."""
    return ABSENT if value is None else f"{value / 1e6:,.0f}" if value >= 1e8 else f"{value / 1e6:.3g}"


def format_seconds(value: float | None) -> str:
    """Seconds, whole from ten on; "" for None and zero."""
    return ABSENT if not value else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; nothing in a cell is markup."""
    lines = ["| " + " | ".join(map(markdown_text, cells)) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
