"""Greedy answers do not depend on their company or on a checkpoint's sampling settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evaluate_helpers import characters, speaker
from model_helpers import FAMILIES
from prunetune.evaluation.generation import generate, stop_ids

PROMPTS = ["a", "what is it?", "hello", "xy"]


def written(model: Any, prompts: list[str], max_tokens: int = 4096, max_new_tokens: int = 8) -> list[str]:
    tokenizer = characters()
    return generate(
        model,
        tokenizer,
        [tokenizer(prompt)["input_ids"] for prompt in prompts],
        pad_id=0,
        max_new_tokens=max_new_tokens,
        max_tokens=max_tokens,
        tick=lambda count: None,
    )


def step_by_step(model: Any, prompt: str, max_new_tokens: int = 8) -> str:
    tokenizer = characters()
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(max_new_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_argmax_step_by_step(family: str) -> None:
    model = speaker(family)
    expected = [step_by_step(model, prompt) for prompt in PROMPTS]
    assert written(model, PROMPTS) == expected
    assert written(model, PROMPTS, max_tokens=1) == expected
    assert written(model, PROMPTS[::-1])[::-1] == expected


def test_an_answer_ends_at_every_known_end() -> None:
    model = speaker()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.generation_config.eos_token_id = [0]  # the first token wins ties
    assert stop_ids(model, characters()) == [0, 2]
    assert written(model, ["a"]) == [""]


def test_sampling_settings_of_a_checkpoint_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    model = speaker()
    expected = written(model, PROMPTS)
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.top_p, settings.top_k = True, 3.0, 0.5, 7
    settings.repetition_penalty, settings.max_length, settings.no_repeat_ngram_size = 5.0, 20, 1
    assert written(model, PROMPTS) == expected
    assert not caplog.records
    assert model.generation_config is settings
