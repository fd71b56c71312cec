"""D4: how much faster a suite is in batches than item by item, on one device.

    python benchmarks/eval_speed.py [MODEL] [--items 128] [--device cuda]

MODEL is a folder with a tokenizer; without one, a random model of SmolLM2-135M's shape and a tokenizer of bytes.
Made-up rows of domain length: questions with four choices (likelihood), prompts to answer (32 new tokens) and texts
(perplexity). Both ways run the same code, `LocalModel`; item by item means that one pass holds one sequence, as batch
size 1 does elsewhere (max_tokens=1). Each is run once on 4 items to warm up, then timed once a task. Scores of both
ways are compared: "largest_difference" is over items, in the units of accuracy, ROUGE-L, NLL. Needs torch,
transformers, yaml, jinja2, numpy and no other package. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from prunetune.evaluation.results import TaskResult
from prunetune.evaluation.suites.local import LocalModel
from prunetune.evaluation.suites.run import evaluate_suite
from prunetune.evaluation.suites.suite import Suite, load_suite

WORDS = [
    "the",
    "court",
    "held",
    "that",
    "a",
    "motion",
    "of",
    "this",
    "kind",
    "must",
    "be",
    "denied",
    "unless",
    "good",
    "cause",
    "is",
    "shown",
    "in",
    "writing",
]
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--items", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype) if options.dtype else DTYPES.get(options.device, torch.float32)
    model, tokenizer = opened(options.model, torch.device(options.device), dtype)
    batched, single = LocalModel(model, tokenizer), LocalModel(model, tokenizer, max_tokens=1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        warm_up, suite = write_suite(Path(place), 4), write_suite(Path(place), options.items)
        for task in suite.tasks:
            for way in (batched, single):
                timed(way, Suite(tuple(each for each in warm_up.tasks if each.name == task.name)), options.device)
            alone = Suite((task,))
            fast, many = timed(batched, alone, options.device)
            slow, one = timed(single, alone, options.device)
            rows.append(row_of(task.name, many, one, fast, slow))
    whole = {way: sum(row[way] for row in rows) for way in ("seconds_batched", "seconds_one_by_one")}
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    print(
        json.dumps(
            {
                "device": device,
                "dtype": str(dtype),
                "model": options.model or "random, the shape of SmolLM2-135M",
                "items": options.items,
                "tasks": rows,
                "times_faster": round(whole["seconds_one_by_one"] / whole["seconds_batched"], 2),
            },
            indent=1,
        )
    )


def opened(name: str | None, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    if name:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    else:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=256, pad_token_id=256,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        tokenizer = of_bytes()
    return model.to(device).eval().requires_grad_(False), tokenizer


def of_bytes() -> Any:
    """A token a byte, and one for the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate([*alphabet, "<end>"])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def write_suite(folder: Path, items: int) -> Suite:
    rng = random.Random(items)

    def said(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    def rows(name: str, made: list[dict[str, Any]]) -> str:
        path = folder / f"{name}-{items}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        return str(path)

    chosen = [
        {"prompt": said(20, 60), "choices": [f" {n} {said(2, 8)}" for n in range(4)], "answer": rng.randrange(4)}
        for _ in range(items)
    ]
    written = [{"prompt": said(20, 60), "completion": said(4, 8)} for _ in range(items)]
    texts = [{"text": said(60, 120)} for _ in range(items)]
    tasks = {
        "choose": {"data": rows("choose", chosen), "scorer": "accuracy"},
        "write": {"data": rows("write", written), "scorer": "token_f1", "max_new_tokens": 32},
        "weigh": {"data": rows("weigh", texts), "scorer": "perplexity"},
    }
    path = folder / f"suite-{items}.yaml"
    path.write_text(yaml.safe_dump({"defaults": {"limit": 0}, "tasks": tasks}))
    return load_suite(path)


def timed(way: LocalModel, suite: Suite, device: str) -> tuple[float, TaskResult]:
    wait(device)
    started = time.perf_counter()
    (result,) = evaluate_suite(way, suite).tasks.values()
    wait(device)
    if result.error:
        raise SystemExit(result.error)
    return time.perf_counter() - started, result


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def row_of(name: str, many: TaskResult, one: TaskResult, fast: float, slow: float) -> dict[str, Any]:
    differences = [
        abs(ours.scores[metric] - theirs.scores[metric])
        for ours, theirs in zip(many.items, one.items, strict=True)
        for metric in ours.scores
    ]
    return {
        "task": name,
        "seconds_batched": round(fast, 3),
        "seconds_one_by_one": round(slow, 3),
        "items_a_second_batched": round(len(many.items) / fast, 1),
        "items_a_second_one_by_one": round(len(one.items) / slow, 1),
        "times_faster": round(slow / fast, 2),
        "largest_difference": max(differences),
    }


if __name__ == "__main__":
    main()
