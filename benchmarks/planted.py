"""D1: planted regressions are caught by `prunetune check` with the right items; an identical model passes.

    python benchmarks/planted.py DATA [--model demo] [--limit 200]

DATA holds general/arc_easy/test.jsonl and general/text/test.jsonl. Planted, each a folder of its own beside the dense
one: `channels` lacks the 5% of MLP channels of every layer that weigh most (Wanda's score on 8 texts); `head` has a
tenth of its output rows in another order; `tokenizer` has a third of its tokens under each other's number; `same` is
a copy. Every one is checked by the command line against the dense folder. "right items" says that the new failures
listed are exactly the items that the dense model gets right and the planted one wrong when both are scored anew, one
sequence at a time, by a few lines here that share nothing with the suite. The last row draws the dense model's items
anew, 200 times twice, and counts the checks that call one of the two worse at the level 0.05. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunetune.baselines import Calibration
from prunetune.baselines.scores import wanda_sp
from prunetune.config.recipe import DataConfig
from prunetune.data.batches import collate
from prunetune.data.encoding import encode
from prunetune.data.sources import read_records
from prunetune.evaluation.results import Evaluation, TaskResult
from prunetune.evaluation.scoring_mode import context_length
from prunetune.evaluation.statistics import aggregate_items
from prunetune.evaluation.suites import load_suite
from prunetune.evaluation.suites.check import check_limits
from prunetune.export.checkpoint import write_checkpoint
from prunetune.model.loading import load_model_and_tokenizer
from prunetune.plan import Plan
from prunetune.pruning.cut import cut
from prunetune.pruning.sites import find_sites

COMPARISONS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--limit", type=int, default=200, help="questions; a tenth as many texts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        suite = write_suite(folder, options.data, options.limit)
        save(options.model, folder / "dense", lambda model: None)
        rows = []
        for name, plant in PLANTED.items():
            plant(options.model, folder / name, options.data)
            rows.append(row_of(name, folder, suite))
        print(json.dumps([*rows, false_alarms(folder, suite)], indent=1))


def write_suite(folder: Path, data: Path, limit: int) -> Path:
    tasks = {
        "arc_easy": {"data": "general/arc_easy/test.jsonl", "scorer": "accuracy", "limit": limit},
        "general_text": {"data": "general/text/test.jsonl", "scorer": "perplexity", "limit": max(10, limit // 10)},
    }
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"root": str(data.absolute()), "tasks": tasks}))
    return path


def save(name: str, folder: Path, change: Callable[[Any], None]) -> None:
    opened = load_model_and_tokenizer(name, device=torch.device("cpu"), dtype=torch.float32)
    change(opened.model)
    opened.model.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)


def without_channels(name: str, folder: Path, data: Path) -> None:
    opened = load_model_and_tokenizer(name, device=torch.device("cpu"), dtype=torch.float32)
    sites = tuple(find_sites(opened.model))
    texts = read_records([str(data / "general/text/train.jsonl")], DataConfig(), "train")[:8]
    encoded = encode(
        texts, opened.tokenizer, DataConfig(too_long="truncate", max_length=512), context_length(opened.model)
    )
    batches = tuple(collate([example], 0) for example in encoded.examples)
    scores = wanda_sp(Calibration(opened.model, sites, batches))
    kept = {}
    for site in sites:
        gone = round(0.05 * site.units) if site.kind == "mlp" else 0
        order = scores[site.name].argsort(descending=True).tolist()
        kept[site.name] = tuple(sorted(order[gone:]))
    plan = Plan(kept, {site.name: site.units for site in sites})
    small = cut(opened.model, plan, sites=sites)
    write_checkpoint(small, opened.tokenizer, plan, sites, folder, layout="uniform", card="")


def corrupted_head(name: str, folder: Path, data: Path) -> None:
    def change(model: Any) -> None:
        head = model.get_output_embeddings()
        weight = head.weight.detach().clone()
        rows = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[: len(weight) // 10]
        weight[rows] = weight[rows.roll(1)]
        head.weight = torch.nn.Parameter(weight, requires_grad=False)
        model.config.tie_word_embeddings = False

    save(name, folder, change)


def mixed_tokenizer(name: str, folder: Path, data: Path) -> None:
    save(name, folder, lambda model: None)
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    special = {token["content"] for token in told["added_tokens"]}
    words = [word for word in told["model"]["vocab"] if word not in special]
    chosen = np.random.default_rng(0).permutation(words)[: len(words) // 3].tolist()
    numbers = [told["model"]["vocab"][word] for word in chosen]
    told["model"]["vocab"] |= dict(zip(chosen, [*numbers[1:], numbers[0]], strict=True))
    path.write_text(json.dumps(told), encoding="utf-8")


def the_same(name: str, folder: Path, data: Path) -> None:
    shutil.copytree(folder.parent / "dense", folder)


PLANTED = {
    "channels": without_channels,
    "head": corrupted_head,
    "tokenizer": mixed_tokenizer,
    "same": the_same,
}


def row_of(name: str, folder: Path, suite: Path) -> dict[str, Any]:
    found = folder / f"{name}.json"
    code = subprocess.run(
        [sys.executable, "-m", "prunetune.cli", "check", str(folder / name), "--suite", str(suite), "--against",
         str(folder / "dense"), "--json", str(found), "--device", "cpu", "--dtype", "float32"],
        stdout=subprocess.DEVNULL,
    ).returncode  # fmt: skip
    told = json.loads(found.read_text())
    listed = sorted(failure["id"] for failure in told["failures"] if failure["task"] == "arc_easy")
    dense, planted = right_by_hand(folder / "dense", suite), right_by_hand(folder / name, suite)
    return {
        "planted": name,
        "exit": code,
        "caught": code == 1,
        "broken": [verdict["says"] for verdict in told["verdicts"] if verdict["broken"]],
        "new_failures": len(listed),
        "right_items": listed == sorted(item for item, right in dense.items() if right and not planted[item]),
    }


@torch.inference_mode()
def right_by_hand(folder: Path, suite: Path) -> dict[str, bool]:
    """Item -> whether the right choice has the highest mean log-likelihood: one sequence at a time, no cache."""
    if folder.name == "same":
        folder = folder.with_name("dense")
    kept = folder.with_name(f"{folder.name}-by-hand.json")  # not among the files of the model
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = yaml.safe_load(suite.read_text())
    wanted = {item.id for item in dense_items(folder.parent, suite)}
    right = {}
    for line in (Path(task["root"]) / task["tasks"]["arc_easy"]["data"]).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["id"] not in wanted:
            continue
        prompt = tokenizer(row["prompt"])["input_ids"]
        means = []
        for choice in row["choices"]:
            answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            means.append(logits.log_softmax(-1)[range(len(answer)), answer].mean().item())
        right[row["id"]] = int(np.argmax(means)) == row["answer"]
    kept.write_text(json.dumps(right))
    return right


def dense_items(folder: Path, suite: Path) -> tuple[Any, ...]:
    return evaluation(folder, suite).tasks["arc_easy"].items


def evaluation(folder: Path, suite: Path) -> Evaluation:
    """The dense model's, written by the command line once."""
    kept = folder / "dense.json"
    if not kept.exists():
        subprocess.run(
            [sys.executable, "-m", "prunetune.cli", "eval", str(folder / "dense"), "--suite", str(suite), "--out",
             str(kept), "--device", "cpu", "--dtype", "float32"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return Evaluation.from_json(kept.read_text(encoding="utf-8"))


def false_alarms(folder: Path, suite: Path) -> dict[str, Any]:
    """Checks of the dense model's items, drawn with replacement, against the same drawn with another seed."""
    dense, checks = evaluation(folder, suite), 0
    for seed in range(COMPARISONS):
        first, second = (redrawn(dense, 2 * seed + part) for part in range(2))
        checks += bool(check_limits(first, second, load_suite(suite)).broken)
    return {"comparisons": COMPARISONS, "level": 0.05, "false_alarms": checks, "share": checks / COMPARISONS}


def redrawn(found: Evaluation, seed: int) -> Evaluation:
    rng = np.random.default_rng(seed)
    tasks = {}
    for name, result in found.tasks.items():
        drawn = rng.choice(len(result.items), len(result.items))
        items = tuple(
            # The place is what pairs two items; what stands there is drawn.
            type(item)(str(place), item.prompt, item.expected, item.got, item.correct, item.scores)
            for place, item in enumerate(result.items[index] for index in drawn)
        )
        tasks[name] = TaskResult(name, {metric: aggregate_items(items, metric) for metric in result.scores}, items)
    return Evaluation(tasks)


if __name__ == "__main__":
    main()
