"""Bar F3 out of what `prunetune bench --json` measured: rows of results.jsonl.

prunetune bench RUN... --json bench.json
python benchmarks/inference.py bench.json --case "CPU, HF eager" --command "prunetune bench RUN..." [--append]
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.jsonl"
SHARE, EXCESS = 0.9, 1.02  # of the promised speed-up; of the parameters' share


def rows(bench: dict[str, Any], case: str) -> Iterator[dict[str, Any]]:
    """For every model but the first and every batch: prefill, decode and peak memory against their bars."""
    dense, *others = bench["models"]
    for model in others:
        share = model["facts"]["parameters"] / dense["facts"]["parameters"]
        for cell in model["cells"]:
            where = f"{case}: {{}} ratio dense over pruned, {Path(model['name']).name}, batch {cell['batch']}"
            for figure, unit in (("prefill", "FLOP"), ("decode", "bytes")):
                if figure in cell["counted"]:
                    ratio, promise = cell["ratios"][figure], cell["counted"][figure]
                    yield {
                        "case": f"{where.format(figure)} ({ratio['min']:.2f} to {ratio['max']:.2f})",
                        "value": round(ratio["median"], 3),
                        "target": f">= {SHARE * promise:.3f} ({SHARE} x {unit} ratio {promise:.3f})",
                        "met": ratio["median"] >= SHARE * promise,
                        "unit": "x",
                    }
            if "peak_memory" in cell["ratios"]:
                memory = 1 / cell["ratios"]["peak_memory"]["median"]
                yield {
                    "case": f"{case}: peak memory pruned over dense, {Path(model['name']).name}, batch {cell['batch']}",
                    "value": round(memory, 3),
                    "target": f"<= {EXCESS * share:.3f} ({EXCESS} x parameter ratio {share:.3f})",
                    "met": memory <= EXCESS * share,
                    "unit": "x",
                }


def main() -> None:
    """Print the rows, and keep them where told to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--case", required=True)
    parser.add_argument("--command", required=True, help="what anyone can run again")
    parser.add_argument("--append", action="store_true", help="to results.jsonl")
    told = parser.parse_args()
    bench = json.loads(told.bench.read_text(encoding="utf-8"))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    rest = {"device": bench["models"][0]["facts"]["device"], "command": told.command, "commit": commit}
    lines = "".join(json.dumps({"bar": "F3", **row, **rest}) + "\n" for row in rows(bench, told.case))
    print(lines, end="")
    if told.append:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(lines)


if __name__ == "__main__":
    main()
