"""M6: loss of the large models' setting below version 0.1.0's, from the cells of both, on the same rows.

    python benchmarks/quality/large_setting.py DOMAIN=OLD_FOLDER,NEW_FOLDER [...] [--out benchmarks/results.jsonl]

OLD_FOLDER is a comparison that the tree of 03ca826 made (`half-joint` of its benchmarks/quality/large.yaml), NEW_FOLDER
one of now (`large` of equal-help.yaml, by `on_gpus.py`). 0.1.0 counted the token that ends an answer, and today's loss
leaves it out. So a loss of 0.1.0 over n tokens becomes n / (n - 1) of it, as if its end had been certain: that is the
highest that it can be without the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rows import give

COMMAND = (
    "python benchmarks/quality/on_gpus.py benchmarks/quality/cells/bars.yaml --split test --variants "
    "benchmarks/quality/equal-help.yaml --processes 4 --jobs 4 -- --train.compile on; in the tree of 03ca826 prunetune "
    "compare recipes/DOMAIN.yaml --compare.variants benchmarks/quality/large.yaml --compare.methods half-joint "
    "--compare.split test; python benchmarks/quality/large_setting.py DOMAIN=OLD,NEW"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="DOMAIN=OLD,NEW")
    parser.add_argument("--device", default="NVIDIA H200")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, help="rows are appended to this file; default: printed")
    arguments = parser.parse_args()
    for entry in arguments.folders:
        domain, _, folders = entry.partition("=")
        old, new = (read_cells(Path(folder)) for folder in folders.split(","))
        seeds = sorted(old.keys() & new.keys())
        leads = [lead(old[seed], new[seed]) for seed in seeds]
        error = statistics.stdev(leads) / len(leads) ** 0.5
        value = statistics.mean(leads)
        where = f"large models' setting, {domain}, 40% removed, {len(seeds)} seeds"
        case = f"{where}: nll below 0.1.0's, at most (se over seeds {error:.3f})"
        row = {"bar": "M6", "case": case, "value": round(value, 4), "target": ">= 0.04", "met": value >= 0.04}
        origin = {"device": arguments.device, "command": COMMAND, "commit": arguments.commit, "final": True}
        give(row | {"unit": "nats"} | origin, arguments.out)


def read_cells(folder: Path) -> dict[int, dict[str, Any]]:
    """Cells of the large setting by seed."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("cells/*.json"))]
    return {cell["seed"]: cell for cell in found if cell["method"] in ("half-joint", "large")}


def lead(old: dict[str, Any], new: dict[str, Any]) -> float:
    """The mean over tasks of the old loss without its end token, minus the new one."""
    return statistics.mean(
        statistics.mean(
            loss * tokens / (tokens - 1) - now[name]
            for name, (loss, tokens) in items_of(old, task).items()
            if name in now
        )
        for task, scores in old["scores"].items()
        if scores.get("nll") and (now := {name: loss for name, (loss, _) in items_of(new, task).items()})
    )


def items_of(cell: dict[str, Any], task: str) -> dict[str, tuple[float, float]]:
    """(nll, tokens) by the item's id; cells of 0.1.0 have a mapping of items, today's have columns."""
    items = cell["items"].get(task, {})
    if isinstance(items.get("id"), list):
        scored = zip(items.get("nll", ()), items.get("tokens", ()), strict=True)
        return dict(zip(items["id"], scored, strict=False))
    return {name: (item["nll"], item["tokens"]) for name, item in items.items() if "nll" in item}


if __name__ == "__main__":
    main()
