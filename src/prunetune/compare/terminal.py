"""A comparison as `prunetune compare` prints it: the verdict, and a table for each budget that fits 80 columns."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunetune.compare import markdown
from prunetune.compare.methods import DENSE
from prunetune.report import formatting
from prunetune.utils.json_lines import JsonObject
from prunetune.utils.tables import table_lines
from prunetune.utils.untrusted import parse_json, printable, read_text


def render_comparison(folder: Path, width: int | None = None) -> str:
    """Verdict, tables, failed cells, and the files to look into; tables in `width` columns, or as the terminal has."""
    comparison: JsonObject = parse_json(read_text(folder / "comparison.json"))
    sections = [textwrap.fill(printable(" ".join(markdown.verdict_sentences(comparison))), 80, break_on_hyphens=False)]
    is_timed = any(row.get("speed") for row in comparison["rows"])
    for keep in comparison["keeps"]:
        rows = [row for row in comparison["rows"] if row["keep"] == keep and row["seeds"]]
        headings = ["method", ">kept", ">MB", ">NLL", ">over dense", ">accuracy", *[">ms a token"] * is_timed]
        lines = table_lines(headings, [_cells(row) for row in rows], width=width)
        sections.append("\n".join([f"keep {keep:g}, {comparison['split']} split", *lines]))
    sections += [
        f"failed: {printable(failure['cell'])}: {printable(failure['error'])}" for failure in comparison["errors"]
    ]
    paths = [f"table {folder / 'table.md'}", f"page  {folder / 'comparison.html'}"]
    if best := comparison.get("best"):
        paths.append(f"best  {folder / best['path']}")
    return "\n\n".join(filter(None, [*sections, "\n".join(paths)]))


def _cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table: loss ± its error over items, and how far it is above the dense tuned model's."""
    nll, accuracy = row["scores"].get("nll", {}), row["scores"].get("acc", {})
    gap = markdown.format_signed(row["gap"]) if row["method"] != DENSE else ""
    if gap and nll.get("dense_se") is not None:
        gap += f" ± {formatting.decimal(nll['dense_se'])}"
    kept, size = formatting.share(row["kept"], 1), markdown.format_megabytes(row.get("bytes"))
    loss, share = (markdown.format_number(score.get("value")) for score in (nll, accuracy))
    return [row["method"], kept, size, loss, gap, share, markdown.token_ms(row)]
