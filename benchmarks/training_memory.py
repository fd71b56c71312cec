"""E3: the most memory that each phase of a run holds, and the time of its steps, by geometry and precision.

    python benchmarks/training_memory.py [--geometry llama-3-8b] [--precision nf4|bf16] [--sequence 1024] [--batch 1]
        [--rank 128] [--checkpointing auto|on|off] [--teacher none|base] [--layers 0] [--micro-tokens N] [--device cuda]

The loop of a run (`tune_and_prune`): `--steps` steps with up to four cuts, each after its scores, and as many to
tune, on random weights and tokens; a third of a sequence is its answer. An nf4 model never stands in memory in full.
Prints JSON: peak bytes and median seconds a step by phase, beside what `budget.memory` computes. On a CPU it tries the
code alone (`--geometry tiny`): memory there is the whole process's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, replace
from typing import Any

import torch
from geometries import GEOMETRIES, made

from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.cost.training_memory import estimate_memory, training_setup, training_shapes
from prunetune.data.batches import BatchStream
from prunetune.data.encoding import Example
from prunetune.pipeline.prepare import resolve_auto
from prunetune.pruning.units import kept_params
from prunetune.search.plan_rules import PlanConstraints, default_align
from prunetune.train import loop
from prunetune.train.checkpoints import NullCheckpointStore
from prunetune.train.forward import base_teacher
from prunetune.train.job import TrainingJob
from prunetune.train.schedule import build_schedule
from prunetune.train.weight_trainer import WeightTrainer
from prunetune.utils.environment import device_name, peak_memory_mb


class Phases:
    """Hears of steps; keeps the peak and the seconds of each phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, float] = {}
        self.seconds: dict[str, list[float]] = {}
        self.losses: list[float] = []
        self.started = time.perf_counter()

    def mark(self, phase: str) -> None:
        """What was held since the last mark counts for `phase`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.peaks[phase] = max(self.peaks.get(phase, 0), peak_memory_mb(self.device) / 1e3)
        self.seconds.setdefault(phase, []).append(now - self.started)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.started = time.perf_counter()

    def step(self, record: dict[str, Any]) -> None:
        self.losses.append(record["loss"])
        self.mark(record["phase"] if record["step"] > 1 else "first step, scores included")

    def validation(self, record: dict[str, Any]) -> None:
        self.mark("validation")


def config_of(args: argparse.Namespace) -> RunConfig:
    steps = 2 * args.steps
    return from_mapping({
        "budget": {"keep": args.keep},
        "train": {
            "steps": steps, "batch_size": args.batch, "micro_tokens": args.micro_tokens or args.sequence,
            "checkpointing": args.checkpointing, "weights": args.weights, "validate_every": 10**6,
            "packing": args.packing,
        },
        "lora": {"rank": args.rank, "quantize": "nf4" if args.precision == "nf4" else "off"},
        "search": {"cuts": 4, "span": args.steps / steps, "init_batches": 1, "batch_size": args.batch},
        "distill": {"teacher": args.teacher},
    })  # fmt: skip


def examples(vocabulary: int, length: int, count: int = 8) -> tuple[Example, ...]:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randint(3, vocabulary, (count, length), generator=rng).tolist()
    return tuple(Example(tuple(row), 2 * length // 3, f"row {index}") for index, row in enumerate(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", default="llama-3-8b", choices=GEOMETRIES)
    parser.add_argument("--precision", default="nf4", choices=["nf4", "bf16", "f32"])
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--micro-tokens", type=int, default=0, help="0: one sequence")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=4, help="in which it is cut, and of tuning")
    parser.add_argument("--layers", type=int, default=0, help="0: all of them")
    parser.add_argument("--checkpointing", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--packing", default="auto", choices=["auto", "off"])
    parser.add_argument("--weights", default="auto", choices=["auto", "all", "adapters"])
    parser.add_argument("--teacher", default="none", choices=["none", "base"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.float32 if args.precision == "f32" else torch.bfloat16
    phases, began = Phases(device), time.perf_counter()
    model, sites = made(args.geometry, device, dtype, layers=args.layers, quantize=config_of(args).lora.quantize)
    config = resolve_auto(config_of(args), sites)
    structure, _ = made(args.geometry, torch.device("meta"), dtype, layers=args.layers)
    shapes, setup = training_shapes(structure, sites), training_setup(config, dtype, longest=args.sequence)
    teacher = base_teacher(model, config.distill) if args.teacher == "base" else None
    phases.mark("load")
    stream = BatchStream(examples(shapes.vocab_size, args.sequence), args.batch, 0)
    job = TrainingJob(
        model=model, sites=sites, constraints=PlanConstraints("per-layer", default_align(sites)),
        train_stream=stream, search_stream=stream, valid_examples=(), pad_id=0,
        config=config, schedule=build_schedule(config),
        checkpoints=NullCheckpointStore(), observer=phases,
        teacher=teacher,
    )  # fmt: skip
    genuine = WeightTrainer.cut

    def cut(self: WeightTrainer, plan: Any, steps: int) -> None:
        phases.mark("before a cut")
        genuine(self, plan, steps)
        phases.mark("cut")

    WeightTrainer.cut = cut  # type: ignore[method-assign]  # to tell its memory from that of the steps
    plan = loop.tune_and_prune(job)
    keep_by_phase = {"scores": 1.0, "prune": job.schedule.keep_after(job.schedule.cuts[0]), "tune": args.keep}
    computed = {
        name: estimate_memory(shapes, replace(setup, keep=keep), phase="scores" if name == "scores" else "tune")
        for name, keep in keep_by_phase.items()
    }
    print(json.dumps({
        "geometry": args.geometry, "precision": args.precision, "layers": shapes.layers, "sequence": args.sequence,
        "batch": args.batch, "rank": args.rank, "checkpointing": config.train.checkpointing, "teacher": args.teacher,
        "device": device_name(device), "torch": torch.__version__,
        "kept": kept_params(sites, plan) / sum(site.params for site in sites),
        "peak_gb": {name: round(value, 3) for name, value in phases.peaks.items()},
        "peak_gib": round(max(phases.peaks.values()) * 1e9 / 2**30, 3),
        "seconds": {name: round(statistics.median(found), 3) for name, found in phases.seconds.items()},
        "computed_gb": {
            name: {part: round(value / 1e9, 3) for part, value in asdict(found).items()}
            | {"total": round(found.total / 1e9, 3)} for name, found in computed.items()
        },
        "losses": [round(loss, 3) for loss in phases.losses], "wall_s": round(time.perf_counter() - began, 1),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
