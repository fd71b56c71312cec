"""Bar Q4: whether drift on prunetune's own prompts ranks models as general perplexity and accuracy do.

    python benchmarks/quality/drift.py RUN... --text general/text --choices arc_easy --command COMMAND \
        [--least 0.8] [--device NAME] [--final] [--out benchmarks/results.jsonl]

RUN is a finished run folder whose recipe names both tasks in data.general. Where it has no drift yet, the run is
resumed, which measures it alone. Every pruned and dense tuned model is a point: its KL and token agreement against
perplexity over the untuned model's and accuracy above the untuned model's. Correlations are Spearman's, with the sign
turned so that 1 means that both see the same loss.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rows import give
from scipy.stats import spearmanr

import prunetune
from prunetune.config.recipe import load_saved_recipe
from prunetune.evaluation.results import Evaluation
from prunetune.runs.folder import RunFolder
from prunetune.utils.environment import installed_commit

# Measure of drift, score, and the sign of their correlation if both see the same loss.
PAIRS = (("kl", "perplexity", 1), ("kl", "accuracy", -1), ("agreement", "perplexity", -1), ("agreement", "accuracy", 1))


@dataclass(frozen=True)
class Point:
    """One model: its drift, and its scores beside the untuned model's."""

    name: str
    kl: float
    agreement: float
    perplexity: float  # over the untuned model's
    accuracy: float  # minus the untuned model's


def points_of(path: Path, text: str, choices: str) -> Iterator[Point]:
    """The models of a run."""
    folder = RunFolder(path)
    if not folder.drift_file.exists():
        prunetune.run(load_saved_recipe(path / "config.yaml"), resume=True)
    if not folder.drift_file.exists():
        raise SystemExit(f"{path} measures no drift: its recipe sets evaluate.drift to false")

    def read(file: Path) -> Evaluation:
        return Evaluation.from_json(file.read_text(encoding="utf-8"))

    dense = read(folder.evaluation_file("dense"))
    for name, drift in read(folder.drift_file).tasks.items():
        own = read(folder.evaluation_file(name))
        perplexity, accuracy = (
            (own.tasks[task].scores[metric].value, dense.tasks[task].scores[metric].value)
            for task, metric in ((text, "perplexity"), (choices, "accuracy"))
        )
        yield Point(
            f"{path.name}/{name}",
            drift.scores["kl"].value,
            drift.scores["agreement"].value,
            perplexity[0] / perplexity[1],
            accuracy[0] - accuracy[1],
        )


def bars(points: Sequence[Point], least: float | None) -> Iterator[dict[str, Any]]:
    """A row for each measure and score."""
    for measure, score, sign in PAIRS:
        found = spearmanr([getattr(point, measure) for point in points], [getattr(point, score) for point in points])
        value = sign * float(found.statistic)  # nan where one of the two is the same for all
        is_known = math.isfinite(value)
        yield {
            "bar": "Q4",
            "case": f"drift's {measure} ranks {len(points)} models as general {score} does (Spearman)",
            "value": round(value, 4) if is_known else None,
            "target": "" if least is None else f">= {least:g}",
            "met": None if least is None else is_known and value >= least,
            "unit": "correlation",
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--text", default="general/text", help="task of general text")
    parser.add_argument("--choices", default="arc_easy", help="task of general knowledge")
    parser.add_argument("--command", required=True, help="that made the runs")
    parser.add_argument("--least", type=float, help="smallest correlation that is asked for")
    parser.add_argument("--device", default="")
    parser.add_argument("--final", action="store_true")
    parser.add_argument("--out", type=Path, help="default: print")
    arguments = parser.parse_args()
    measured = [point for path in arguments.runs for point in points_of(path, arguments.text, arguments.choices)]
    points = list({(point.kl, point.perplexity): point for point in measured}.values())  # runs may share a tuned model
    if len(points) < 3:
        parser.error(f"{len(points)} models are measured, and a correlation needs 3 at least: name more runs")
    for point in points:
        print(point, file=sys.stderr)
    made = {"device": arguments.device, "command": arguments.command, "commit": installed_commit()[:7]}
    for row in bars(points, arguments.least):
        give(row | made | {"final": arguments.final}, arguments.out)


if __name__ == "__main__":
    main()
