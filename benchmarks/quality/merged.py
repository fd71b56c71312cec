"""One table of the cells of several comparisons, as `prunetune compare` makes of its own: the files beside this one.

    python benchmarks/quality/merged.py TABLE.json RECIPE FOLDER [FOLDER ...] [--split test] [--keeps 0.6] [--seeds 0]
        [--model NAME]

A folder is a comparison's, such as `on_gpus.py` leaves them (OUT/legal-0). Of cells with one name the first folder's
counts; of a method's learning rates, that which is best on valid. Writes the table with all standard errors and paired
differences, and prints it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunetune.compare.grid import best_learning_rate
from prunetune.compare.markdown import render_markdown
from prunetune.compare.table import aggregate
from prunetune.config.recipe import load_recipe
from prunetune.utils.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--keeps", nargs="+", type=float)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--model", help="where it was not the recipe's")
    told = parser.parse_args()
    cells = [cell for cell in cells_of(told.folders) if not told.seeds or cell["seed"] in told.seeds]
    compared = {
        "methods": list(dict.fromkeys(cell["method"] for cell in cells)),
        "keeps": told.keeps or sorted({cell["keep"] for cell in cells if cell["keep"] < 1}, reverse=True),
        "seeds": sorted({cell["seed"] for cell in cells}),
        "split": told.split,
    }
    config = load_recipe(told.recipe, {"compare": compared} | ({"model": told.model} if told.model else {}))
    found = aggregate(cells, {name: rate_of(name, cells) for name in compared["methods"]}, config)
    write_text(told.table, json.dumps(found, indent=1, allow_nan=False) + "\n")
    print(render_markdown(found))


def rate_of(method: str, cells: Sequence[dict[str, Any]]) -> float:
    """The best on valid of those tried there; or the only one there is."""
    own = [cell for cell in cells if cell["method"] == method]
    return best_learning_rate(own) or float(own[-1]["learning_rate"])


def cells_of(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Each cell once."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for file in sorted((folder / "cells").glob("*.json")):
            cell = json.loads(file.read_text(encoding="utf-8"))
            if "error" not in cell:
                found.setdefault(cell["cell"], cell)
    return list(found.values())


if __name__ == "__main__":
    main()
