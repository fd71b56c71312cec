"""Variants of one recipe side by side in one process: quality of each, as a table and as JSON.

    python benchmarks/quality/compare.py recipes/legal.yaml benchmarks/quality/first.yaml --root DATA --out OUT.json

The second file maps a name to changes of the recipe (nested as a recipe); `dense: true` tunes without pruning,
`untuned: true` scores the model as it comes. `--split valid` scores the valid sources instead of test: choices are
made there.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from prunetune.config import RunConfig, load_recipe, merged, to_mapping
from prunetune.console import PlainConsole
from prunetune.data.batches import collate, micro_batches
from prunetune.decide.baselines import BASELINES, Calibration, bias_compensation
from prunetune.decide.select import select
from prunetune.environment import describe
from prunetune.errors import PrunetuneError
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.suite import evaluate
from prunetune.model.loading import load_config
from prunetune.model.sites import dense_plan, kept_params
from prunetune.model.surgery import add_biases, merge_adapters
from prunetune.pipeline import job_of, plainly, teacher_of
from prunetune.setting import Setting, prepare, shape_of
from prunetune.train.loop import tune_and_prune
from prunetune.train.state import Forgetful


def main() -> None:
    options = arguments()
    variants = yaml.safe_load(options.variants.read_text())
    chosen = options.only.split(",") if options.only else list(variants)
    base = prepare(configured(options, {}), resume=False, console=PlainConsole(100))
    rows: list[dict[str, Any]] = []
    PLACES.append(base)
    loaded("dense")

    def cell(name: str) -> None:
        changes = dict(variants[name])
        dense, untuned, baseline = (changes.pop(key, "") for key in ("dense", "untuned", "two-stage"))
        config = configured(options, changes)
        # Data and tokens are read once: variants differ in what comes after.
        setting = replace(base, config=config, shape=shape_of(config, base.sites, load_config(config.model)))
        try:
            with torch.cuda.stream(torch.cuda.Stream()) if torch.cuda.is_available() else nullcontext():
                row = measured(
                    name,
                    setting,
                    base,
                    dense=dense,
                    untuned=untuned,
                    baseline=baseline,
                    split=options.split,
                    save=options.plans,
                )
        except PrunetuneError as failed:
            row = {"variant": name, "error": str(failed)}
        except Exception as failed:
            traceback.print_exc()
            row = {"variant": name, "error": repr(failed)}
        rows.append(row)
        options.out.write_text(json.dumps({"about": about(options, base), "rows": rows}, indent=1))
        print(table(rows), flush=True)

    first = [name for name in chosen if name == "dense"]
    for name in first:
        cell(name)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(cell, [name for name in chosen if name not in first]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("variants", type=Path)
    parser.add_argument("--root", required=True, help="folder of the data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--split", default="valid", help="valid, test, or valid+test")
    parser.add_argument("--only", default="", help="names of variants, comma-separated")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--generate", type=int, default=0)
    parser.add_argument("--plans", type=Path, help="folder to keep plans and evaluations in")
    return parser.parse_args()


def configured(options: argparse.Namespace, changes: dict[str, Any]) -> RunConfig:
    fixed = {
        "model": options.model,
        "out": str(options.out.with_suffix(".unused")),
        "data": {"root": options.root, "too_long": "truncate", "max_length": 2048},
        "evaluate": {"limit": options.limit, "generate_limit": options.generate},
    }
    return load_recipe(options.recipe, merged(fixed, changes))


def measured(
    name: str,
    setting: Setting,
    base: Setting,
    *,
    dense: bool,
    untuned: bool,
    baseline: str,
    split: str,
    save: Path | None,
) -> dict[str, Any]:
    """Tune (and prune) one variant and score it."""
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started, plan, observer = time.monotonic(), dense_plan(setting.sites), Curve()
    if dense:
        model = copy.deepcopy(dense_tuned(setting))
    else:
        model, teacher = fresh(base), teacher_of(setting, lambda: dense_tuned(base))
    if not (dense or untuned):
        started = time.monotonic()
        given = baseline_plan(setting, model, baseline) if baseline else None
        plan = tune_and_prune(job_of(setting, model, Forgetful(), observer, given, teacher))
        merge_adapters(model)
    trained = time.monotonic() - started
    memory = torch.cuda.max_memory_allocated() / 1e6 if setting.device.type == "cuda" else 0.0
    found = {
        one: evaluate(
            model, setting.tokenizer, setting.splits.parts()[one], setting.config.data, setting.config.evaluate
        )
        for one in split.split("+")
    }
    if save:
        save.mkdir(parents=True, exist_ok=True)
        (save / f"{name}.plan.json").write_text(plan.to_json())
        for one, result in found.items():
            (save / f"{name}.{one}.json").write_text(result.to_json())
    kept = kept_params(setting.sites, plan) / sum(site.params for site in setting.sites)
    return {
        "variant": name,
        "kept": kept,
        **{f"{one} {key}": value for one, result in found.items() for key, value in headline(result).items()},
        "valid_nll": observer.valid[-1]["nll"] if observer.valid else None,
        "train_seconds": trained,
        "eval_seconds": time.monotonic() - started - trained,
        "peak_mb": memory,
        "curve": observer.valid,
        "scores": {
            one: {task: {m: [s.value, s.se] for m, s in r.scores.items()} for task, r in result.tasks.items()}
            for one, result in found.items()
        },
    }


LOCK = threading.Lock()


def baseline_plan(setting: Setting, model: Any, name: str) -> Any:
    """The plan of a two-stage baseline; FLAP's biases are put on the model."""
    job = job_of(setting, model, Forgetful(), Curve())
    examples = [one for index in range(16) for one in job.search.batch(index)]
    batches = [collate(part, job.pad_id) for part in micro_batches(examples, 8192)]
    calibration = Calibration(model, setting.sites, tuple(batches), setting.config.seed)
    plan = select(BASELINES[name](calibration), setting.sites, setting.config.budget.keep, setting.shape)
    if name == "flap":
        add_biases(model, bias_compensation(calibration, plan))
    return plan


@cache
def tuned_once(key: str) -> list[Any]:
    """A place for the dense tuned model of one recipe."""
    return []


@cache
def loaded(name: str) -> Any:
    return PLACES[0].load().model


PLACES: list[Setting] = []


def fresh(setting: Setting) -> Any:
    return copy.deepcopy(loaded("dense"))


def dense_tuned(setting: Setting) -> Any:
    """The dense model tuned with the recipe's data and steps, made once for all variants that learn from it."""
    config = setting.config
    place = tuned_once(json.dumps([to_mapping(config)["train"], to_mapping(config)["lora"], config.seed]))
    with LOCK:
        if not place:
            model = fresh(setting)
            tune_and_prune(job_of(plainly(setting), model, Forgetful(), Curve(), dense_plan(setting.sites)))
            merge_adapters(model)
            place.append(model)
    return place[0]


def headline(result: Evaluation) -> dict[str, float]:
    """Mean accuracy and NLL over tasks, mean ROUGE-L, and each text's perplexity."""
    texts = {
        f"ppl {task}": r.scores["perplexity"].value for task, r in result.tasks.items() if "perplexity" in r.scores
    }
    return {"acc": result.mean_accuracy(), "nll": result.mean_nll(), "rouge": result.mean("rouge_l").value, **texts}


class Curve:
    """Keeps what validation saw."""

    def __init__(self) -> None:
        self.valid: list[dict[str, Any]] = []

    def step(self, record: dict[str, Any]) -> None:
        if record["step"] % 50 == 0 or record["step"] == 1:
            about = f"{record['phase']} loss {record['loss']:.3f} kept {record['kept']:.3f} {record['seconds']:.0f} s"
            print(f"step {record['step']} {about} lasso {record.get('lasso', 0):.3f}", flush=True)

    def validation(self, record: dict[str, Any]) -> None:
        self.valid.append(record)
        print(f"valid {record['nll']:.4f}", flush=True)


def about(options: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "recipe": str(options.recipe),
        "split": options.split,
        "device": describe(setting.device),
        "commit": commit,
        "dtype": str(setting.dtype),
        "torch": torch.__version__,
    }


def table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("curve", "scores", "error")))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row.get(key) for key in columns]
        lines.append(
            "| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
