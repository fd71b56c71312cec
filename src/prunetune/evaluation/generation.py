"""Greedy generation in batches, with every token that ends an answer known."""

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig

from prunetune.data.encoding import chat_stop_id
from prunetune.evaluation.scoring_mode import (
    MAX_LOGITS_PER_PASS,
    OnItemsDone,
    batch_by_length,
    has_plain_cache,
    left_pad,
    vocab_size,
)


def generate_ids(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    chats: Sequence[bool],
    pad_id: int,
    max_new_tokens: int,
    max_tokens: int,
    tick: OnItemsDone,
    streamer: Any = None,
) -> list[list[int]]:
    """The tokens of the greedy answer to each prompt, in the order given, with the one that ends it.

    `streamer`, one of transformers, gets the tokens of a single prompt as they come.

    Answers to `chats` end where the chat template ends a turn, too, so no pass mixes these with others. A model that
    carries states through a sequence gets prompts of one length a pass, as padding would become part of them.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    vocabulary = vocab_size(model)
    can_pad = has_plain_cache(model)
    kinds = [(chat, 0 if can_pad else len(prompt)) for chat, prompt in zip(chats, prompts, strict=True)]
    for kind in sorted(set(kinds)):
        groups = batch_by_length(
            [index for index, other in enumerate(kinds) if other == kind],
            lambda index: len(prompts[index]),
            lambda rows, width: (
                rows * (width + max_new_tokens) <= max_tokens and rows * vocabulary <= MAX_LOGITS_PER_PASS
            ),
        )
        stops = stop_token_ids(model, tokenizer, chat=kind[0]) or None
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad_id
        )
        saved, model.generation_config = model.generation_config, GenerationConfig()  # no sampling, no penalties
        try:
            for group in groups:
                batch = left_pad([prompts[index] for index in group], pad_id, model.device)
                ids = model.generate(
                    batch.input_ids,
                    attention_mask=batch.attention_mask,
                    generation_config=settings,
                    streamer=streamer,
                )
                for index, answer in zip(group, ids[:, batch.input_ids.shape[1] :].tolist(), strict=True):
                    ends = {answer.index(stop) + 1 for stop in stops or () if stop in answer}
                    answers[index] = answer[: min(ends, default=len(answer))]  # behind it is padding
                tick(len(group))
        finally:
            model.generation_config = saved
    return answers


def stop_token_ids(model: Any, tokenizer: Any, *, chat: bool = False) -> list[int]:
    """Every token that ends an answer: of the tokenizer, of the checkpoint's generation settings, of a chat's turn."""
    configured = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(configured if isinstance(configured, list | tuple) else [configured])}
    if chat:
        stops.add(chat_stop_id(tokenizer))
    return sorted(token for token in stops if token is not None)
