"""All cells of several comparisons in one file of results, items included; prints their table.

    python benchmarks/quality/merged.py RESULTS.json FOLDER_OR_RESULTS [...] [--keeps 0.6] [--seeds 0] [--model NAME]
        [--commit COMMIT] [--version VERSION]

A folder is a comparison's, such as `on_gpus.py` leaves them (OUT/legal-0). Of cells with one name the first source's
counts; of a method's learning rates, at each budget that which is best on valid. A variant that is named after its rate
(obs-1e-3) counts as the method (obs). `pairs.py` and `tables.py` read the file: every mean, standard error and paired
difference is computed from it again.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from prunetune.compare.grid import best_learning_rate
from prunetune.compare.markdown import render_markdown
from prunetune.compare.table import SeedGroup, aggregate
from prunetune.config.recipe import from_mapping
from prunetune.utils.files import write_text

FORMAT = "prunetune-cells-1"
NAMED_RATE = re.compile(r"-\d+e-\d$")


@dataclass(frozen=True)
class Results:
    """The cells of one model on one split, as their files have them."""

    model: str
    split: str
    cells: list[dict[str, Any]]

    def comparison(self, keeps: Sequence[float]) -> dict[str, Any]:
        """What `prunetune compare` would write to comparison.json of these cells at some budgets."""
        config = from_mapping({"model": self.model, "compare": {"keeps": list(keeps), "split": self.split}})
        cells = [with_valid_nll(cell) for cell in self.cells if cell["keep"] in (*keeps, 1)]
        rates = {name: self.rate(name, keeps) for name in dict.fromkeys(cell["method"] for cell in cells)}
        return aggregate(cells, rates, config)

    def rate(self, method: str, keeps: Sequence[float]) -> float:
        """The learning rate that is the best on valid of those tried at these budgets, by seeds that ran with all."""
        own = [cell for cell in self.cells if cell["method"] == method and cell["keep"] in (*keeps, 1)]
        own = [with_valid_nll(cell) for cell in own]
        tried = {cell["learning_rate"] for cell in own}
        seeds = {
            seed
            for seed in (cell["seed"] for cell in own)
            if {cell["learning_rate"] for cell in own if cell["seed"] == seed} == tried
        }
        return best_learning_rate([cell for cell in own if cell["seed"] in seeds]) or float(own[-1]["learning_rate"])

    def group(self, method: str, keep: float) -> SeedGroup | None:
        """A method's cells at one budget and its learning rate, by seed; None without one."""
        own = [cell for cell in self.cells if cell["method"] == method and cell["keep"] in (keep, 1)]
        rated = [cell for cell in own if cell["learning_rate"] == self.rate(method, [keep])]
        return SeedGroup(tuple(sorted(rated, key=lambda cell: cell["seed"]))) if rated else None


def with_valid_nll(cell: dict[str, Any]) -> dict[str, Any]:
    """The cell with its loss on valid at the last step: every cell has it, the final one on valid only trials."""
    return cell | ({"valid_nll": cell["curve"][-1]["nll"]} if cell.get("curve") else {})


def read_results(sources: Sequence[Path]) -> Results:
    """The cells of comparisons' folders and of files of results, without those that failed."""
    cells: dict[str, dict[str, Any]] = {}
    models, splits = [], []
    for source in sources:
        if source.is_dir():
            recipe = yaml.safe_load((source / "config.yaml").read_text(encoding="utf-8"))
            models.append(Path(recipe["model"]).stem)
            splits.append(recipe["compare"]["split"])
            found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(source.glob("cells/*.json"))]
        else:
            content = json.loads(source.read_text(encoding="utf-8"))
            models.append(content["model"])
            splits.append(content["split"])
            found = content["cells"]
            for cell in found:
                for task, columns in cell["items"].items():
                    columns["id"] = columns["id"] or content["ids"][task]
        for cell in found:
            if "error" not in cell:
                if NAMED_RATE.search(cell["method"]):
                    cell["method"] = NAMED_RATE.sub("", cell["method"])
                    cell["cell"] = "{method}-keep{keep:g}-seed{seed}-lr{learning_rate:g}".format(**cell)
                cells.setdefault(cell["cell"], cell)
    if len(set(models)) != 1 or len(set(splits)) != 1:
        raise SystemExit(f"results are of one model on one split; these are of {set(models)} on {set(splits)}")
    return Results(models[0], splits[0], list(cells.values()))


@cache
def comparison_of(file: Path, keep: float) -> dict[str, Any]:
    """The comparison at one budget, computed from the items of a file of results."""
    return read_results([file]).comparison([keep])


def megabytes_of(file: Path, kept: float) -> float:
    """Weights of a model that keeps this share, in MB: bytes are linear in it, and some cells have theirs."""
    sizes = {cell["kept"]: cell["bytes"] for cell in read_results([file]).cells if cell.get("bytes")}
    return float(np.polyval(np.polyfit(list(sizes), list(sizes.values()), 1), kept)) / 1e6


def write_results(path: Path, results: Results) -> None:
    """Write a file of results, a line for each cell; ids that all cells of a task share are written once."""
    ids: dict[str, list[str]] = {}
    lines = []
    for cell in results.cells:
        items = {}
        for task, columns in cell["items"].items():
            is_shared = ids.setdefault(task, columns["id"]) == columns["id"]
            items[task] = columns | {"id": None} if is_shared else columns
        lines.append(json.dumps(cell | {"items": items}, allow_nan=False, separators=(",", ":")))
    head = {"format": FORMAT, "model": results.model, "split": results.split, "ids": ids}
    text = json.dumps(head, separators=(",", ":"))[:-1]
    write_text(path, f'{text},\n"cells":[\n' + ",\n".join(lines) + "\n]}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--keeps", nargs="+", type=float, default=[])
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--model", help="its name in the tables")
    parser.add_argument("--commit", help="of cells that name none, since they ran in a copy without git")
    parser.add_argument("--version", help="of cells that ran in a copy without git")
    arguments = parser.parse_args()
    found = read_results(arguments.sources)
    cells = [
        cell
        for cell in found.cells
        if (not arguments.seeds or cell["seed"] in arguments.seeds)
        and (not arguments.keeps or cell["keep"] in (*arguments.keeps, 1))
    ]
    for cell in cells:
        made = cell.setdefault("made", {})
        made["commit"] = made.get("commit") or arguments.commit
        if arguments.version:
            cell["versions"]["prunetune"] = arguments.version
    results = Results(arguments.model or found.model, found.split, cells)
    write_results(arguments.results, results)
    for keep in sorted({cell["keep"] for cell in cells if cell["keep"] < 1}, reverse=True):
        print(render_markdown(results.comparison([keep])))


if __name__ == "__main__":
    main()
