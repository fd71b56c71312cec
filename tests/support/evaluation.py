"""A tokenizer with one token for each byte, a tiny model with its vocabulary, and records to score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prunetune.data.records import Record
from support.data import write_lines
from support.models import tiny

SPECIAL = ("<pad>", "<s>", "</s>")
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def characters() -> Any:
    """A tokenizer with one token for each byte, and <s> at the start."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *ALPHABET])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def speaker(family: str = "llama", **changes: Any) -> Any:
    """A tiny model with `characters`' vocabulary."""
    return tiny(family, **({"vocab_size": len(SPECIAL) + len(ALPHABET), "max_position_embeddings": 256} | changes))


def write_model_and_rows(folder: Path, count: int, *more: dict[str, Any]) -> Path:
    """Write a model folder `dense`, and `rows.jsonl` with `count` choices, `count` open questions, and rows `more`."""
    speaker().save_pretrained(folder / "dense")
    characters().save_pretrained(folder / "dense")
    rows = [
        {"prompt": f"Case {n}: ", "choices": ["yes", "no"], "answer": n % 2, "task": "choice"} for n in range(count)
    ]
    rows += [{"prompt": f"Repeat {n}: ", "completion": f"{n} {n}", "task": "open"} for n in range(count)]
    write_lines(folder / "rows.jsonl", *rows, *more)
    return folder


def choice(index: int, *, choices: tuple[str, ...] = ("heart", "head", "lung", "x"), **changes: Any) -> Record:
    answer = index % len(choices)
    values = {
        "kind": "completion",
        "prompt": f"Where is case {index}{'!' * (index % 5)} ",
        "completion": choices[answer],
        "choices": choices,
        "answer": answer,
        "task": "organ",
        "id": f"c{index}",
    }
    return Record(**(values | changes))


def question(index: int, **changes: Any) -> Record:
    values = {
        "kind": "completion",
        "prompt": f"Q{index}{'?' * (index % 4)} ",
        "completion": f"answer {index}",
        "task": "open",
        "id": f"q{index}",
    }
    return Record(**(values | changes))


def text(index: int) -> Record:
    return Record(kind="text", completion="the quick fox " * (1 + index % 3) + str(index), task="prose", id=f"t{index}")
