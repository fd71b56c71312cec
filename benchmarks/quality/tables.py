"""Tables of README and docs, written from files of results; `tests/test_figures.py` holds them against these files.

    python benchmarks/quality/tables.py [NAME] [PAGE ...]

writes every marked table of the pages (README.md, docs and benchmarks/README.md), or those of one name, anew. A mark is
a line above a table: the table's name (one of `TABLES`), its file, and what it shows of it.

    <!-- figures: floors benchmarks/quality/results/floors.json domains=legal,healthcare -->
    <!-- figures: methods RESULTS.json keep=0.6 methods=dense,fisher columns="acc,nll,-nll,ppl general/text,cost" -->
    <!-- figures: headline FOLDER domains=legal,healthcare keeps=0.6,0.4 -->
    <!-- figures: claims benchmarks/results.jsonl -->
    <!-- figures: memory benchmarks/scaling_table.py table=sequence -->
    <!-- figures: speed benchmarks/results.jsonl cases="CPU, llama.cpp, q8_0, one thread of a busy machine" -->
    <!-- figures: summary SUMMARY.json files=legal-rates keep=0.6 -->
    <!-- figures: budgets SUMMARY.json files=legal-curves,legal-seeds methods=taylor-rank-32,flap-rank-32 -->

Columns of `methods` are scores (mean over seeds), scores with a minus (the difference to the reference, its standard
error over items and in brackets over seeds), and those of `FACTS`. RESULTS.json is a file of `merged.py`. SUMMARY.json
holds means only, of version 0.1.0: of several files, the first that has a method and a budget counts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from claims import claims_table
from merged import comparison_of, megabytes_of

from prunetune.compare import markdown

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
MARK = re.compile(r"^<!-- figures: (?P<name>\S+) (?P<call>.+) -->\n(?:(?:_.+_\n\n)?(?:^\|.*\n)+)?", re.MULTILINE)
SPEED = re.compile(r"(prefill|decode|peak memory) (?:ratio )?\w+ over \w+, (\S+), batch (\d+)(?: (\(.*?\)))?")
LLAMA = "llama-3-8b, 0.6 kept, prompt 2048, "
FLOORS = (*markdown.FLOORS, "words")
FACTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "help": lambda row: row["help"] or "",
    "lr": markdown.format_learning_rate,
    "seeds": markdown.format_seeds,
    "kept": lambda row: f"{row['kept']:.3f}",
    "gap": lambda row: markdown.format_signed(row["gap"]),
    "cost": lambda row: markdown.format_seconds(row["cost_seconds"]),
}


def floors_table(file: Path, domains: str) -> str:
    """Accuracies that need no model, by task, and the mean of the best over the tasks that have train rows."""
    content = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for domain in domains.split(","):
        tasks, best = content["domains"][domain], []
        for task, found in tasks.items():
            values = {name: found[name] for name in FLOORS if name in found}
            best += [max(values.values())] if found["tuned"] else []
            cells = [f"{values[name]:.3f}" if name in values else "" for name in FLOORS]
            rows.append([domain, task, str(found["rows"]), *cells, f"{max(values.values()):.3f}"])
        if best:
            rows.append([domain, "mean of the tuned tasks", *[""] * (1 + len(FLOORS)), f"{sum(best) / len(best):.3f}"])
    head = ["domain", "task", "rows", "chance", "majority", "longest", "bag of words", "best"]
    made = content["made"]
    return f"_{made['date']}, commit {made['commit'][:9]}._\n\n" + markdown.markdown_table(head, rows) + "\n"


def methods_table(file: Path, keep: str, columns: str, methods: str = "") -> str:
    """Rows of a comparison at one budget, all methods or those named, in that order."""
    comparison = comparison_of(file, float(keep))
    by_method = {row["method"]: row for row in comparison["rows"]}
    rows = []
    for method in methods.split(",") if methods else by_method:
        cells = [method]
        for column in columns.split(","):
            score = by_method[method]["scores"].get(column.removeprefix("-"), {})
            if column in FACTS:
                cells.append(FACTS[column](by_method[method]))
            elif column.startswith("-"):
                cells.append(markdown.format_difference(score))
            else:
                cells.append(markdown.format_number(score["value"]))
        rows.append(cells)
    head = [f"{c[1:]} - {comparison['reference']}" if c.startswith("-") else c for c in columns.split(",")]
    return f"_{markdown.format_made(comparison)}_\n\n" + markdown.markdown_table(["method", *head], rows) + "\n"


def headline_table(folder: Path, domains: str, keeps: str) -> str:
    """What pruning gains and loses: the dense model with equal help, and the pruned one at each budget.

    Weights are in MB of bfloat16. The last column is the loss of the best two-stage method (of those with as many seeds
    and the same layout) minus the pruned model's, with its standard error over items, and in brackets over seeds.
    """
    head = [
        "model",
        "weights, MB",
        "accuracy",
        "loss",
        "domain perplexity",
        "general perplexity",
        "two-stage loss - ours",
    ]
    table: dict[str, list[str]] = {}
    for domain in domains.split(","):
        file = folder / f"{domain}.json"
        for keep in map(float, keeps.split(",")):
            rows = {row["method"]: row for row in comparison_of(file, keep)["rows"]}
            pruned, dense = rows["progressive"], rows["dense-equal-help"]
            rivals = [row for row in rows.values() if row["kind"] == "two-stage" and row["seeds"] == pruned["seeds"]]
            rivals = [row for row in rivals if not row["method"].endswith("-uniform")]
            best = min(rivals, key=lambda row: row["scores"]["nll"]["value"])
            lead = f"{markdown.format_difference(best['scores']['nll'])}, {best['method']}"
            for name, row, last in (("dense", dense, ""), (f"{1 - keep:.0%} removed", pruned, lead)):
                keys = ("acc", "nll", f"ppl {domain}/text", "ppl general/text")
                scores = [markdown.format_number(row["scores"][key]["value"]) for key in keys]
                table[f"{domain}, {name}"] = [f"{megabytes_of(file, row['kept']):.0f}", *scores, last]
    return markdown.markdown_table(head, [[name, *cells] for name, cells in table.items()]) + "\n"


def memory_table(file: Path, table: str) -> str:
    """A table of `scaling_table.py`: memory, sequence or replicas."""
    sys.path.insert(0, str(file.parent))
    try:
        return str(getattr(importlib.import_module(file.stem), f"{table}_table")())
    finally:
        sys.path.remove(str(file.parent))


def speed_table(file: Path, cases: str) -> str:
    """Times of the dense model over the pruned one's, and memory of the pruned over the dense one's, from rows of F3.

    A case is what the rows' cases begin with. Behind each ratio of times stands the one by count, of FLOPs or bytes.
    """
    rows = [row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()) if row["bar"] == "F3"]
    table: dict[tuple[str, str, str], dict[str, str]] = {}
    for case in cases.split("|"):
        for row in (row for row in rows if row["case"].startswith(f"{case}: ")):
            kind, name, batch, spread = re.match(SPEED, row["case"].removeprefix(f"{case}: ")).groups()  # type: ignore[union-attr]
            layout = "uniform" if "uniform" in name else "per-layer"
            cells = table.setdefault((case.removeprefix(LLAMA), batch, layout), {})
            cells[kind] = f"{row['value']:.2f}" + (f" {spread}" if spread else "")
            cells[f"{kind} by count"] = re.search(r"ratio ([\d.]+)", row["target"])[1][:4]  # type: ignore[index]
    columns = ["prefill", "prefill by count", "decode", "decode by count", "peak memory"]
    lines = [[*key, *(cells.get(column, "") for column in columns)] for key, cells in table.items()]
    head = ["runtime", "batch", "layout", "prefill", "FLOPs", "decode", "bytes", "memory, of dense"]
    return markdown.markdown_table(head, lines) + "\n"


def summary_rows(file: Path, files: str) -> dict[tuple[str, float], dict[str, Any]]:
    """(method, keep) -> its mean scores; the dense model's keep is 1."""
    content = json.loads(file.read_text(encoding="utf-8"))
    rows: dict[tuple[str, float], dict[str, Any]] = {}
    for name in files.split(","):
        for values in content["files"][name]["rows"]:
            row = dict(zip(content["columns"], values, strict=True))
            rows.setdefault((row["method"], 1.0 if row["method"] == "dense" else row["keep"]), row)
    return rows


def summary_table(file: Path, files: str, keep: str, methods: str = "") -> str:
    """Mean scores at one budget: all methods of the files or those named, in that order."""
    rows = summary_rows(file, files)
    at_keep = [name for name, kept in rows if kept in (1, float(keep))]
    cells = []
    for name in methods.split(",") if methods else dict.fromkeys(at_keep):
        row = rows.get((name, float(keep))) or rows[name, 1.0]
        scores = [markdown.format_number(row[key]) for key in ("acc", "nll", "nll_sd", "domain_ppl", "general_ppl")]
        cells.append([name, f"{row['learning_rate']:g}", str(row["seeds"]), *scores])
    head = ["method", "lr", "seeds", "acc", "nll", "sd", "domain ppl", "general ppl"]
    return markdown.markdown_table(head, cells) + "\n"


def budgets_table(file: Path, files: str, methods: str) -> str:
    """NLL, and perplexity of general texts in brackets: a row for each budget, a column for each method."""
    rows, names = summary_rows(file, files), methods.split(",")
    cells = []
    for keep in sorted({kept for _, kept in rows}, reverse=True):
        found = [rows.get((name, keep)) for name in names]
        scores = [f"{row['nll']:.3f} ({row['general_ppl']:,.0f})" if row else "" for row in found]
        if any(found):
            cells.append([f"{100 * (1 - keep):.0f}%", *scores])
    return markdown.markdown_table(["removed", *names], cells) + "\n"


TABLES: dict[str, Callable[..., str]] = {
    "floors": floors_table,
    "methods": methods_table,
    "headline": headline_table,
    "claims": claims_table,
    "memory": memory_table,
    "speed": speed_table,
    "summary": summary_table,
    "budgets": budgets_table,
}


def with_tables(page: str, only: str = "") -> str:
    """The text of a page with its marked tables (of one name) made from their files."""

    def made(mark: re.Match[str]) -> str:
        if only and mark["name"] != only:
            return mark[0]
        file, *options = shlex.split(mark["call"])
        table = TABLES[mark["name"]](ROOT / file, **dict(option.split("=", 1) for option in options))
        return f"{mark[0].splitlines()[0]}\n{table}"

    return MARK.sub(made, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="", choices=["", *TABLES], help="of the tables; default: all")
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    arguments = parser.parse_args()
    for page in arguments.pages:
        text = page.read_text(encoding="utf-8")
        if (new := with_tables(text, arguments.name)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page}: tables written")


if __name__ == "__main__":
    main()
