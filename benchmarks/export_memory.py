"""C2: peak memory of writing a cut model, over the size of the model written.

    python benchmarks/export_memory.py [--layout uniform|per-layer] [--dtype float32|bfloat16] [--hidden 1024]

A random Llama is made and cut in a fresh process, then written: 350 million parameters remain, uniform, or 300 million.
The peak is the largest resident set while it is written (the kernel's high-water mark, reset beforehand). It holds the
model itself, and Python with its libraries, some 0.4 GB whatever the model's size, which `ratio` leaves out and
`ratio_with_libraries` does not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prunetune.export.checkpoint import write_checkpoint
from prunetune.plan import Plan
from prunetune.pruning.cut import cut
from prunetune.pruning.sites import find_sites


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (highest)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def made(hidden: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A random model; tensors are filled one by one, so that making it costs no more than holding it."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    torch.set_default_dtype(dtype)
    return LlamaForCausalLM(config).eval()


def plan_of(model: LlamaForCausalLM, layout: str) -> Plan:
    """Three quarters of the units; in the per-layer layout every other layer is narrower."""
    sites, kept = find_sites(model), {}
    for site in sites:
        share = 0.5 if layout == "per-layer" and site.layer % 2 else 0.75
        kept[site.name] = tuple(range(int(share * site.units)))
    return Plan(kept, {site.name: site.units for site in sites})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layout", default="uniform", choices=["uniform", "per-layer"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--hidden", type=int, default=1024)
    args = parser.parse_args()
    libraries = resident("VmRSS")
    model = made(args.hidden, getattr(torch, args.dtype))
    sites, plan = find_sites(model), plan_of(model, args.layout)
    cut(model, plan)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts again from here
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as scratch:
        written = write_checkpoint(
            model, PreTrainedTokenizerFast(tokenizer_object=tokenizer()), plan, sites, Path(scratch) / "model",
            layout=args.layout, card="",
        )  # fmt: skip
    peak = resident("VmHWM")
    print(json.dumps({
        "layout": args.layout, "dtype": args.dtype, "params": written.params, "written_mb": written.bytes / 1e6,
        "before_mb": before / 1e6, "peak_mb": peak / 1e6, "libraries_mb": libraries / 1e6,
        "ratio": round((peak - libraries) / written.bytes, 3), "ratio_with_libraries": round(peak / written.bytes, 3),
    }))  # fmt: skip


def tokenizer() -> object:
    """The smallest that can be saved."""
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))


if __name__ == "__main__":
    main()
