"""G1 on real data: a run on N GPUs beside runs on one with the same batches, and with other seeds.

    python benchmarks/ranks_quality.py RECIPE --out OUT [--gpus 2] [--seeds 0 1 2] [--jobs 3] -- --data.root DATA

Words after `--` go to every run. Runs on one GPU share the GPUs, `--jobs` at a time; then the first seed
runs on all of them by DDP. Prints JSON: loss on valid at the end of each, and which share of the units that one plan
keeps another keeps, too. In bfloat16 the order of a sum changes bits, so no two runs on other GPUs decide alike to the
last unit. Two things say how much of a difference is noise: another seed, and `parts`, the first seed on one GPU whose
passes hold fewer tokens, so that sums are taken in as many parts as by several GPUs. `--device cpu` tries it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prunetune.plan import Plan

PART = 3072  # tokens: about half of a batch of the recipes for legal and healthcare data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=0, help="runs on one GPU at a time; 0: as many as GPUs")
    parser.add_argument("--device", default="auto")
    told, others = parser.parse_known_args()
    others = [word for word in others if word != "--"]
    words = ["-m", "prunetune.cli", "run", told.recipe, "--device", told.device, *others]
    told.out.mkdir(parents=True, exist_ok=True)
    parts = ["--train.micro-tokens", str(PART)]
    alone = [(f"seed-{seed}", seed, list[str]()) for seed in told.seeds] + [("parts", told.seeds[0], parts)]
    places = [told.out / name for name, *_ in alone]
    with ThreadPoolExecutor(told.jobs or told.gpus) as pool:
        seconds = list(pool.map(
            lambda at: run([sys.executable, *words, *alone[at][2]], places[at], alone[at][1], gpu=at % told.gpus),
            range(len(alone)),
        ))  # fmt: skip
    several = told.out / f"gpus-{told.gpus}"
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(told.gpus)]
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes"]
    start = [sys.executable, *torchrun] if told.device == "cpu" else [*launch, str(told.gpus)]
    seconds.append(run([*start, *words], several, told.seeds[0], gpu=None))
    print(json.dumps(summary([*places, several], seconds, others), indent=1))


def run(command: Sequence[str], place: Path, seed: int, *, gpu: int | None) -> float:
    """To its end; its seconds."""
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    started = time.monotonic()
    with place.with_suffix(".log").open("wb") as log:
        ended = subprocess.run(
            [*command, "--out", str(place), "--seed", str(seed)], env=environment, stdout=log, stderr=log, check=False
        )
    if ended.returncode:
        raise SystemExit(f"{place.name} ended with {ended.returncode}: {place.with_suffix('.log').read_text()[-2000:]}")
    return round(time.monotonic() - started, 1)


def summary(places: Sequence[Path], seconds: Sequence[float], words: Sequence[str]) -> dict[str, Any]:
    """All against the first; the last is that of several GPUs, the one before that in parts, all others are seeds."""
    plans = [Plan.load(place / "plan.json") for place in places]
    losses = [final(place) for place in places]
    alone = losses[:-2]
    return {
        "bar": "G1", "words": list(words), "runs": [place.name for place in places], "seconds": list(seconds),
        "valid loss": losses,
        "on one GPU: mean": statistics.mean(alone),
        "sd": statistics.stdev(alone) if len(alone) > 1 else None,
        "spread": max(alone) - min(alone),
        "several, from the same seed's": losses[-1] - losses[0],
        "in parts, from the same seed's": losses[-2] - losses[0],
        "units in common with the first": [round(common(plans[0], plan), 4) for plan in plans],
    }  # fmt: skip


def final(place: Path) -> float:
    """Loss on valid at the last validation."""
    lines = (place / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    return float(json.loads(lines[-1])["nll"])


def common(first: Plan, second: Plan) -> float:
    """The share of the units that one keeps and the other keeps, too; mean over sites that lose some."""
    shares = [
        len(set(first.kept[name]) & set(second.kept[name])) / max(1, len(first.kept[name]), len(second.kept[name]))
        for name, units in first.units.items()
        if min(len(first.kept[name]), len(second.kept[name])) < units
    ]
    return statistics.mean(shares) if shares else 1.0


if __name__ == "__main__":
    main()
