"""A made-up run folder that looks like a real one: 30 layers of 3 KV groups and 1,536 channels, 700 steps, 6 tasks."""

from __future__ import annotations

import hashlib
import json
import math
import random
import statistics
from pathlib import Path

import yaml

from prunetune.config.recipe import RunConfig, from_mapping, to_mapping
from prunetune.evaluation.results import Evaluation, Item, Score, TaskResult
from prunetune.plan import Plan

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LAYERS, GROUPS, CHANNELS, STEPS = 30, 3, 1536, 700
CHOICE_TASKS = {"bill_topic": 10, "casehold": 5, "mmlu_law": 4, "overruling": 2}
OPTIONAL_FILES = (
    "plan.json",
    "metrics.jsonl",
    "validation.jsonl",
    "evaluation/dense.json",
    "evaluation/tuned.json",
    "evaluation/pruned.json",
    "manifest.json",
)
SKILL = {"dense": 0.15, "tuned": 0.67, "pruned": 0.60}  # share of choice items answered by more than luck
LOSS = {"dense": 3.4, "tuned": 2.05, "pruned": 2.45}

BILL = (
    "### Instruction:\nSummarize the following bill.\n\n### Input:\nSEC. 1. Short title. This Act may be cited as the "
    '"Taxpayer Funds Oversight and Accountability Act". SEC. 2. Chief financial officers. (a) Chief financial '
    "officer and deputy chief financial officer. Chapter 9 of title 31, United States Code, is amended in "
    'section 902(a) by striking "An" and inserting "It shall be the duty of an". ' * 3 + "\n\n### Response:\n"
)
SUMMARY = (
    "Taxpayer Funds Oversight and Accountability Act - Requires the chief financial officer of each agency to prepare "
    "a government-wide financial management plan, and extends the duties of deputy chief financial officers."
)


def make_run(folder: Path) -> Path:
    """Write the made-up run folder, every file of it, and return it."""
    folder.mkdir(parents=True)
    (folder / "evaluation").mkdir()
    rng = random.Random(7)
    config = from_mapping({"model": MODEL, "data": {"train": ["data/legal/*/train.jsonl"]}})
    (folder / "config.yaml").write_text(yaml.safe_dump(to_mapping(config), sort_keys=False))
    (folder / "plan.json").write_text(plan(rng).to_json())
    write_lines(folder / "metrics.jsonl", metrics(config, rng))
    write_lines(folder / "validation.jsonl", validation())
    for name, evaluation in evaluations().items():
        (folder / "evaluation" / f"{name}.json").write_text(evaluation.to_json())
    (folder / "manifest.json").write_text(json.dumps(manifest()))
    return folder


def write_lines(path: Path, lines: list[dict[str, object]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def plan(rng: random.Random) -> Plan:
    """First layers nearly whole, several middle layers without attention: the shape that runs find."""
    kept: dict[str, tuple[int, ...]] = {}
    units: dict[str, int] = {}
    for layer in range(LAYERS):
        groups = 3 if layer < 4 else 0 if layer in (12, 13, 15, 19, 22) else rng.choice((1, 2, 2, 3))
        width = 32 * round(
            (0.95 if layer < 3 else 0.45 + 0.25 * math.sin(layer / 4) + rng.uniform(-0.1, 0.1)) * CHANNELS / 32
        )
        for block, of, count in (("self_attn", GROUPS, groups), ("mlp", CHANNELS, width)):
            site = f"model.layers.{layer}.{block}"
            kept[site], units[site] = tuple(sorted(rng.sample(range(of), count))), of
    return Plan(kept, units)


def metrics(config: RunConfig, rng: random.Random) -> list[dict[str, object]]:
    """70 records of training over search, settle and tune."""
    return [_logged(step, config, rng) for step in range(10, STEPS + 1, 10)]


def _logged(step: int, config: RunConfig, rng: random.Random) -> dict[str, object]:
    phase = "search" if step <= 350 else "settle" if step <= 420 else "tune"
    hump = 0.9 * math.exp(-(((step - 180) / 110) ** 2))
    line: dict[str, object] = {
        "step": step,
        "phase": phase,
        "loss": 1.75 + 1.6 * math.exp(-step / 90) + hump + rng.gauss(0, 0.09),
        "lr": config.train.learning_rate * min(step / 21, 0.5 * (1 + math.cos(math.pi * step / STEPS))),
        "kept": max(0.6, 0.6 + 0.4 * math.exp(-((step / 130) ** 3))),
        "tokens_per_s": (9_500 if phase != "tune" else 21_400) + rng.gauss(0, 350),
        "memory_mb": 11_240,
        "seconds": step * 0.8,
    }
    if phase == "search":
        line |= {
            "search_loss": 2.1 + 1.4 * math.exp(-step / 110) + hump + rng.gauss(0, 0.12),
            "ratio_loss": 0.02,
            "changed": 0.08 * math.exp(-step / 120) + 0.002,
            "lasso": 0.3,
            "widths": _widths(step),
        }
    return line


def _widths(step: int) -> dict[str, int]:
    """Units under open gates at a step of the search, middle layers falling first."""
    left = max(0.0, 1 - step / 350)
    return {
        f"model.layers.{layer}.{block}": round(of * (left + (1 - left) * (0.95 if layer < 4 else 0.5 + layer / 90)))
        for layer in range(LAYERS)
        for block, of in (("self_attn", GROUPS), ("mlp", CHANNELS))
    }


def validation() -> list[dict[str, object]]:
    """One line every hundred steps."""
    nll = (2.02, 2.61, 2.33, 1.94, 1.78, 1.71, 1.69)
    return [
        {
            "step": 100 * (i + 1),
            "phase": "search" if i < 3 else "settle" if i == 3 else "tune",
            "nll": value,
            "kept": 0.6,
            "guard.perplexity": perplexity,
            "guard.accuracy": 0.4,
        }
        | ({"broken": ["guard.perplexity <= 1.5x -> roll-back"]} if i == 1 else {})
        for i, (value, perplexity) in enumerate(zip(nll, (21.0, 33.0, 29.0, 27.0, 26.0, 25.5, 25.3), strict=True))
    ]


def evaluations() -> dict[str, Evaluation]:
    """Scores and items of the three models on four choice tasks, one of generation and one of plain text."""
    return {name: Evaluation({**_choice_tasks(name), "billsum": _billsum(name), "text": _text(name)}) for name in SKILL}


def _choice_tasks(model: str) -> dict[str, TaskResult]:
    return {task: _choice_task(model, task, choices) for task, choices in CHOICE_TASKS.items()}


def _choice_task(model: str, task: str, choices: int) -> TaskResult:
    items = []
    for index in range(200):
        known = random.Random(f"{task}{index}").random() < SKILL[model] + random.Random(f"{model}{task}{index}").gauss(
            0, 0.06
        )
        luck = random.Random(f"luck {model}{task}{index}").random() < 1 / choices
        right = known or luck
        answer = "option 1" if right else "option 2"
        prompt = f"### Instruction:\nAnswer {index} of {task}.\n\n### Input:\nA farmer owned land.\n\n### Response:\n"
        items.append(Item(f"{task}-{index}", prompt, "option 1", answer, right, {"accuracy": float(right)}))
    scores = {"accuracy": _mean([item.scores["accuracy"] for item in items])}
    if task == "overruling":
        scores["macro_f1"] = Score(scores["accuracy"].value - 0.006, scores["accuracy"].se * 1.1, 200)
    return TaskResult(task, scores, tuple(items))


def _billsum(model: str) -> TaskResult:
    words = SUMMARY.split()
    items = []
    for index in range(50):
        answer = " ".join(words[: round(len(words) * SKILL[model])])
        scores = {"rouge_l": SKILL[model] * 0.6 + random.Random(f"{model}{index}").gauss(0, 0.05), "exact_match": 0.0}
        items.append(Item(f"billsum-{index}", BILL, SUMMARY, answer, False, scores))
    means = {metric: _mean([item.scores[metric] for item in items]) for metric in ("rouge_l", "exact_match")}
    return TaskResult("billsum", means | {"nll": Score(LOSS[model], 0.03, 200)}, tuple(items))


def _text(model: str) -> TaskResult:
    return TaskResult("text", {"perplexity": Score(math.exp(LOSS[model]), 0.6, 120)}, ())


def _mean(values: list[float]) -> Score:
    return Score(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)), len(values))


def manifest() -> dict[str, object]:
    """The manifest of a run on one GPU."""
    counts = {"train": 4592, "search": 540, "valid": 270, "test": 1170}
    return {
        "command": ["prunetune", "run", "recipes/legal.yaml", "--budget.keep", "0.6"],
        "versions": {"prunetune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
        "device": "NVIDIA H100 80GB HBM3",
        "dtype": "bfloat16",
        "seeds": {"run": 0},
        "data": {
            "counts": counts,
            "hashes": {split: hashlib.sha256(split.encode()).hexdigest() for split in counts},
            "too_long": 31,
            "dropped": 4,
        },
        "model": {"name": MODEL, "params": 134515008, "decoder_params": 106203456, "bytes": 269060552},
        "pruned": {
            "params": 92044608, "decoder_params": 63733056, "bytes": 184120840,
            "class": "LlamaForCausalLM", "layout": "per-layer",
        },
        "selfcheck": {"max_relative": 2.4e-6, "limit": 1e-4, "tokens": 512, "ok": True},
        "gain": {
            "speed": {"decode": {"median": 1.29, "min": 1.25, "max": 1.32}, "prefill": {"median": 1.38}},
            "figures": {"decode": {"dense": 0.0163, "pruned": 0.0127}, "prefill": {"dense": 0.021, "pruned": 0.0152}},
        },
        "timings": {"load": 3.2, "train": 562.1, "cut": 1.9, "evaluate": 141.0, "export": 8.8, "bench": 35.0},
        "peak_memory_mb": 11_240,
        "validation": {
            "every": 100, "seconds": 21.4, "share": 0.038,
            "dense": {"valid.nll": 3.1, "guard.perplexity": 20.1},
            "last": {"valid.nll": 1.69, "guard.perplexity": 25.3},
        },
        "gates": {
            "limits": [
                {"gate": "guard.perplexity <= 1.5x -> roll-back", "limit": 30.15, "found": 25.3, "held": True},
            ],
            "events": [
                {"step": 200, "gates": ["guard.perplexity <= 1.5x -> roll-back"], "did": "rolled back to step 100"},
            ],
            "keep_asked": 0.6, "keep_allowed": 0.6, "kept": 0.6,
        },
        "failed": "",
    }  # fmt: skip


def make_sizes(folder: Path, keeps: tuple[float, ...] = (0.8, 0.6, 0.4)) -> Path:
    """A run of several sizes: each a made-up run folder, the last slower than required."""
    config = from_mapping({"model": MODEL, "budget": {"keep": list(keeps)}, "require": {"faster": 1.2}})
    for index, keep in enumerate(keeps):
        size_folder = make_run(folder / "sizes" / f"{keep:g}")
        about = json.loads((size_folder / "manifest.json").read_text())
        removed = round((1 - keep) * about["model"]["decoder_params"])
        about["pruned"] |= {
            "params": about["model"]["params"] - removed,
            "decoder_params": about["model"]["decoder_params"] - removed,
            "bytes": 2 * (about["model"]["params"] - removed),
        }
        ratio = 1 + 0.7 * (1 - keep) if keep != keeps[-1] else 1.1
        missed = (
            f"require.faster >= 1.2: throughput is {ratio:.2f} times the dense model's; MLP width of layer 7 is 613"
        )
        limit = {"gate": "require.faster >= 1.2", "limit": 1.2, "found": ratio, "held": ratio >= 1.2}
        about["gain"] = {
            "smaller": removed / about["model"]["params"],
            "speed": {"throughput": {"median": ratio, "min": ratio - 0.03, "max": ratio + 0.04}},
            "figures": {
                "prefill": {"dense": 0.021, "pruned": 0.021 / ratio},
                "decode": {"dense": 0.018, "pruned": 0.017},
            },
            "limits": [limit | ({} if limit["held"] else {"says": missed})],
            "uneven": ["MLP width of layer 7 is 613, no multiple of 64 or 128"],
        }
        about |= {"gates": {}, "timings": {"tune and prune": 80.0 + index, "cut and check": 9.0, "evaluate": 31.0}}
        about["failed"] = "" if limit["held"] else f"{size_folder} ended outside a limit: {missed}"
        (size_folder / "manifest.json").write_text(json.dumps(about))
        pruned = evaluations() | {"pruned": Evaluation({**_choice_tasks("pruned" if keep > 0.5 else "dense")})}
        (size_folder / "evaluation" / "pruned.json").write_text(pruned["pruned"].to_json())
    (folder / "config.yaml").write_text(yaml.safe_dump(to_mapping(config), sort_keys=False))
    shared = {name: value for name, value in manifest().items() if name not in ("pruned", "gates", "selfcheck")}
    shared |= {
        "sizes": [f"sizes/{keep:g}" for keep in keeps],
        "timings": {"teacher": 61.0, "evaluate": 44.0, "bench": 35.0},
    }
    (folder / "manifest.json").write_text(json.dumps(shared))
    return folder
