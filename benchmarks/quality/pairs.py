"""One method minus another, cell by cell of the same seed: means over pairs with their standard errors.

    python benchmarks/quality/pairs.py teacher-20:default both:joint-gated --of OUT/legal-0 OUT/healthcare-0
        [--minus OTHER/legal-0 OTHER/healthcare-0] [--keep 0.6]

Folders are those of comparisons; the other method's cell is from the folder in the same place of `--minus`, or from the
same folder. Differences of nll in nats, of perplexities in percent (100 times the logarithm's).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

Headline = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", metavar="METHOD:OTHER")
    parser.add_argument("--of", nargs="+", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--minus", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--keep", type=float, default=0.6)
    told = parser.parse_args()
    found: dict[str, list[float]] = {}
    for folder, other in zip(told.of, told.minus or told.of, strict=True):
        ours, theirs = headlines(folder, told.keep), headlines(other, told.keep)
        for ahead, behind in (pair.split(":") for pair in told.methods):
            for method, seed in sorted(ours):
                if method == ahead and (behind, seed) in theirs:
                    one = difference(ours[method, seed], theirs[behind, seed])
                    print(folder.name, f"{ahead} - {behind}, seed {seed}:", told_of({k: [v] for k, v in one.items()}))
                    for name, value in one.items():
                        found.setdefault(name, []).append(value)
    if not found:
        parser.error(f"no cells of {' or '.join(told.methods)} with one seed and keep {told.keep:g} in these folders")
    print("mean (standard error):", told_of(found))


def headlines(folder: Path, keep: float) -> dict[tuple[str, int], Headline]:
    """Scores of a comparison's cells by method and seed; none of cells that failed."""
    cells = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("cells/*.json"))]
    whole = [cell for cell in cells if cell["keep"] == keep and "error" not in cell]
    return {(cell["method"], cell["seed"]): cell["headline"] for cell in whole}


def difference(one: Headline, other: Headline) -> Headline:
    """Domain texts are called so, whatever the domain."""
    found = {"acc": one["acc"] - other["acc"], "nll": one["nll"] - other["nll"]}
    for name in one:
        if name.startswith("ppl "):
            kind = "general ppl %" if "general" in name else "domain ppl %"
            found[kind] = 100 * math.log(one[name] / other[name])
    return found


def told_of(found: dict[str, list[float]]) -> str:
    """Means, with standard errors where there are several."""

    def error(values: list[float]) -> str:
        return f" ({statistics.stdev(values) / math.sqrt(len(values)):.3f})" if len(values) > 1 else ""

    return ", ".join(f"{name} {statistics.mean(values):+.3f}{error(values)}" for name, values in found.items())


if __name__ == "__main__":
    main()
