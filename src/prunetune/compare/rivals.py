"""Rivals of a comparison: other, smaller models that are tuned on the same data, and never pruned."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prunetune.compare.methods import Method
from prunetune.compare.scoring import scores_from_evaluation
from prunetune.compare.table import item_scores
from prunetune.config.recipe import RunConfig
from prunetune.errors import ConfigError
from prunetune.evaluation.results import Evaluation, Item, Score, TaskResult
from prunetune.evaluation.statistics import aggregate_items
from prunetune.pipeline.prepare import Console, RunContext, prepare
from prunetune.utils.json_lines import JsonObject

PREFIX = "rival-"
OF_TOKENS = ("nll", "perplexity")  # metrics that count tokens


def prepare_rivals(config: RunConfig, console: Console) -> list[tuple[Method, RunContext]]:
    """Each of `compare.rivals` as a method with the same rows in its own tokens; raises a `PrunetuneError`."""
    names = [PREFIX + re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name) for model in config.compare.rivals]
    if len(set(names)) < len(names):
        raise ConfigError(f"compare.rivals: two would be called {max(names, key=names.count)}: rename a folder")
    rivals = []
    for name, model in zip(names, config.compare.rivals, strict=True):
        alone = replace(
            config,
            model=model,
            out=str(Path(config.out) / name),  # never written
            budget=replace(config.budget, keep=1.0, sizes=(), flops="", memory="", file="", latency="", throughput=""),
            data=replace(config.data, distill_texts=()),
            distill=replace(config.distill, teacher="none"),
        )
        context = prepare(alone, resume=False, console=console)
        rivals.append((Method(name, "dense"), replace(context, config=context.reported_config)))
    return rivals


def in_tokens_of(cell: JsonObject, reference: JsonObject) -> JsonObject:
    """A rival's cell with its losses per token of the reference's tokenizer: the same text then counts the same.

    Items that the reference did not score are left out.
    """
    tasks = {}
    for task, scores in cell["scores"].items():
        own, known = (item_scores(side["items"].get(task, {})) for side in (cell, reference))
        counts = {name: item["tokens"] for name, item in known.items() if "tokens" in item}
        items = tuple(
            Item(name, "", "", "", None, _per_token(own[name], counts.get(name, 0.0)))
            for name in own
            if name in counts or not counts
        )
        found = {
            metric: Score(math.nan if value is None else value, math.nan if se is None else se, n)
            for metric, (value, se, n) in scores.items()
        }
        with_loss = [item for item in items if "nll" in item.scores]
        found |= {metric: aggregate_items(with_loss, metric) for metric in OF_TOKENS if metric in found}
        tasks[task] = TaskResult(task, found, items, general=task in cell.get("general", ()))
    formats = {name: in_tokens_of(stored, reference) for name, stored in cell.get("formats", {}).items()}
    return {**cell, **scores_from_evaluation(Evaluation(tasks)), "formats": formats}


def _per_token(scores: dict[str, float], tokens: float) -> dict[str, float]:
    """An item's scores with its loss spread over so many tokens."""
    if "nll" not in scores or not tokens:
        return scores
    return {**scores, "nll": scores["nll"] * scores["tokens"] / tokens, "tokens": tokens}


def with_comparable_losses(cells: Sequence[JsonObject]) -> list[JsonObject]:
    """All cells, those of rivals in the tokens of the others."""
    own = next((cell for cell in cells if "error" not in cell and not cell["method"].startswith(PREFIX)), None)
    return [
        in_tokens_of(cell, own) if own and cell["method"].startswith(PREFIX) and "error" not in cell else cell
        for cell in cells
    ]
