"""Laws of batches: padding changes no loss, examples appear by weight, a step depends on its seed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from prunetune.data.batches import IGNORE_INDEX, BatchStream, collate, micro_batches, unlabelled_examples
from prunetune.data.encoding import Example
from prunetune.errors import DataError

PAD = 0


def examples(count: int, seed: int = 0, weight: float = 1.0) -> list[Example]:
    draw = random.Random(seed)
    drawn = []
    for index in range(count):
        length = draw.randint(2, 30)
        ids = tuple(draw.randint(1, 40) for _ in range(length))
        drawn.append(Example(ids, draw.randint(1, length - 1), str(index), weight))
    return drawn


def tiny() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=41,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("seed", range(5))
def test_collating_pads_right_and_labels_answers_only(seed: int) -> None:
    given = examples(6, seed)
    batch = collate(given, PAD)
    longest = max(len(example.token_ids) for example in given)
    assert batch.input_ids.shape == batch.labels.shape == batch.prediction_mask.shape == (6, longest)
    assert batch.example_ids == tuple(example.id for example in given)
    for row, example in enumerate(given):
        padding = longest - len(example.token_ids)
        answer = list(example.token_ids[example.answer_start :])
        assert batch.input_ids[row].tolist() == list(example.token_ids) + [PAD] * padding
        assert batch.labels[row].tolist() == [IGNORE_INDEX] * example.answer_start + answer + [IGNORE_INDEX] * padding
    assert (
        batch.target_tokens
        == int((batch.labels != IGNORE_INDEX).sum())
        == int(batch.prediction_mask.sum())
        == len(batch.targets)
    )


def test_collating_labels_what_carries_loss_only() -> None:
    chat = Example(tuple(range(1, 11)), 2, no_loss=((4, 6), (7, 8)))
    batch = collate([chat, replace(chat, answer_start=10)], PAD)
    counted = [IGNORE_INDEX] * 2 + [3, 4] + [IGNORE_INDEX] * 2 + [7, IGNORE_INDEX, 9, 10]
    assert batch.labels.tolist() == [counted, [IGNORE_INDEX] * 10]
    assert batch.target_tokens == chat.loss_tokens == len(batch.targets) == int(batch.prediction_mask.sum()) == 5


@pytest.mark.parametrize("seed", range(3))
def test_padding_changes_no_loss(seed: int) -> None:
    model, given = tiny(), examples(5, seed)
    batch = collate(given, PAD).to("cpu")
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits[batch.prediction_mask]
        loss = cross_entropy(logits, batch.targets)
        alone = torch.tensor(0.0)
        for example in given:
            logits = model(input_ids=torch.tensor([example.token_ids])).logits[0, example.answer_start - 1 : -1]
            alone += cross_entropy(logits, torch.tensor(example.token_ids[example.answer_start :]), reduction="sum")
    torch.testing.assert_close(loss, alone / batch.target_tokens)


@pytest.mark.parametrize("max_tokens", [1, 10, 30, 64, 1000])
def test_micro_batches_hold_every_example_once_within_the_limit(max_tokens: int) -> None:
    given = examples(40)
    batches = micro_batches(given, max_tokens)
    assert sorted(id(example) for batch in batches for example in batch) == sorted(map(id, given))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or max(len(example.token_ids) for example in batch) * len(batch) <= max_tokens
    assert batches == micro_batches(given, max_tokens)
    assert micro_batches([], max_tokens) == []


@pytest.mark.parametrize("batch_size", [1, 3, 7, 25])
def test_every_example_appears_once_an_epoch(batch_size: int) -> None:
    given = examples(10)
    stream = BatchStream(given, batch_size, seed=3)
    steps = 10 * batch_size
    batches = [stream.batch_at(step) for step in range(steps)]
    assert {len(batch) for batch in batches} == {batch_size}
    drawn = [example.id for batch in batches for example in batch]
    epochs = [drawn[start : start + 10] for start in range(0, len(drawn), 10)]
    assert all(sorted(epoch) == sorted(example.id for example in given) for epoch in epochs)
    assert len(epochs) == 1 or len(set(map(tuple, epochs))) > 1


def test_batch_depends_on_seed_and_step_alone() -> None:
    given = examples(50)
    forward, backward = BatchStream(given, 8, seed=1), BatchStream(given, 8, seed=1)
    ahead = [forward.batch_at(step) for step in range(40)]
    assert [backward.batch_at(step) for step in reversed(range(40))] == ahead[::-1]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert BatchStream(given, 8, seed=1).batch_at(17) == ahead[17]
    assert torch.equal(torch.get_rng_state(), state)
    assert BatchStream(given, 8, seed=2).batch_at(17) != ahead[17]


@pytest.mark.parametrize("weight", [0.3, 1.0, 2.0, 2.5, 0.01])
def test_weights_hold_in_the_long_run_and_within_one_an_epoch(weight: float) -> None:
    plain, weighed = examples(20), examples(20, weight=weight)
    stream = BatchStream(
        [*plain, *[Example(e.token_ids, e.answer_start, f"w{e.id}", weight) for e in weighed]], 1, seed=0
    )
    epochs = 60
    end = stream._appearances_before(epochs)
    for epoch in range(epochs):
        counts = Counter(stream.examples[index].id for index in stream._epoch_order(epoch))
        assert all(counts[example.id] == 1 for example in plain)
        assert all(int(weight) <= counts[f"w{example.id}"] <= int(weight) + (weight % 1 > 0) for example in weighed)
    drawn = Counter(example.id for step in range(end) for example in stream.batch_at(step))
    for example in weighed:
        assert abs(drawn[f"w{example.id}"] - weight * epochs) < 1 + 1e-9


def test_epochs_may_be_empty_if_all_weights_are_small() -> None:
    stream = BatchStream(examples(2, weight=0.001), 3, seed=0)
    assert [len(stream.batch_at(step)) for step in (0, 1, 1000)] == [3, 3, 3]


def test_stream_needs_examples() -> None:
    with pytest.raises(DataError, match="no example to train on"):
        BatchStream([], 4, seed=0)
    with pytest.raises(ValueError, match="batch size"):
        BatchStream(examples(1), 0, seed=0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_texts_have_their_share_and_no_labels(share: float) -> None:
    labelled, texts = examples(50, weight=2.0), examples(7, seed=1)
    texts[0] = replace(texts[0], weight=3.0)
    mixed = unlabelled_examples(texts, labelled, share)
    assert collate(mixed, PAD).target_tokens == 0
    counts = Counter(
        example.answer_start == len(example.token_ids)
        for step in range(2000)
        for example in BatchStream([*labelled, *mixed], 8, seed=0).batch_at(step)
    )
    assert counts[True] / counts.total() == pytest.approx(share, abs=0.02)
    assert mixed[0].weight == pytest.approx(3 * mixed[1].weight)


def test_no_text_is_refused_and_texts_alone_are_no_stream() -> None:
    with pytest.raises(
        DataError, match=r"no text of data\.distill_texts fits .*; raise it or set data\.too_long=truncate"
    ):
        unlabelled_examples([], examples(3), 0.5)
    assert unlabelled_examples(examples(3), [], 0.5) == ()
