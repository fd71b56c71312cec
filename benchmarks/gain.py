"""What a cut gains on this device (bar F3): a dense model and two cut ones in memory, in turns, no file of weights.

    python benchmarks/gain.py --out rows.jsonl            # Llama-3-8B's shape: about two minutes on an H100, 70 GB
    python benchmarks/gain.py --tiny --device cpu         # seconds, to try it

Weights are random. One plan is uniform, the other per-layer, by random scores that fall with depth, so that widths
differ; both keep 0.6 of the decoder's parameters, in multiples of 128 channels. The peak of memory of each model is
taken when it is made, before the next one: what was there before is not its own. Speeds are those that `prunetune
bench` times, and so are the promises. The bar asks for decode steps without Python: those that it launches are said on
the standard error alone. `--runtimes compiled --batch 1`: prefill and step compiled whole, minutes for 8B.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from geometries import made
from inference import rows
from rows import give

from prunetune.bench import clock
from prunetune.bench.interleaved import run_interleaved
from prunetune.bench.local import LocalRunner
from prunetune.bench.models import ModelSpec
from prunetune.bench.options import BenchOptions
from prunetune.bench.result import summarise_bench
from prunetune.bench.runner_protocol import ModelFacts
from prunetune.export.checkpoint import kv_groups_validator
from prunetune.model.loading import pick_device
from prunetune.plan import Plan
from prunetune.pruning.cut import cut
from prunetune.pruning.units import Site, kept_params
from prunetune.search.plan_rules import PlanConstraints, default_align
from prunetune.search.select import select
from prunetune.utils import environment

FALL, APART = 1.5, 0.3  # of scores from the first layer to the last, and by site: in deviations of a unit's own
LARGE, FEW = 8, 3  # from this batch on, so many rounds
Peaks = dict[tuple[str, str, int], int | None]  # (model, runtime, batch) -> bytes


class Standing(LocalRunner):
    """A model that is in memory already, beside `before` bytes of others."""

    def __init__(self, name: str, model: Any, options: BenchOptions, before: int = 0) -> None:
        self.given = model
        super().__init__(ModelSpec(name, "in memory"), options)
        self.before = before

    def _opened(self) -> Any:
        return self.given

    def _flops(self, batch: int) -> float:
        return batch * super()._flops(1)

    def facts(self) -> ModelFacts:
        """Nothing was read."""
        parameters = sum(weight.numel() for weight in self.model.parameters())
        words = runtime_of(self.options)
        return ModelFacts(words, environment.device_name(self.device), self.options.dtype, parameters, 0, 0.0)


def plan_of(sites: Sequence[Site], model_config: Any, layout: str, keep: float) -> Plan:
    """By random scores that fall with depth."""
    rng, last = torch.Generator().manual_seed(0), max(site.layer for site in sites)
    scores = {
        site.name: torch.randn(site.units, generator=rng)
        + APART * torch.randn(1, generator=rng)
        - FALL * site.layer / last
        for site in sites
    }
    return select(
        scores, sites, keep, PlanConstraints(layout, default_align(sites), 0, kv_groups_validator(model_config))
    )


def models_of(geometry: str, device: torch.device, dtype: torch.dtype, keep: float) -> Iterator[tuple[str, Any]]:
    """The dense model, and two that are cut out of copies of it, each made when it is asked for."""
    dense, sites = made(geometry, device, dtype)
    yield "dense", dense
    for layout in ("uniform", "per-layer"):
        plan = plan_of(sites, dense.config, layout, keep)
        small = cut(copy.deepcopy(dense), plan, sites=sites)
        say({"model": layout, "kept": kept_params(sites, plan) / sum(site.params for site in sites), **widths(plan)})
        yield layout, small


def widths(plan: Plan) -> dict[str, list[int]]:
    """By kind, from the first layer to the last."""
    return {
        kind: [width for name, width in plan.widths().items() if name.endswith(suffix)]
        for kind, suffix in (("KV groups", "self_attn"), ("channels", "mlp"))
    }


def ways(options: argparse.Namespace) -> list[BenchOptions]:
    """Every runtime and batch that models are asked in."""
    return [
        BenchOptions(
            prompt=options.prompt, generate=options.generate, batch=str(batch), device=options.device,
            runs=min(FEW, options.runs) if batch > LARGE else options.runs, record=runtime == "recorded",
            compile=runtime == "compiled",
            dtype="float32" if pick_device(options.device).type == "cpu" else "bfloat16",
        )
        for runtime in options.runtimes
        for batch in options.batch
    ]  # fmt: skip


def peaks_of(name: str, model: Any, before: int, asked: Sequence[BenchOptions]) -> Peaks:
    """Of prefill and decode with cache, when a step has been recorded. What is compiled keeps memory of its own."""
    found: Peaks = {}
    for options in (each for each in asked if not each.compile):
        runner, batch = Standing(name, model, options, before), options.batches[0]
        samples = [runner.run(batch) for _ in range(1 + options.record)]
        # On the CPU it is the process's, of all that was there before, too.
        found[name, runtime_of(options), batch] = samples[-1].peak_bytes if runner.device.type == "cuda" else None
        del runner
        emptied()
    return found


def runtime_of(options: BenchOptions) -> str:
    """As rows call it."""
    return "recorded" if options.record else "compiled" if options.compile else "eager"


def emptied() -> None:
    """What nobody holds is given back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_turns(models: Mapping[str, Any], peaks: Peaks, options: BenchOptions) -> dict[str, Any]:
    """One runtime and batch, as `prunetune bench --json` has it."""
    emptied()
    runners = [Standing(name, model, options) for name, model in models.items()]
    measured = run_interleaved(runners, options.batches, options.runs)
    for name, (cell,) in zip(models, measured, strict=True):
        peak = peaks.get((name, runtime_of(options), cell.batch))
        cell.samples = [replace(sample, peak_bytes=peak) for sample in cell.samples]
        if cell.failed:
            raise SystemExit(f"{name}, batch {cell.batch}: {cell.failed}")
    facts = [runner.facts() for runner in runners]
    return summarise_bench(
        list(models), facts, measured, options=options, versions=environment.package_versions()
    ).to_dict()


def say(record: Mapping[str, Any]) -> None:
    """For whoever looks on."""
    print(json.dumps(record), file=sys.stderr, flush=True)


def main() -> None:
    """Rows of the bar; all figures go to the standard error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--geometry", default="llama-3-8b")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--generate", type=int, default=16)
    parser.add_argument("--runtimes", nargs="+", choices=["eager", "recorded", "compiled"])
    parser.add_argument("--runs", type=int, default=5, help=f"rounds; {FEW} at most above batch {LARGE}")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="a small shape, short prompts, batch 1 and 2")
    parser.add_argument("--out", type=Path, help="append rows to this file")
    told = parser.parse_args()
    device = pick_device(told.device)
    torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]  # three models, two shapes
    if told.tiny:
        told.geometry, told.batch, told.prompt, told.generate = "tiny", [1, 2], 32, 4
    told.runtimes = told.runtimes or (["recorded", "eager"] if device.type == "cuda" else ["eager"])
    asked = ways(told)
    dtype = getattr(torch, asked[0].dtype)
    models: dict[str, Any] = {}
    peaks = peaks_of("none", made("tiny", device, dtype)[0], 0, asked)  # libraries take what they will hold for all
    before = clock.current_bytes(device)
    for name, model in models_of(told.geometry, device, dtype, told.keep):
        models[name] = model
        peaks |= peaks_of(name, model, before, asked)
        before = clock.current_bytes(device)
    for options in asked:
        bench = in_turns(models, peaks, options)
        say(bench)
        case = f"{told.geometry}, {told.keep:g} kept, prompt {told.prompt}, {runtime_of(options)}, {asked[0].dtype}"
        for row in rows(bench, case):
            row = {
                "bar": "F3", **row, "device": environment.device_name(device),
                "command": shlex.join(["python", "benchmarks/gain.py", *sys.argv[1:]]),
                "commit": environment.installed_commit()[:7],
            }  # fmt: skip
            if ": decode ratio" in row["case"] and runtime_of(options) == "eager":
                say(row)
            else:
                give(row, told.out)


if __name__ == "__main__":
    main()
