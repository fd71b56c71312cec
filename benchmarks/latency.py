"""Does the latency table tell a plan's time (bar F2)? Build it, then cut random models to random plans and time them.

    python benchmarks/latency.py --out latency.jsonl                       # Llama-3-8B's shape, batch 1 and 32, eager
    python benchmarks/latency.py --runtime recorded --out latency.jsonl    # the steps replayed from a CUDA graph
    python benchmarks/latency.py --tiny --device cpu                       # half a minute, to try it

Plans are uniform and per-layer, half of each, with random widths. Predicted is what `budget.latency` would go by; the
measured time is the median of the runs that `prunetune bench` would time. Each row says the largest error of a phase.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rows import give
from transformers import LlamaConfig

from prunetune.bench.latency.measure import LatencyTableBuilder
from prunetune.bench.latency.request_timing import time_requests
from prunetune.bench.latency.short_models import build_short_model
from prunetune.bench.latency.tables import table_header
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.deployment import max_cost
from prunetune.cost.latency_table import PHASES, LatencyTable, latency_costs
from prunetune.cost.layer_shapes import ModelShape, model_shape
from prunetune.model.loading import pick_device
from prunetune.plan import Plan
from prunetune.pruning.cut import cut
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import Site
from prunetune.utils.environment import device_name, installed_commit

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
TINY = LLAMA_8B | {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
ALIGN = 128
TARGET = 0.05


def random_plan(sites: tuple[Site, ...], rng: random.Random, *, uniform: bool) -> Plan:
    """Aligned widths, at least a tenth of each place; per-layer plans lose attention in some layers."""
    groups, channels = rng.random(), rng.random()
    widths = {}
    for site in sites:
        share = (groups if site.kind == "attention" else channels) if uniform else rng.random()
        if site.kind == "attention":
            lost = not uniform and site.min_units_per_group == 0 and rng.random() < 0.1
            widths[site.name] = 0 if lost else max(1, round(site.units * (0.1 + 0.9 * share)))
        else:
            widths[site.name] = max(ALIGN, round(site.units * (0.1 + 0.9 * share) / ALIGN) * ALIGN)
    return Plan(
        {name: tuple(range(width)) for name, width in widths.items()}, {site.name: site.units for site in sites}
    )


def compared(
    config: LlamaConfig, workload: WorkloadConfig, device: torch.device, table: LatencyTable, plans: int, runs: int
) -> Iterator[dict[str, Any]]:
    """Predicted and measured seconds of the dense model and of every plan, by phase."""
    rng = random.Random(0)
    dense = build_short_model(config, range(config.num_hidden_layers), workload, device)
    sites = find_sites(dense)
    anatomy = model_shape(dense, sites)
    yield {"plan": "dense"} | _errors(anatomy, anatomy.dense_counts(), dense, workload, table, runs)
    for number in range(plans):
        uniform = number % 2 == 0
        plan = random_plan(sites, rng, uniform=uniform)
        small = cut(copy.deepcopy(dense), plan, sites=sites)
        kept = sum(len(plan.kept[site.name]) * site.unit_params for site in sites) / sum(site.params for site in sites)
        name = f"{'uniform' if uniform else 'per-layer'}, {kept:.0%} kept"
        yield {"plan": name} | _errors(anatomy, plan.widths(), small, workload, table, runs)
        del small
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _errors(
    anatomy: ModelShape, counts: dict[str, int], model: Any, workload: WorkloadConfig, table: LatencyTable, runs: int
) -> dict[str, Any]:
    measured = time_requests([model], workload, runs)[0]
    predicted = {phase: max_cost(latency_costs(anatomy, workload, table, phase), counts) for phase in PHASES}
    return {
        "predicted_ms": {phase: 1e3 * seconds for phase, seconds in predicted.items()},
        "measured_ms": {phase: 1e3 * seconds for phase, seconds in measured.items()},
        "error": {phase: predicted[phase] / measured[phase] - 1 for phase in PHASES},
    }


def main() -> None:
    """One row of results a batch size and phase; all plans go to the standard error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--generate", type=int, default=9)
    parser.add_argument("--runtime", choices=["eager", "recorded"], default="eager")
    parser.add_argument("--points", type=int, default=16, help="widths of an MLP; half as many above batch 8")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--plans", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="a small shape and short prompts")
    parser.add_argument("--out", type=Path, help="append rows to this file")
    options = parser.parse_args()
    device = pick_device(options.device)
    config = LlamaConfig(**(TINY if options.tiny else LLAMA_8B))
    for batch in options.batch:
        workload = WorkloadConfig(
            prompt=32 if options.tiny else options.prompt, generate=4 if options.tiny else options.generate,
            batch=2 if options.tiny and batch > 2 else batch, runtime=options.runtime,
            dtype="float32" if device.type == "cpu" else "bfloat16",
        )  # fmt: skip
        points = options.points if batch <= 8 else max(2, options.points // 2)
        begun = time.monotonic()
        table = LatencyTableBuilder(config, workload, device, ALIGN, points, options.runs).measure(
            table_header(config, workload, device, ALIGN)
        )
        built = time.monotonic() - begun
        found = list(compared(config, workload, device, table, options.plans, options.runs))
        for row in found:
            print(json.dumps(row), file=sys.stderr)
        print(f"batch {batch}: table {built:.0f} s, all {time.monotonic() - begun:.0f} s", file=sys.stderr)
        for phase in PHASES:
            worst = max(abs(row["error"][phase]) for row in found)
            give({
                "bar": "F2",
                "case": f"{phase} of {'a tiny shape' if options.tiny else 'Llama-3-8B'}, prompt {workload.prompt}, "
                f"{workload.generate} written, batch {workload.batch}, {options.runtime}: largest error of the table "
                f"over the dense model and {options.plans} random plans (" + "; ".join(
                    f"{row['plan']}: {row['predicted_ms'][phase]:.2f} ms for {row['measured_ms'][phase]:.2f} ms"
                    for row in found
                ) + f"); {points} widths, {built:.0f} s",
                "value": round(worst, 4), "target": f"<= {TARGET}", "met": worst <= TARGET, "unit": "share",
                "device": device_name(device), "command": " ".join(["python", "benchmarks/latency.py", *sys.argv[1:]]),
                "commit": installed_commit()[:7],
            }, options.out)  # fmt: skip


if __name__ == "__main__":
    main()
