"""Greedy answers depend neither on the other rows of a batch nor on a checkpoint's sampling settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prunetune.config.recipe import DataConfig, EvaluateConfig
from prunetune.data.encoding import encode
from prunetune.data.records import Record, record_from_row
from prunetune.evaluation.generation import generate_ids, stop_token_ids
from prunetune.evaluation.score_records import evaluate
from prunetune.evaluation.suites.local import LocalModel
from prunetune.evaluation.suites.protocol import GenerationSettings
from support.data import subwords
from support.evaluation import characters, speaker
from support.models import FAMILIES, HYBRIDS, hybrid, tiny

PROMPTS = ["a", "what is it?", "hello", "xy"]


def written(model: Any, prompts: list[str], max_tokens: int = 4096, max_new_tokens: int = 8) -> list[str]:
    tokenizer = characters()
    answers = generate_ids(
        model,
        tokenizer,
        [tokenizer(prompt)["input_ids"] for prompt in prompts],
        chats=[False] * len(prompts),
        pad_id=0,
        max_new_tokens=max_new_tokens,
        max_tokens=max_tokens,
        tick=lambda count: None,
    )
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts


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


@pytest.mark.parametrize("family", HYBRIDS)
def test_prompts_of_hybrids_are_not_padded(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding on the left would become part of the states that they carry through a sequence."""
    model = hybrid(family, vocab_size=speaker().config.vocab_size)
    generate_by_transformers, masks = model.generate, []

    def recorded(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        masks.append(options["attention_mask"])
        result: torch.Tensor = generate_by_transformers(ids, **options)
        return result

    monkeypatch.setattr(model, "generate", recorded)
    answers = written(model, [*PROMPTS, "b"])
    assert [tuple(mask.shape) for mask in masks] == [(2, 2), (1, 3), (1, 6), (1, 12)]
    assert all(mask.all() for mask in masks)
    assert answers == [written(model, [prompt])[0] for prompt in [*PROMPTS, "b"]]


def test_answer_ends_at_every_known_end() -> None:
    model = speaker()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.generation_config.eos_token_id = [0]  # the first token wins ties
    assert stop_token_ids(model, characters()) == [0, 2]
    assert written(model, ["a"]) == [""]


WORDS = ["yes", "no", "maybe", "fever"]
TOLD = [
    *(
        {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]}
        for word in WORDS
    ),
    {"prompt": "say chapter", "completion": "a<|end|>b"},  # outside a chat the token is one like any other
]


@pytest.fixture(scope="module")
def taught() -> tuple[Any, list[Record]]:
    """A model that has learnt to say `TOLD`, each answer with its end; its end of text is not that of a turn."""
    tokenizer, records = subwords(), [record_from_row(row, source=f"f:{n}", id=str(n)) for n, row in enumerate(TOLD)]
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=64)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    examples = encode(records, tokenizer, DataConfig(), 64).examples
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        for example in examples:
            ids = torch.tensor([example.token_ids])
            labels = ids.masked_fill(torch.arange(ids.shape[1]) < example.answer_start, -100)
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return model.eval(), records


@pytest.mark.parametrize("max_tokens", [4096, 1])
def test_chat_answer_ends_where_its_turn_ends(taught: tuple[Any, list[Record]], max_tokens: int) -> None:
    model, records = taught
    end, config = "<|end|>", EvaluateConfig(max_new_tokens=12, max_tokens=max_tokens)
    ids = subwords().convert_tokens_to_ids(["</s>", end])
    assert (stop_token_ids(model, subwords()), stop_token_ids(model, subwords(), chat=True)) == (ids[:1], sorted(ids))
    expected = [record.completion.replace(end, "") for record in records]
    of_run = {item.id: item.got for item in evaluate(model, subwords(), records, DataConfig(), config).tasks[""].items}
    assert [of_run[record.id] for record in records] == expected
    local = LocalModel(model, subwords(), max_tokens=max_tokens)
    assert local.run_requests("generate", records, GenerationSettings(max_new_tokens=12), lambda _: None) == expected


def test_sampling_settings_of_a_checkpoint_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    model = speaker()
    expected = written(model, PROMPTS)
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.top_p, settings.top_k = True, 3.0, 0.5, 7
    settings.repetition_penalty, settings.max_length, settings.no_repeat_ngram_size = 5.0, 20, 1
    assert written(model, PROMPTS) == expected
    assert not caplog.records
    assert model.generation_config is settings
