"""Log-likelihoods of given tokens: of choices after a shared prompt, and of the answers of examples."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from prunetune.data.batches import Batch, collate
from prunetune.data.encoding import Example
from prunetune.evaluation.scoring_mode import (
    MAX_LENGTH_RATIO,
    MAX_LOGITS_PER_PASS,
    OnItemsDone,
    batch_by_length,
    has_plain_cache,
    left_pad,
    position_ids_from_mask,
    vocab_size,
)
from prunetune.model.lm_head import select_head_inputs

Tokens = tuple[int, ...]
_CHUNK = 2**24  # logits converted to float32 at once: 64 MiB


@dataclass(frozen=True)
class TokenizedQuestion:
    """Token ids of a prompt and its choices; none is empty."""

    prompt: Tokens
    choices: tuple[Tokens, ...]


@dataclass(frozen=True)
class ChoiceBranch:
    """Tokens to run after a prompt, and the choices whose second and later tokens they predict."""

    question_index: int
    tokens: Tokens
    choice_indices: tuple[int, ...]  # without its last token, each is a prefix of `tokens`


def choice_loglikelihoods(
    model: Any, questions: Sequence[TokenizedQuestion], *, pad_id: int, max_tokens: int, tick: OnItemsDone
) -> list[list[float]]:
    """Mean log-likelihood per token (nats) of every choice after its prompt, in the order given.

    Every prompt is run once: its last logits score the first token of all choices, its KV cache the rest. Where a cache
    holds more than keys and values, each choice is run with its prompt.
    """
    if not has_plain_cache(model):
        pairs = [(question.prompt, choice) for question in questions for choice in question.choices]
        examples = [Example(prompt + choice, len(prompt)) for prompt, choice in pairs]
        scores = iter(answer_nll(model, examples, pad_id=pad_id, max_tokens=max_tokens, tick=lambda _: None))
        tick(len(questions))
        return [[-nats / tokens for nats, tokens in islice(scores, len(question.choices))] for question in questions]
    means: list[list[float]] = [[] for _ in questions]
    vocabulary = vocab_size(model)
    for group in batch_by_length(
        range(len(questions)),
        lambda index: len(questions[index].prompt),
        lambda rows, width: rows * width <= max_tokens and rows * vocabulary <= MAX_LOGITS_PER_PASS,
        max_length_ratio=MAX_LENGTH_RATIO,
    ):
        of_group = _group_loglikelihoods(model, [questions[index] for index in group], pad_id, max_tokens)
        for index, values in zip(group, of_group, strict=True):
            means[index] = values
        tick(len(group))
    return means


def _group_loglikelihoods(
    model: Any, group: Sequence[TokenizedQuestion], pad_id: int, max_tokens: int
) -> list[list[float]]:
    prompts = left_pad([question.prompt for question in group], pad_id, model.device)
    branches = [branch for index, question in enumerate(group) for branch in build_branches(index, question.choices)]
    output = model(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        position_ids=prompts.position_ids,
        use_cache=bool(branches),
        logits_to_keep=1,
    )
    totals: list[list[float]] = []  # at first the log-probability of each choice's first token
    for index, asked in enumerate(group):
        firsts = torch.tensor([choice[0] for choice in asked.choices], device=output.logits.device)
        totals.append(output.logits[index, -1].float().log_softmax(-1)[firsts].tolist())
    vocabulary, width = vocab_size(model), prompts.input_ids.shape[1]
    for batch in batch_by_length(
        branches,
        lambda branch: len(branch.tokens),
        lambda rows, longest: (
            rows * (width + longest) <= max_tokens and rows * longest * vocabulary <= MAX_LOGITS_PER_PASS
        ),
        max_length_ratio=MAX_LENGTH_RATIO,
    ):
        # Padded on the right: attention is causal, so no token of a branch sees the padding behind it.
        longest = max(len(branch.tokens) for branch in batch)
        padded = [[*branch.tokens, *[pad_id] * (longest - len(branch.tokens))] for branch in batch]
        ids = torch.tensor(padded, device=prompts.input_ids.device)
        owners = torch.tensor([branch.question_index for branch in batch], device=ids.device)
        mask = torch.cat([prompts.attention_mask[owners], torch.ones_like(ids)], dim=1)
        # A copy: the cache itself is unchanged, because a layer that grows makes new tensors.
        cache = copy.copy(output.past_key_values)
        cache.layers = [copy.copy(layer) for layer in output.past_key_values.layers]
        cache.batch_select_indices(owners)
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids_from_mask(mask)[:, -longest:],
            past_key_values=cache,
            use_cache=True,
        ).logits
        for (question, choice), value in _later_token_logprobs(logits, batch, group).items():
            totals[question][choice] += value
    return [
        [total / len(choice) for total, choice in zip(values, question.choices, strict=True)]
        for values, question in zip(totals, group, strict=True)
    ]


def build_branches(question_index: int, choices: Sequence[Tokens]) -> list[ChoiceBranch]:
    """The fewest branches that predict every later token: inputs that are a prefix of others need none of their own."""
    inputs = {choice[:-1] for choice in choices if len(choice) > 1}
    longest = [
        tokens
        for tokens in sorted(inputs)
        if not any(len(tokens) < len(other) and other[: len(tokens)] == tokens for other in inputs)
    ]
    choices_of: dict[Tokens, list[int]] = {tokens: [] for tokens in longest}
    for index, choice in enumerate(choices):
        if len(choice) > 1:
            choices_of[next(tokens for tokens in longest if tokens[: len(choice) - 1] == choice[:-1])].append(index)
    return [ChoiceBranch(question_index, tokens, tuple(indices)) for tokens, indices in choices_of.items()]


def _later_token_logprobs(
    logits: Tensor, branches: Sequence[ChoiceBranch], group: Sequence[TokenizedQuestion]
) -> dict[tuple[int, int], float]:
    """(question, choice) -> summed log-probability of its second and later tokens."""
    scored = [
        (row, branch.question_index, choice) for row, branch in enumerate(branches) for choice in branch.choice_indices
    ]
    rows = torch.tensor([row for row, _, _ in scored], device=logits.device)
    width = logits.shape[1]
    tails = [group[question].choices[choice][1:] for _, question, choice in scored]
    targets = torch.tensor([[*tail, *[-100] * (width - len(tail))] for tail in tails], device=logits.device)
    steps = torch.arange(width, device=logits.device)
    chosen = logits[rows[:, None], steps[None, :], targets.clamp(min=0)].float()
    values = (chosen - chunked_logsumexp(logits)[rows]).masked_fill(targets < 0, 0.0).cpu().double().sum(-1).tolist()
    return {(question, choice): value for (_, question, choice), value in zip(scored, values, strict=True)}


def chunked_logsumexp(logits: Tensor) -> Tensor:
    """Logits [..., vocabulary] -> float32 logsumexp [...], in chunks: a float32 copy of all logits may not fit."""
    flat = logits.flatten(0, -2)
    chunks = torch.split(flat, max(1, _CHUNK // flat.shape[-1]))
    return torch.cat([chunk.float().logsumexp(-1) for chunk in chunks]).view(logits.shape[:-1])


def answer_nll(
    model: Any, examples: Sequence[Example], *, pad_id: int, max_tokens: int, tick: OnItemsDone
) -> list[tuple[float, int]]:
    """NLL in nats, summed over the answer tokens of each example, and their count, in the order given."""
    results = [(0.0, 0)] * len(examples)
    for indices, batch, logits in answer_logits(model, examples, pad_id=pad_id, max_tokens=max_tokens):
        losses = chunked_logsumexp(logits) - logits.gather(-1, batch.targets[:, None])[:, 0].float()
        counts = batch.prediction_mask.sum(-1).tolist()
        for index, row, tokens in zip(indices, torch.split(losses.cpu(), counts), counts, strict=True):
            results[index] = (float(row.double().sum()), tokens)
        tick(len(indices))
    return results


def answer_logits(
    model: Any, examples: Sequence[Example], *, pad_id: int, max_tokens: int
) -> Iterator[tuple[list[int], Batch, Tensor]]:
    """Which examples share a pass, their batch, and the logits [N, vocabulary] before each of its answer tokens."""
    vocabulary = vocab_size(model)
    for group in batch_by_length(
        range(len(examples)),
        lambda index: len(examples[index].token_ids),
        lambda rows, width: rows * width <= max_tokens,
        max_length_ratio=MAX_LENGTH_RATIO,
    ):
        for indices in batch_by_length(
            group,
            lambda index: examples[index].loss_tokens,
            lambda rows, longest: rows * longest * vocabulary <= MAX_LOGITS_PER_PASS,
        ):
            batch = collate([examples[index] for index in indices], pad_id).to(model.device)
            with select_head_inputs(model, batch.prediction_mask):
                logits = model(input_ids=batch.input_ids, use_cache=False).logits
            yield indices, batch, logits
