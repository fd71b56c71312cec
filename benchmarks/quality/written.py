"""Texts that the untuned model writes itself, as JSONL: openings of given texts, continued by sampling.

python benchmarks/quality/written.py MODEL DATA/general/text/train.jsonl DATA/general/written.jsonl

Such texts need no source and no licence, and never come round twice (the idea: LLM-QAT, arXiv 2305.17888, section 3.1).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

from prunetune.model.loading import load_model_and_tokenizer, load_tokenizer, pick_device, pick_dtype

OPENING, LENGTH = 16, 400  # tokens
AT_ONCE = 500


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("openings", type=Path, help="JSONL of texts")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    asked = parser.parse_args()
    torch.manual_seed(0)
    device = pick_device("auto")
    model = load_model_and_tokenizer(
        asked.model, device=device, dtype=pick_dtype("auto", device), trust_remote_code=False
    ).model
    tokenizer = load_tokenizer(asked.model, trust_remote_code=False)
    openings = openings_of(asked.openings, tokenizer, asked.count)
    with asked.out.open("w", encoding="utf-8") as file:
        for start in range(0, asked.count, AT_ONCE):
            for text in continued(model.eval(), tokenizer, openings[start : start + AT_ONCE]):
                if len(text.split()) > 20:  # an end of text may come at once
                    file.write(json.dumps({"text": text}) + "\n")


def openings_of(path: Path, tokenizer: Any, count: int) -> list[list[int]]:
    """Tokens from random places of random texts."""
    rows = path.read_text(encoding="utf-8").splitlines()
    texts = [tokenizer(json.loads(row)["text"], add_special_tokens=False)["input_ids"] for row in rows]
    texts, chance = [text for text in texts if len(text) > OPENING], random.Random(0)
    found = []
    for text in chance.choices(texts, k=count):
        start = chance.randrange(len(text) - OPENING)
        found.append(text[start : start + OPENING])
    return found


def continued(model: Any, tokenizer: Any, openings: list[list[int]]) -> list[str]:
    """Each opening with what the model makes of it."""
    ids, end = torch.tensor(openings, device=model.device), tokenizer.eos_token_id
    with torch.inference_mode():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=0.98,
            max_new_tokens=LENGTH - OPENING,
            eos_token_id=end,
            pad_token_id=end,
        )
    return list(tokenizer.batch_decode(found, skip_special_tokens=True))


if __name__ == "__main__":
    main()
