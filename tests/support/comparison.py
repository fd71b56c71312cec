"""Files of a comparison's cells, with made-up scores."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from prunetune.compare.scoring import scores_from_evaluation
from prunetune.evaluation.results import Evaluation, Item, TaskResult
from prunetune.evaluation.statistics import aggregate_items

KINDS = {"dense": {"dense": True}, "untuned": {"untuned": True}, "progressive": {}}


def item(name: str, **scores: float) -> Item:
    return Item(name, "", "", "", None, scores)


def task(name: str, items: Sequence[Item], *metrics: str, general: bool = False) -> TaskResult:
    scores = {metric: aggregate_items(items, metric) for metric in metrics}
    return TaskResult(name, scores, tuple(items), general=general)


def cell(method: str, *tasks: TaskResult, keep: float = 0.6, seed: int = 0, **values: Any) -> dict[str, Any]:
    """The content of a cell's file."""
    dense = method in ("dense", "untuned")
    return {
        "cell": f"{method}-keep{keep:g}-seed{seed}",
        "method": method,
        "keep": 1.0 if dense else keep,
        "seed": seed,
        "learning_rate": 1e-3,
        "changes": KINDS.get(method, {"two-stage": method}),
        **scores_from_evaluation(Evaluation({result.task: result for result in tasks})),
        "kept": 1.0 if dense else keep - 0.004,
        "widths": {},
        "train_seconds": 0.0 if method == "untuned" else 60.0,
        "teacher_seconds": 60.0 if method == "progressive" else 0.0,
        "eval_seconds": 20.0,
        "peak_mb": 3000.0,
        "crowded": False,
        "curve": [],
        "made": {"date": "2026-11-30", "commit": "a7e92a6" * 5},
        **values,
    }


def failed(method: str, error: str, **values: Any) -> dict[str, Any]:
    """The content of the file of a cell that failed."""
    finished = cell(method, **values)
    return {key: finished[key] for key in ("cell", "method", "keep", "seed", "learning_rate", "changes")} | {
        "error": error
    }


def realistic(methods: Sequence[str], keeps: Sequence[float], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Cells of 60 items in each of four tasks, worse the less is kept."""
    cells = []
    for order, method in enumerate(methods):
        is_dense = method in ("dense", "untuned")
        for keep in keeps[:1] if is_dense else keeps:
            for seed in seeds[:1] if method == "untuned" else seeds:
                rng = random.Random(f"{method} {keep} {seed}")
                harm = (0.6 if method == "untuned" else 0.0) if is_dense else (1 - keep) * (0.3 + 0.12 * (order % 9))
                answers = [
                    item(
                        f"c{n}",
                        accuracy=float(rng.random() > 0.27 + harm / 3),
                        nll=1.0 + harm + 0.3 * (n % 7),
                        tokens=2.0,
                    )
                    for n in range(60)
                ]
                summaries = [
                    item(
                        f"o{n}",
                        nll=1.3 + harm + rng.gauss(0, 0.1) + 0.2 * (n % 5),
                        tokens=30.0,
                        rouge_l=max(0.0, 0.35 - harm / 4 + rng.gauss(0, 0.1)),
                    )
                    for n in range(60)
                ]
                domain, general = (
                    [item(f"t{n}", nll=base + factor * harm + rng.gauss(0, 0.1), tokens=400.0) for n in range(60)]
                    for base, factor in ((2.7, 1.4), (3.3, 2.2))
                )
                tasks = (
                    task("holdings", answers, "accuracy", "nll"),
                    task("summaries", summaries, "nll", "rouge_l"),
                    task("legal/text", domain, "perplexity"),
                    task("general/text", general, "perplexity"),
                )
                cells.append(cell(method, *tasks, keep=keep, seed=seed))
    return cells
