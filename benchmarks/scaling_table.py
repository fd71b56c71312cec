"""The computed tables of docs/guides/scaling.md and docs/research/scaling.md, as Markdown.

    python benchmarks/scaling_table.py [--measured FILE] [--several]

`quality/tables.py` writes memory_table, sequence_table and replicas_table into the guide. Nothing is measured here:
formulas of `prunetune.cost` on shapes. With a file of lines that `training_memory.py` printed, each line becomes a row
that sets the measurement beside the formula.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from geometries import GEOMETRIES, made
from training_flops import step_flops

from prunetune.config.recipe import from_mapping
from prunetune.cost.training_memory import (
    TrainingMemory,
    TrainingSetup,
    TrainingShapes,
    estimate_memory,
    training_shapes,
)
from prunetune.pipeline.prepare import resolve_auto

NAMES = ("smollm2-135m", "smollm2-1.7b", "llama-3-8b", "llama-3-70b")
PARTS = ("weights", "tuned", "activations", "passing")
CUTS = 4  # as search.cuts
BASE = TrainingSetup(dtype_bytes=2, tokens=1024, rank=128, keep=0.6)


def usual(name: str) -> tuple[TrainingShapes, TrainingSetup]:
    """A model and how it is tuned by default: from a size on a teacher sees half."""
    structure, sites = made(name, torch.device("meta"), torch.bfloat16)
    config = resolve_auto(from_mapping({}), sites)
    return training_shapes(structure, sites), replace(BASE, teacher_share=config.distill.share)


def row(*cells: Any) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def head(*cells: str) -> str:
    return row(*cells) + "\n" + "|" + "---|" * len(cells)


def gb(value: float) -> str:
    return f"{value / 1e9:.1f}"


def in_parts(found: TrainingMemory) -> list[str]:
    return [gb(getattr(found, part)) for part in PARTS]


def first_stage(model: TrainingShapes, setup: TrainingSetup) -> TrainingMemory:
    """Tuning between the first cut and the second: the fullest stage of progressive removal."""
    return estimate_memory(model, replace(setup, keep=1 - (1 - setup.keep) / CUTS), phase="tune")


def peak(model: TrainingShapes, setup: TrainingSetup) -> int:
    """Bytes of the fuller one of the scores before the first cut and the first stage."""
    return max(estimate_memory(model, replace(setup, keep=1.0), phase="scores").total, first_stage(model, setup).total)


VARIANTS = (("off", False, 128), ("off", True, 128), ("nf4", True, 128), ("nf4", True, 32))


def memory_table() -> str:
    """Parts of the first stage; totals of the scores, of the first and the last stage; the peak with a teacher."""
    lines = [
        head(
            "model",
            "base",
            "rank",
            "recomputed",
            *PARTS,
            "scores",
            "first stage",
            "last stage",
            "teacher: base",
            "teacher: dense",
        )
    ]
    for name in NAMES:
        model, base = usual(name)
        for quantize, recompute, rank in VARIANTS:
            setup = replace(base, quantize=quantize, recompute=recompute, rank=rank)
            scores = estimate_memory(model, replace(setup, keep=1.0), phase="scores")
            first, last = first_stage(model, setup), estimate_memory(model, setup, phase="tune")
            taught = replace(setup, teacher=True, distills_hidden=True)
            peaks = [peak(model, replace(taught, teacher_is_base=shared)) for shared in (True, False)]
            lines.append(row(
                name, "nf4" if quantize == "nf4" else "bf16", rank, "yes" if recompute else "no", *in_parts(first),
                *map(gb, (scores.total, first.total, last.total, *peaks)),
            ))  # fmt: skip
    return "\n".join(lines) + "\n"


def sequence_table() -> str:
    """The peak by tokens of a pass, rank 128, without a teacher."""
    lengths = (512, 1024, 2048, 4096, 8192)
    lines = [head("model", "base", "recomputed", *(f"{length} tokens a pass" for length in lengths))]
    for name in ("llama-3-8b", "llama-3-70b"):
        model, base = usual(name)
        for quantize, recompute in (("off", False), ("off", True), ("nf4", True)):
            setup = replace(base, quantize=quantize, recompute=recompute)
            totals = [gb(peak(model, replace(setup, tokens=length))) for length in lengths]
            lines.append(row(name, "nf4" if quantize == "nf4" else "bf16", "yes" if recompute else "no", *totals))
    return "\n".join(lines) + "\n"


def replicas_table() -> str:
    """70B on eight GPUs, a replica in 4 bits on each: the peak by rank and teacher."""
    model, base = usual("llama-3-70b")
    lines = [head("teacher", "rank 32", "rank 128")]
    for teacher, changes in (
        ("none", {}),
        ("base", {"teacher": True, "distills_hidden": True, "teacher_is_base": True}),
        ("dense", {"teacher": True, "distills_hidden": True, "teacher_is_base": False}),
    ):
        setup = replace(base, quantize="nf4", recompute=True, **changes)
        lines.append(row(f"`{teacher}`", *(gb(peak(model, replace(setup, rank=rank))) for rank in (32, 128))))
    return "\n".join(lines) + "\n"


def work_table() -> None:
    print(head("model", "recomputed", "scores of a batch", "tuning step, 60% kept", "the same with a teacher"))
    for name in NAMES:
        model, base = usual(name)
        for recompute in (False, True):
            setup = replace(base, recompute=recompute)
            found = [
                step_flops(model, one, phase=phase, tokens=1000, length=1024, label_share=0.33) / 1e12
                for one, phase in (
                    (replace(setup, keep=1.0), "scores"),
                    (setup, "tune"),
                    (replace(setup, teacher=True), "tune"),
                )
            ]
            print(row(name, "yes" if recompute else "no", *(f"{each:.2f}" for each in found)))


def several_table(ranks: int = 2) -> None:
    """What `distributed.py scale` does, on one GPU and sharded over `ranks`; operations of its steps."""
    (model, base), batch, length = usual("llama-3-8b"), 16, 768
    setup = replace(base, rank=32, tokens=batch * length // 2, keep=1.0)
    one = estimate_memory(model, replace(setup, keep=1.0), phase="scores")
    here = estimate_memory(model, replace(setup, tokens=setup.tokens // ranks), phase="scores")
    layers = setup.dtype_bytes * sum(linear.weight_count for linear in model.linears)
    head = setup.dtype_bytes * model.vocab_size * model.hidden_size
    parts = {
        "layers and embedding": (layers + head) / ranks, "head": head, "two layers gathered": 2 * layers / model.layers,
        "adapters": here.tuned, "generator": here.generator, "activations": here.activations, "logits": here.passing,
    }  # fmt: skip
    total = sum(parts.values())
    words = ", ".join(f"{name} {gb(value)}" for name, value in parts.items())
    print(f"{words}; in all {gb(total)} of {gb(one.total)} GB: {total / one.total:.2f}")
    for phase in ("scores", "tune"):
        work = step_flops(model, setup, phase=phase, tokens=batch * length, length=length, label_share=0.25)
        print(f"{phase}: {work / 1e12:.0f}e12 operations a step")


def measured_table(file: Path) -> None:
    print(head("model", "base", "rank", "tokens", "recomputed", "teacher", "scores: measured", "computed",
               "tune: measured", "computed", "s of a batch's scores", "s a tuning step", "device"))  # fmt: skip
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("{"):
            continue
        one = json.loads(line)
        peaks, computed, seconds = one["peak_gb"], one["computed_gb"], one["seconds"]
        print(row(
            one["geometry"], one["precision"], one["rank"], one["sequence"] * one["batch"], one["checkpointing"],
            one["teacher"], peaks.get("before a cut", "-"), computed["scores"]["total"], peaks.get("tune", "-"),
            computed["tune"]["total"], seconds.get("prune", "-"), seconds.get("tune", "-"), one["device"],
        ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=Path)
    parser.add_argument("--several", action="store_true", help="of several GPUs, beside distributed.py")
    args = parser.parse_args()
    assert set(NAMES) <= set(GEOMETRIES)
    if args.measured:
        measured_table(args.measured)
        return
    if args.several:
        several_table()
        return
    for table in (memory_table, sequence_table, replicas_table):
        print(table())
    work_table()


if __name__ == "__main__":
    main()
