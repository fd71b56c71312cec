"""Answers that a model writes by itself: the likeliest token each time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from prunetune.data.encoding import chat_stop_id
from prunetune.evaluation.batching import MAX_LOGITS_PER_PASS, OnItemsDone, batch_by_length, left_pad
from prunetune.evaluation.inference import vocab_size


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    chats: Sequence[bool],
    pad_id: int,
    max_new_tokens: int,
    max_tokens: int,
    tick: OnItemsDone,
) -> list[str]:
    """The greedy answer to each prompt without special tokens, in the order given; its outer white space is kept.

    Answers to `chats` are over where the chat template ends a turn, too: no pass holds both these and others.
    """
    found = [""] * len(prompts)
    size = vocab_size(model)
    for chat in sorted(set(chats)):
        groups = batch_by_length(
            [index for index, is_one in enumerate(chats) if is_one == chat],
            lambda index: len(prompts[index]),
            lambda rows, width: rows * (width + max_new_tokens) <= max_tokens and rows * size <= MAX_LOGITS_PER_PASS,
        )
        with greedy_decoding(model, tokenizer, pad_id, max_new_tokens, chat=chat) as settings:
            for group in groups:
                batch = left_pad([prompts[index] for index in group], pad_id, model.device)
                ids = model.generate(batch.input_ids, attention_mask=batch.attention_mask, generation_config=settings)
                answers = tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
                for index, answer in zip(group, answers, strict=True):
                    found[index] = answer
                tick(len(group))
    return found


@contextmanager
def greedy_decoding(
    model: Any, tokenizer: Any, pad_id: int, max_new_tokens: int, *, chat: bool = False
) -> Iterator[GenerationConfig]:
    """Settings of plain greedy decoding; for the length of the block the checkpoint's own ones do not mix in."""
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_token_ids(model, tokenizer, chat=chat) or None,
        pad_token_id=pad_id,
    )
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield settings
    finally:
        model.generation_config = own


def stop_token_ids(model: Any, tokenizer: Any, *, chat: bool = False) -> list[int]:
    """Every token that ends an answer: the tokenizer's, those of the checkpoint's generation settings, and for a chat
    the one that ends a turn."""
    named = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(named if isinstance(named, list | tuple) else [named])}
    found |= {chat_stop_id(tokenizer)} if chat else set()
    return sorted(token for token in found if token is not None)
