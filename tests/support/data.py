"""A small subword tokenizer with a chat template, trained in the test, and files of rows."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
CORPUS = ["the patient has a fever and a cough", "which chapter holds this diagnosis", "answer yes no maybe"] * 3
CHAT = (
    "<s>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def subwords(*, chat: str | None = CHAT, adds: str = "<s> $A", end: str = "</s>") -> Any:
    """The tokenizer; `adds` names the special tokens that it puts around a text."""
    tokenizer = Tokenizer.from_str(_trained())
    specials = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=specials)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token=end)
    wrapped.chat_template = chat
    return wrapped


def write_lines(path: Path, *rows: Any) -> str:
    """Write rows as JSON lines (a string unchanged) and create folders; returns the path as a source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def pairs(count: int, start: int = 0, **fields: Any) -> list[dict[str, Any]]:
    """Rows of prompt and completion that all differ."""
    return [{"prompt": f"question {start + n}", "completion": f"answer {start + n}"} | fields for n in range(count)]
