"""A guard's limit is crossed: the same run with and without a gate, and both results scored anew (bar D2).

    python benchmarks/gates.py [--model small] [--limit 1.5] [--gate 1.4x] [--out runs/gates]

By default the demo's model and data, and as a guard the texts of Python's own language reference (pydoc topics), which
every Python carries. Other models and data by `--model FOLDER --train FILE ... --guard FILE`; `--model small` trains a
byte-level model of 3 layers on other pydoc topics first and tunes it to sums, in a minute on a CPU. Both runs are
scored as they were written, by loading them again: on the guard that was watched, and on texts like it that no run saw.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prunetune.config.recipe import DataConfig, EvaluateConfig, RunConfig, from_mapping
from prunetune.data.records import Record
from prunetune.data.sources import read_records
from prunetune.errors import LimitBroken
from prunetune.evaluation.score_records import evaluate
from prunetune.model.loading import load_model_and_tokenizer, load_tokenizer, pick_device, pick_dtype
from prunetune.pipeline.monitor import aggregate_scores
from prunetune.pipeline.run import run
from prunetune.utils.environment import device_name

# The same proof by command: `prunetune check OUT/gated --suite OUT/guard.yaml --against MODEL`, and OUT/free.
SUITE = """tasks:
  watched: {{data: watched.jsonl, scorer: perplexity, limits: {{relative: {least:.6f}}}}}
  unseen: {{data: unseen.jsonl, scorer: perplexity, limits: {{relative: {least:.6f}}}}}
"""
WATCHED, UNSEEN = 24, 24  # texts of the guard, and texts like it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--train", nargs="+", default=["demo"])
    parser.add_argument("--guard", default="", help="a file of texts")
    parser.add_argument("--out", type=Path, default=Path("runs/gates"))
    parser.add_argument("--limit", type=float, default=1.5, help="times the dense model's perplexity: what has to hold")
    parser.add_argument("--gate", default="1.4x", help="set lower: the guard that is watched is a few texts")
    parser.add_argument("--action", choices=("roll-back", "back-off"), default="roll-back")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    options.out.mkdir(parents=True, exist_ok=True)
    watched, unseen = guards(options.guard, options.out, 240 if options.model == "small" else 800)
    (options.out / "guard.yaml").write_text(SUITE.format(least=1 / options.limit))
    if options.model == "small":
        options.model, options.train = str(small_model(options.out / "small")), [str(sums(options.out / "sums.jsonl"))]
    folders = {}
    for name, gates in (("free", []), ("gated", [f"guard.perplexity <= {options.gate} -> {options.action}"])):
        config = config_of(options, options.out / name, watched, gates)
        try:
            folders[name] = run(config, resume=(options.out / name).exists(), command=" ".join(["gates.py", name]))
        except LimitBroken as outside:
            logging.warning("%s: %s", name, outside)
            folders[name] = options.out / name
    print(json.dumps(outcome(config, folders, {"watched": watched, "unseen": unseen}, options.limit), indent=1))


def small_model(folder: Path) -> Path:
    """A byte-level Llama that knows some English: trained on the pydoc topics that are no guard."""
    if folder.exists():
        return folder
    tokenizer = bytes_tokenizer()
    text = " ".join(topics()[WATCHED + UNSEEN :])
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=3,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rng = torch.Generator().manual_seed(0)
    for step in range(300):
        starts = torch.randint(0, len(ids) - 96, (16,), generator=rng).tolist()
        batch = torch.stack([ids[start : start + 96] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == 299:
            logging.info("small model, step %d: loss %.3f", step, float(loss.detach()))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, <s> in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def sums(file: Path) -> Path:
    """A domain of its own: small sums, with their answer."""
    rows = [
        {"prompt": f"{a} plus {b} is", "completion": f" {a + b}.", "task": "sums"} for a in range(30) for b in range(30)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def config_of(options: argparse.Namespace, out: Path, guard: Path, gates: list[str]) -> RunConfig:
    """The recipe of either run; only the gates differ."""
    return from_mapping(
        {
            "model": options.model,
            "out": str(out),
            "data": {
                "train": options.train, "guard": [str(guard)], "template": "raw", "too_long": "truncate",
                "max_length": options.max_length,
            },
            "budget": {"keep": options.keep},
            "train": {
                "steps": options.steps, "batch_size": 8, "validate_every": options.every,
                "checkpoint_every": options.steps, "log_every": options.every,
            },
            "lora": {"rank": 16},
            "search": {"init_batches": 4, "share": 0.5, "batch_size": 8},
            "distill": {"teacher": "none"},
            "validate": {"limit": WATCHED},
            "limits": gates,
            "evaluate": {"limit": 100, "generate_limit": 0, "dense_tuned": False},
        }
    )  # fmt: skip


def guards(source: str, out: Path, longest: int) -> tuple[Path, Path]:
    """Two files of texts with nothing in common, cut to `longest` characters: to be watched, and to be scored only."""
    texts = [row.completion for row in read_records([source], DataConfig(), "guard")] if source else topics()
    files = []
    for name, part in (("watched", texts[:WATCHED]), ("unseen", texts[WATCHED : WATCHED + UNSEEN])):
        files.append(out / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({"text": text[:longest]}) + "\n" for text in part), encoding="utf-8")
    return files[0], files[1]


def topics() -> list[str]:
    """Prose of Python's language reference, from the standard library."""
    from pydoc_data.topics import topics as pages

    found = [" ".join(pages[name].split()) for name in sorted(pages) if len(pages[name]) > 400]
    return random.Random(0).sample(found, len(found))


def outcome(config: RunConfig, folders: dict[str, Path], files: dict[str, Path], limit: float) -> dict[str, Any]:
    """Perplexities of the dense model and of both results on both files, each as a ratio to the dense model's."""
    device = pick_device("auto")
    records = {name: read_records([str(file)], config.data, "guard") for name, file in files.items()}
    places = {"dense": config.model, **{name: str(folder / "model") for name, folder in folders.items()}}
    found = {
        name: {part: scored(config, model, rows, device, name != "dense") for part, rows in records.items()}
        for name, model in places.items()
    }
    manifests = {name: json.loads((folder / "manifest.json").read_text()) for name, folder in folders.items()}
    return {
        "device": device_name(device),
        "perplexity": found,
        "limit": limit,
        "ratio": {
            name: {part: scores[part] / found["dense"][part] for part in files}
            for name, scores in found.items() if name != "dense"
        },
        "kept": {name: manifest["gates"]["kept"] for name, manifest in manifests.items()},
        "gates": manifests["gated"]["gates"],
        "validation_share": {name: manifest["validation"]["share"] for name, manifest in manifests.items()},
        "tune_and_prune_seconds": {name: manifest["timings"]["tune and prune"] for name, manifest in manifests.items()},
    }  # fmt: skip


def scored(config: RunConfig, model: str, rows: tuple[Record, ...], device: torch.device, own: bool) -> float:
    """Perplexity of a model as it lies on disk."""
    loaded = load_model_and_tokenizer(
        model, device=device, dtype=pick_dtype("auto", device), trust_remote_code=own
    ).model
    tokenizer = load_tokenizer(config.model, trust_remote_code=False)
    settings = EvaluateConfig(limit=0, generate_limit=0)
    value = aggregate_scores(evaluate(loaded, tokenizer, rows, config.data, settings))["perplexity"]
    assert math.isfinite(value)
    return value


if __name__ == "__main__":
    main()
