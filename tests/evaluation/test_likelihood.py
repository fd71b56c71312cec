"""Likelihoods from cached and shared prompts equal one full forward pass for each choice."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from prunetune.data.encoding import Example
from prunetune.evaluation import likelihood
from prunetune.evaluation.likelihood import TokenizedQuestion, answer_nll, build_branches, choice_loglikelihoods
from prunetune.evaluation.scoring_mode import batch_by_length
from prunetune.plan import Plan
from prunetune.pruning.cut import RemovedAttention, cut
from prunetune.pruning.masking import masked
from prunetune.pruning.sites import find_sites
from support.models import FAMILIES, HYBRIDS, hybrid, random_plan, tiny

VOCABULARY = 97


def silent(count: int) -> None:
    """A progress callback that does nothing."""


def ids(rng: random.Random, longest: int, shortest: int = 1) -> tuple[int, ...]:
    return tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(shortest, longest)))


def questions(seed: int, count: int = 7, longest: int = 20) -> list[TokenizedQuestion]:
    """Prompts and choices of many lengths, with shared beginnings, one-token choices and a repeated one."""
    rng = random.Random(seed)
    tokenized = []
    for _ in range(count):
        stem = ids(rng, 4, 2)
        choices = [ids(rng, 1), stem, stem + ids(rng, 3), stem + ids(rng, 6), stem[:1] + ids(rng, 5), ids(rng, 9), stem]
        tokenized.append(TokenizedQuestion(ids(rng, longest), tuple(choices)))
    return tokenized


@torch.inference_mode()
def naive(model: Any, question: TokenizedQuestion) -> list[float]:
    values = []
    for tokens in question.choices:
        sequence = torch.tensor([question.prompt + tokens])
        logits = model(input_ids=sequence, use_cache=False).logits[0].double().log_softmax(-1)
        start = len(question.prompt) - 1
        values.append(sum(float(logits[start + step, token]) for step, token in enumerate(tokens)) / len(tokens))
    return values


def scored(model: Any, questions: list[TokenizedQuestion], max_tokens: int = 4096) -> list[list[float]]:
    with torch.inference_mode():
        return choice_loglikelihoods(model, questions, pad_id=0, max_tokens=max_tokens, tick=silent)


def assert_equal(loglikelihoods: list[list[float]], expected: list[list[float]], tolerance: float = 1e-5) -> None:
    for ours, theirs in zip(loglikelihoods, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_choices_equal_full_forward_passes(family: str, attention: str) -> None:
    model = tiny(family)
    model.set_attn_implementation(attention)
    batch = questions(0)
    assert_equal(scored(model, batch), [naive(model, question) for question in batch])


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma3_text"])
def test_choices_equal_full_forward_passes_beyond_the_sliding_window(family: str) -> None:
    window = {"sliding_window": 4} | ({"use_sliding_window": True, "max_window_layers": 1} if family == "qwen2" else {})
    model = tiny(family, **window)
    batch = questions(1, longest=30)
    assert_equal(scored(model, batch), [naive(model, question) for question in batch])


@pytest.mark.parametrize("family", FAMILIES)
def test_pass_size_does_not_change_scores(family: str) -> None:
    model = tiny(family)
    batch = questions(2)
    assert_equal(scored(model, batch, max_tokens=1), scored(model, batch, max_tokens=100_000))
    assert_equal(scored(model, batch, max_tokens=60), scored(model, batch[::-1])[::-1])


def test_few_logits_a_pass_do_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    batch = questions(3)
    expected = scored(model, batch)
    monkeypatch.setattr(likelihood, "MAX_LOGITS_PER_PASS", 5 * VOCABULARY)
    monkeypatch.setattr(likelihood, "_CHUNK", 2 * VOCABULARY)
    assert_equal(scored(model, batch), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_layers_without_attention_are_scored(family: str) -> None:
    model = tiny(family, layers=4)
    sites = find_sites(model)
    kept = {
        site.name: tuple(range(site.min_units_per_group if site.kind == "attention" else site.units)) for site in sites
    }
    plan = Plan(kept, {site.name: site.units for site in sites})
    batch = questions(4, longest=12)
    with masked(model, plan):
        expected = scored(model, batch)
    cut(model, plan)
    assert any(isinstance(module, RemovedAttention) for module in model.modules())
    loglikelihoods = scored(model, batch)
    assert_equal(loglikelihoods, [naive(model, question) for question in batch])
    assert_equal(loglikelihoods, expected)


def test_masked_and_cut_models_score_alike() -> None:
    model = tiny("qwen3")
    plan = random_plan(model)
    batch = questions(5)
    with masked(model, plan):
        expected = scored(model, batch)
    assert_equal(scored(cut(model, plan), batch), expected)


def test_each_prompt_is_run_once_and_single_tokens_need_no_second_pass() -> None:
    model = tiny()
    shapes: list[tuple[int, ...]] = []
    record_shape = lambda _, __, named: shapes.append(tuple(named["input_ids"].shape))  # noqa: E731
    model.register_forward_pre_hook(record_shape, with_kwargs=True)
    rng = random.Random(0)
    scored(model, [TokenizedQuestion(ids(rng, 5, 5), ((4,), (5,), (6,))) for _ in range(3)])
    assert shapes == [(3, 5)]
    shapes.clear()
    scored(model, [TokenizedQuestion(ids(rng, 5, 5), ((4,), (5, 6, 7), (5, 6, 8), (5, 6)))])
    assert shapes == [(1, 5), (1, 2)]


def test_branches_cover_every_choice_by_a_shared_prefix() -> None:
    rng = random.Random(7)
    for _ in range(50):
        choices = tuple(tuple(rng.randrange(2) for _ in range(rng.randint(1, 6))) for _ in range(8))
        branches = build_branches(3, choices)
        assert sorted(choice for branch in branches for choice in branch.choice_indices) == [
            index for index, choice in enumerate(choices) if len(choice) > 1
        ]
        for branch in branches:
            assert branch.question_index == 3
            assert all(
                branch.tokens[: len(choices[index]) - 1] == choices[index][:-1] for index in branch.choice_indices
            )
            others = [other.tokens for other in branches if other is not branch]
            assert not any(other[: len(branch.tokens)] == branch.tokens for other in others)


@pytest.mark.parametrize("family", HYBRIDS)
def test_choices_of_hybrids_equal_full_forward_passes(family: str) -> None:
    model = hybrid(family)
    batch = questions(10, count=3)
    assert_equal(scored(model, batch), [naive(model, question) for question in batch])


def test_half_precision_is_scored_in_float32() -> None:
    model = tiny().to(torch.bfloat16)
    batch = questions(6)
    assert_equal(scored(model, batch), [naive(model, question) for question in batch], tolerance=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_scores_equal_cpu_scores() -> None:
    batch, answers = questions(9), examples(2)
    on_cpu, on_cuda = tiny("gemma3_text"), tiny("gemma3_text").cuda()
    assert_equal(scored(on_cuda, batch), scored(on_cpu, batch), tolerance=1e-3)
    with torch.inference_mode():
        loglikelihoods = [
            answer_nll(model, answers, pad_id=0, max_tokens=99, tick=silent) for model in (on_cuda, on_cpu)
        ]
    assert [total for total, _ in loglikelihoods[0]] == pytest.approx(
        [total for total, _ in loglikelihoods[1]], abs=1e-2
    )


def test_nan_logits_give_nan() -> None:
    model = tiny()
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    assert all(math.isnan(value) for values in scored(model, questions(8)) for value in values)


def examples(seed: int, count: int = 9) -> list[Example]:
    rng = random.Random(seed)
    rows = [ids(rng, 30, 2) for _ in range(count)]
    return [Example(tokens, rng.randrange(1, len(tokens)), id=str(index)) for index, tokens in enumerate(rows)]


@pytest.mark.parametrize("max_tokens", [1, 70, 4096])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_full_forward_passes(family: str, max_tokens: int) -> None:
    model = tiny(family)
    answers = examples(0)
    with torch.inference_mode():
        loglikelihoods = answer_nll(model, answers, pad_id=0, max_tokens=max_tokens, tick=silent)
        for example, (total, tokens) in zip(answers, loglikelihoods, strict=True):
            logits = model(input_ids=torch.tensor([example.token_ids])).logits[0].double().log_softmax(-1)
            places = range(example.answer_start, len(example.token_ids))
            expected = -sum(float(logits[at - 1, example.token_ids[at]]) for at in places)
            assert tokens == len(example.token_ids) - example.answer_start
            assert total / tokens == pytest.approx(expected / tokens, abs=1e-5)


def test_few_logits_a_pass_do_not_change_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    answers = examples(1)
    with torch.inference_mode():
        expected = answer_nll(model, answers, pad_id=0, max_tokens=4096, tick=silent)
        monkeypatch.setattr(likelihood, "MAX_LOGITS_PER_PASS", 3 * VOCABULARY)
        monkeypatch.setattr(likelihood, "_CHUNK", VOCABULARY)
        loglikelihoods = answer_nll(model, answers, pad_id=0, max_tokens=4096, tick=silent)
    assert [total for total, _ in loglikelihoods] == pytest.approx([total for total, _ in expected], abs=1e-4)


def test_packing_holds_every_token_once_with_little_padding() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 400) for _ in range(300)]
    runs = list(batch_by_length(lengths, int, lambda rows, longest: rows * longest <= 8192, max_length_ratio=1.2))
    assert sorted(length for run in runs for length in run) == sorted(lengths)
    assert all(len(run) * max(run) <= 8192 for run in runs)
    assert sum(len(run) * max(run) for run in runs) < 1.25 * sum(lengths)
    assert list(batch_by_length([5, 3], int, lambda rows, longest: False)) == [[3], [5]]


def test_no_pass_makes_more_logits_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny(), []
    model.register_forward_hook(lambda _, __, output: made.append(output.logits.numel()))
    monkeypatch.setattr(likelihood, "MAX_LOGITS_PER_PASS", 10 * VOCABULARY)
    scored(model, questions(3, count=12))
    assert max(made) <= 10 * VOCABULARY
    assert len(made) < 12 * 8
    made.clear()
    examples = [Example(tuple(range(3, 15)), 3 + index % 7) for index in range(30)]
    with torch.inference_mode():
        answer_nll(model, examples, pad_id=0, max_tokens=4096, tick=silent)
    assert max(made) <= 10 * VOCABULARY


def test_pass_takes_as_many_tokens_as_are_allowed_and_no_more() -> None:
    """With the cached prompt's; a single row is run however long it is."""
    model, passes = tiny(), []

    def count(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        passes.append(tuple((inputs["input_ids"] if mask is None else mask).shape))

    model.register_forward_pre_hook(count, with_kwargs=True)
    examples = [Example(tuple(range(3, 13)), 4) for _ in range(8)]
    with torch.inference_mode():
        answer_nll(model, examples, pad_id=0, max_tokens=40, tick=silent)
    assert passes == [(4, 10)] * 2
    passes.clear()
    same = [TokenizedQuestion((3, 4, 5, 6, 7, 8), ((9, 10, 11), (12, 13, 14), (15, 16, 17))) for _ in range(8)]
    scored(model, same, max_tokens=24)
    assert passes == ([(4, 6)] + [(3, 8)] * 4) * 2


def test_pass_makes_as_many_logits_as_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One a prompt, and one for each token of an answer."""
    model, made = tiny(), []
    model.register_forward_hook(lambda _, __, output: made.append(output.logits.numel() // VOCABULARY))
    monkeypatch.setattr(likelihood, "MAX_LOGITS_PER_PASS", 4 * VOCABULARY)
    scored(model, [TokenizedQuestion((3, 4, 5), ((6,), (7,))) for _ in range(8)])
    assert made == [4, 4]
    made.clear()
    with torch.inference_mode():
        answer_nll(model, [Example((3, 4, 5, 6), 2)] * 8, pad_id=0, max_tokens=4096, tick=silent)
    assert made == [4, 4, 4, 4]
