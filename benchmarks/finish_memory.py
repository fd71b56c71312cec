"""Memory and time of a run's last stage on one GPU or CPU: merge, cut, write and check, layer by layer or as a whole.

    python benchmarks/finish_memory.py [--geometry smollm2-1.7b] [--layers 0] [--quantize off|nf4] [--whole]

A random model in a known shape with the demo's tokenizer is tuned for some steps on rows made here, by adapters; then
the largest resident set of the stage is read (the kernel's high-water mark, reset beforehand; that of the fresh process
which opens the result is not). `--whole`: as it is done for models of fewer than 1e9 prunable parameters. Prints JSON;
sizes in GB, 1e9 bytes. Files that are read count while they are mapped, though the kernel may drop them.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from export_memory import resident
from geometries import GEOMETRIES, made

from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.model.loading import load_tokenizer
from prunetune.pipeline import finish
from prunetune.pipeline import run as run_module
from prunetune.pipeline.prepare import RunContext


class Measured(Exception):
    """What follows the stage is not asked for."""


def config_of(folder: Path, args: argparse.Namespace) -> RunConfig:
    """Few steps, no teacher, no evaluation worth the name."""
    return from_mapping(
        {
            "model": str(folder / "dense"),
            "out": str(folder / "run"),
            "device": args.device,
            "dtype": "bfloat16",
            "data": {"train": [str(folder / "rows.jsonl")]},
            "budget": {"keep": 0.6},
            "train": {"steps": 3, "batch_size": 2, "weights": "adapters"},
            "lora": {"rank": 16, "quantize": args.quantize},
            "search": {"share": 0.4, "settle": 0.2, "init_batches": 1, "batch_size": 2},
            "distill": {"teacher": "none"},
            "evaluate": {"limit": 4, "generate_limit": 0, "dense_tuned": False},
        }
    )


def prepared(folder: Path, args: argparse.Namespace) -> None:
    """A model and rows to tune it on."""
    model, _ = made(args.geometry, torch.device("cpu"), torch.bfloat16, layers=args.layers)
    model.save_pretrained(folder / "dense")
    load_tokenizer("demo").save_pretrained(folder / "dense")
    rows = ({"prompt": f"Case {n}: ", "choices": ["yes", "no"], "answer": n % 2, "task": "choice"} for n in range(40))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measured(setting: RunContext, **how: Any) -> None:
    """In place of the stage."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts anew
    before, began = resident("VmRSS"), time.perf_counter()
    finish.finish(setting, **how)
    found = {
        "before_gb": before / 1e9,
        "peak_gb": resident("VmHWM") / 1e9,
        "seconds": time.perf_counter() - began,
        "files": len(list(setting.folder.model_folder.glob("*.safetensors"))),
        "stored_gb": sum(file.stat().st_size for file in setting.folder.model_folder.glob("*.safetensors")) / 1e9,
    }
    raise Measured(json.dumps({key: round(value, 2) for key, value in found.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="smollm2-1.7b", choices=GEOMETRIES)
    parser.add_argument("--layers", type=int, default=0, help="0: all of them")
    parser.add_argument("--quantize", default="off", choices=["off", "nf4"])
    parser.add_argument("--whole", action="store_true", help="the whole model in memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    finish.LARGE_MODEL_PARAMS = math.inf if args.whole else 0
    run_module.finish = measured
    with tempfile.TemporaryDirectory() as scratch:
        prepared(Path(scratch), args)
        try:
            run_module.run(config_of(Path(scratch), args))
        except Measured as found:
            print(json.dumps(vars(args) | json.loads(str(found))))


if __name__ == "__main__":
    main()
