"""M6: what a run costs beside plain LoRA tuning of the dense model by transformers' Trainer and peft.

    python benchmarks/training_cost.py [--geometry smollm2-135m] [--sequence 512] [--batch 16] [--steps 60] [--keep 0.6]
        [--runs trainer dense progressive taught] [--whole 700] [--teacher-share 0] [--compile on|off|auto]
        [--micro-tokens 16384] [--score-batches 16] [--repeats 1] [--profile 0] [--device cuda]

Random weights in a known shape, random tokens, the last third of a sequence is its answer; every run sees the same
batches in the same order, with AdamW of one learning rate. `trainer`: Trainer and peft, eager, bfloat16; `dense`: our
loop on the same adapters of the same model; `progressive`: cuts in the first fifth, and tuning, without a teacher;
`taught`: the same with the untuned model as teacher. Runs take turns. Prints JSON: time and tokens a second of the
steps after the first fifth (in which passes are recorded and compiled), seconds of the whole, peak memory, losses, use
of the device's arithmetic (MFU), ratios to `trainer`, and the seconds of a run of `--whole` steps: what each cut takes
beyond a step (scores, recording anew) counts as often as measured, steps as often as that run has them. Give it 60
steps or more: with fewer, every step before the last cut has one. `--profile 8` lists the kernels of the last 8 steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from geometries import GEOMETRIES, made
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.data.batches import BatchStream
from prunetune.data.encoding import Example
from prunetune.pipeline.prepare import resolve_auto
from prunetune.pruning.units import dense_plan, prunable_params
from prunetune.search.plan_rules import PlanConstraints, default_align
from prunetune.train.checkpoints import NullCheckpointStore
from prunetune.train.forward import base_teacher
from prunetune.train.job import TrainingJob
from prunetune.train.loop import tune_and_prune
from prunetune.train.schedule import build_schedule, one_cut_schedule
from prunetune.utils.environment import device_name, peak_memory_mb

PEAK = {"H100": 989e12, "H200": 989e12}  # bfloat16 operations a second, dense, by data sheet
RANK, RATE = 32, 5e-4


class Clock:
    """Hears of steps; keeps when they ended, and their losses."""

    def __init__(self, device: torch.device, profiled_from: int = -1) -> None:
        self.device = device
        self.profiled_from = profiled_from  # the step after which kernels are recorded; -1: never
        kernels = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
        self.profiler = torch.profiler.profile(activities=[kernels])
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.phases: list[str] = []
        self.began = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self, record: dict[str, Any]) -> None:
        self.ends.append(self._now())
        self.losses.append(record["loss"])
        self.phases.append(record.get("phase", "tune"))
        if len(self.ends) == self.profiled_from:
            self.profiler.start()

    def kernels(self) -> str:
        """The kernels since `profiled_from` that took most time, as a table."""
        self.profiler.stop()
        return self.profiler.key_averages().table(
            sort_by=f"{self.device.type}_time_total", row_limit=25, max_name_column_width=70
        )

    def validation(self, record: dict[str, Any]) -> None:
        pass

    def told(self, tokens: int, whole: int) -> dict[str, Any]:
        """`tokens` of a step; `whole` steps of the run that is projected."""
        first = len(self.ends) // 5
        steady = (self.ends[-1] - self.ends[first]) / (len(self.ends) - 1 - first)
        return {
            "step_ms": round(steady * 1e3, 2),
            "tokens_a_second": round(tokens / steady),
            "whole_s": round(self.ends[-1] - self.began, 2),
            "projected_s": round(self._projected(whole), 1),
            "phases": self._by_phase(),
            "peak_gb": round(peak_memory_mb(self.device) / 1e3, 3),
            "losses": [round(loss, 4) for loss in self.losses],
        }

    def _projected(self, whole: int) -> float:
        """Seconds of a run of so many steps: what each phase takes beyond its steps comes once, its steps as often.

        While the model is cut most steps of a short benchmark decide, or record passes anew: the fastest is a step's.
        """
        took, scale = self._by_phase(), whole / len(self.ends)
        each = {phase: found["fastest_ms" if phase == "prune" else "median_ms"] / 1e3 for phase, found in took.items()}
        return sum(found["s"] + each[phase] * found["steps"] * (scale - 1) for phase, found in took.items())

    def _by_phase(self) -> dict[str, dict[str, float]]:
        """Seconds of each phase, its first step among them, and the median step's."""
        took: dict[str, list[float]] = {}
        for phase, end, before in zip(self.phases, self.ends, [self.began, *self.ends], strict=False):
            took.setdefault(phase, []).append(end - before)
        return {
            phase: {
                "steps": len(each), "s": round(sum(each), 2), "first_s": round(each[0], 2),
                "median_ms": round(1e3 * statistics.median(each), 1), "fastest_ms": round(1e3 * min(each), 1),
            }
            for phase, each in took.items()
        }  # fmt: skip


class Rows(Dataset[dict[str, list[int]]]):
    """The batches of a stream as rows, in order."""

    def __init__(self, stream: BatchStream, steps: int) -> None:
        self.examples = [example for step in range(steps) for example in stream.batch_at(step)]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        one = self.examples[index]
        return {
            "input_ids": list(one.token_ids),
            "labels": [-100] * one.answer_start + list(one.token_ids[one.answer_start :]),
        }


class InOrder(Trainer):  # type: ignore[misc]
    """Batches as they stand."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)


class Hears(TrainerCallback):  # type: ignore[misc]
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.clock.step({"loss": float(logs["loss"])})


def trainer(asked: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Clock:
    model, _ = made(asked.geometry, device, dtype, layers=asked.layers)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=linears))
    arguments = TrainingArguments(
        "trainer-out", per_device_train_batch_size=asked.batch, max_steps=asked.steps, learning_rate=RATE,
        lr_scheduler_type="constant", bf16=dtype == torch.bfloat16, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, dataloader_pin_memory=False, use_cpu=device.type == "cpu",
    )  # fmt: skip
    clock = clock_of(asked, device)
    rows = Rows(stream_of(asked, model.config.vocab_size), asked.steps)
    InOrder(tuned, arguments, train_dataset=rows, data_collator=side_by_side, callbacks=[Hears(clock)]).train()
    return clock


def side_by_side(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def ours(asked: argparse.Namespace, device: torch.device, dtype: torch.dtype, kind: str) -> Clock:
    model, sites = made(asked.geometry, device, dtype, layers=asked.layers)
    config, dense = resolve_auto(config_of(asked, kind), sites), kind == "dense"
    teacher = base_teacher(model, config.distill) if kind == "taught" else None
    stream, clock = stream_of(asked, model.config.vocab_size), clock_of(asked, device)
    tune_and_prune(TrainingJob(
        model=model, sites=sites, constraints=PlanConstraints("per-layer", default_align(sites)),
        train_stream=stream, search_stream=stream, valid_examples=(), pad_id=0,
        config=config, checkpoints=NullCheckpointStore(), observer=clock,
        schedule=one_cut_schedule(config) if dense else build_schedule(config),
        teacher=teacher,
        given_plan=dense_plan(sites) if dense else None,
    ))  # fmt: skip
    return clock


def clock_of(asked: argparse.Namespace, device: torch.device) -> Clock:
    return Clock(device, asked.steps - asked.profile if asked.profile else -1)


def config_of(asked: argparse.Namespace, kind: str) -> RunConfig:
    return from_mapping({
        "budget": {"keep": asked.keep},
        "train": {
            "steps": asked.steps, "batch_size": asked.batch, "learning_rate": RATE, "warmup": 0, "decay": "constant",
            "validate_every": 10**6, "checkpoint_every": 10**6, "compile": asked.compile,
            "weights": "adapters" if kind == "dense" else asked.weights,
            "micro_tokens": max(asked.micro_tokens, asked.sequence),
        },
        "lora": {"rank": RANK},
        "distill": {"share": asked.teacher_share},
        "search": {"batch_size": asked.batch, "init_batches": asked.score_batches},
    })  # fmt: skip


def stream_of(asked: argparse.Namespace, vocabulary: int) -> BatchStream:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randint(3, vocabulary, (4 * asked.batch, asked.sequence), generator=rng).tolist()
    answers = 2 * asked.sequence // 3
    return BatchStream([Example(tuple(row), answers, f"row {index}") for index, row in enumerate(rows)], asked.batch, 0)


RUNS: dict[str, Callable[[argparse.Namespace, torch.device, torch.dtype], Clock]] = {
    "trainer": trainer,
    "dense": lambda *given: ours(*given, "dense"),
    "progressive": lambda *given: ours(*given, "progressive"),
    "taught": lambda *given: ours(*given, "taught"),
}


def measured(
    asked: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, dict[str, Any]]]:
    for _ in range(asked.repeats):
        for name in asked.runs:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            clock = RUNS[name](asked, device, dtype)
            if asked.profile:
                print(clock.kernels(), flush=True)
            yield name, clock.told(asked.batch * asked.sequence, asked.whole)
            del clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="smollm2-135m", choices=GEOMETRIES)
    parser.add_argument("--layers", type=int, default=0, help="0: all of them")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--whole", type=int, default=700, help="steps of the run whose seconds are projected")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--teacher-share", type=float, default=0, help="`distill.share`; 0: by the model's size")
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--weights", default="auto", choices=["auto", "all", "adapters"])
    parser.add_argument("--micro-tokens", type=int, default=16384, help="most tokens of one pass")
    parser.add_argument("--score-batches", type=int, default=16, help="`search.init_batches`")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--profile", type=int, default=0, help="steps at the end whose kernels are listed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in asked.runs}
    for name, found in measured(asked, device, dtype):
        told[name].append(found)
        print(json.dumps({name: {key: value for key, value in found.items() if key != "losses"}}), flush=True)
    print(json.dumps(summary(asked, told, device), indent=1))


def summary(asked: argparse.Namespace, told: dict[str, list[dict[str, Any]]], device: torch.device) -> dict[str, Any]:
    def median(name: str, key: str) -> float:
        return statistics.median(float(one[key]) for one in told[name])

    result: dict[str, Any] = {**vars(asked), "device": device_name(device), "torch": torch.__version__, "told": told}
    if "trainer" in told:
        result["ratios to trainer"] = {
            name: {
                key: round(median(name, key) / median("trainer", key), 3)
                for key in ("tokens_a_second", "projected_s", "peak_gb")
            }
            for name in told
        }
    peak = next((value for name, value in PEAK.items() if name in device_name(device)), None)
    if peak:
        structure, sites = made(asked.geometry, torch.device("meta"), torch.bfloat16, layers=asked.layers)
        head = structure.config.vocab_size * structure.config.hidden_size
        # Forward 2 and backward 2 a weight and token (frozen: no gradient of weights); the head where labels are.
        work = 4 * (prunable_params(sites) + head / 3)
        result["mfu"] = {
            name: round(work * median(name, "tokens_a_second") / peak, 3)
            for name in told
            if name in ("trainer", "dense")
        }
    return result


if __name__ == "__main__":
    main()
