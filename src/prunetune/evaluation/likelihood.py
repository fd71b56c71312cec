"""How likely a model finds given tokens: choices after a prompt, and the answers of examples."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunetune.data.batches import Batch, collate
from prunetune.data.templates import Example
from prunetune.evaluation.packing import LOGITS, SPREAD, Padded, Tick, left_padded, packed, positions, vocabulary
from prunetune.model.lm_head import head_reads

Tokens = tuple[int, ...]
_CHUNK = 2**24  # logits that are widened to float32 at once: 64 MiB


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt and its choices; none is empty."""

    prompt: Tokens
    choices: tuple[Tokens, ...]


@dataclass(frozen=True)
class Branch:
    """Tokens to run after a prompt, and the choices whose later tokens they predict."""

    question: int
    tokens: Tokens
    choices: tuple[int, ...]  # each starts with `tokens` up to its own last token but one


def choice_likelihoods(
    model: Any, questions: Sequence[Question], *, pad_id: int, max_tokens: int, tick: Tick
) -> list[list[float]]:
    """Mean log-likelihood per token (nats) of every choice after its prompt, in the order given.

    Every prompt is run once: its last logits give the first token of all choices, its cache carries the rest.
    """
    found: list[list[float]] = [[] for _ in questions]
    size = vocabulary(model)
    for group in packed(
        range(len(questions)),
        lambda index: len(questions[index].prompt),
        lambda rows, width: rows * width <= max_tokens and rows * size <= LOGITS,
        spread=SPREAD,
    ):
        scores = _group_likelihoods(model, [questions[index] for index in group], pad_id, max_tokens)
        for index, values in zip(group, scores, strict=True):
            found[index] = values
        tick(len(group))
    return found


def _group_likelihoods(model: Any, group: Sequence[Question], pad_id: int, max_tokens: int) -> list[list[float]]:
    prompts = left_padded([question.prompt for question in group], pad_id, model.device)
    branches = [branch for index, question in enumerate(group) for branch in branches_of(index, question.choices)]
    output = model(
        input_ids=prompts.ids,
        attention_mask=prompts.mask,
        position_ids=prompts.positions,
        use_cache=bool(branches),
        logits_to_keep=1,
    )
    totals = [_first_tokens(output.logits[index, -1], question) for index, question in enumerate(group)]
    size, width = vocabulary(model), prompts.ids.shape[1]
    for part in packed(
        branches,
        lambda branch: len(branch.tokens),
        lambda rows, longest: rows * (width + longest) <= max_tokens and rows * longest * size <= LOGITS,
        spread=SPREAD,
    ):
        logits = _branch_logits(model, part, prompts, output.past_key_values, pad_id)
        for (question, choice), value in _later_tokens(logits, part, group).items():
            totals[question][choice] += value
    return [
        [total / len(choice) for total, choice in zip(values, question.choices, strict=True)]
        for values, question in zip(totals, group, strict=True)
    ]


def branches_of(question: int, choices: Sequence[Tokens]) -> list[Branch]:
    """The fewest runs after a prompt that predict every later token: what begins another run is part of it."""
    begun = {choice[:-1] for choice in choices if len(choice) > 1}
    runs = [tokens for tokens in sorted(begun) if not any(_begins(tokens, other) for other in begun)]
    served: dict[Tokens, list[int]] = {tokens: [] for tokens in runs}
    for index, choice in enumerate(choices):
        if len(choice) > 1:
            served[next(tokens for tokens in runs if tokens[: len(choice) - 1] == choice[:-1])].append(index)
    return [Branch(question, tokens, tuple(indices)) for tokens, indices in served.items()]


def _begins(tokens: Tokens, other: Tokens) -> bool:
    return len(tokens) < len(other) and other[: len(tokens)] == tokens


def _first_tokens(logits: Tensor, question: Question) -> list[float]:
    """[vocabulary] logits -> the log-probability of each choice's first token."""
    firsts = torch.tensor([choice[0] for choice in question.choices], device=logits.device)
    values: list[float] = logits.float().log_softmax(-1)[firsts].tolist()
    return values


def _branch_logits(model: Any, part: Sequence[Branch], prompts: Padded, cache: Any, pad_id: int) -> Tensor:
    """[branches, longest, vocabulary]"""
    owners = torch.tensor([branch.question for branch in part], device=prompts.ids.device)
    width = max(len(branch.tokens) for branch in part)
    # Padded on the right: no token looks ahead, so what stands behind a branch cannot reach it.
    padded = [[*branch.tokens, *[pad_id] * (width - len(branch.tokens))] for branch in part]
    ids = torch.tensor(padded, device=owners.device)
    mask = torch.cat([prompts.mask[owners], torch.ones_like(ids)], dim=1)
    logits: Tensor = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions(mask)[:, -width:],
        past_key_values=_selected(cache, owners),
        use_cache=True,
    ).logits
    return logits


def _selected(cache: Any, rows: Tensor) -> Any:
    """A cache of the given rows; the original stays as it was, because layers grow by making new tensors."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen


def _later_tokens(logits: Tensor, part: Sequence[Branch], group: Sequence[Question]) -> dict[tuple[int, int], float]:
    """(question, choice) -> summed log-probability of its tokens but the first."""
    asked = [(row, branch.question, choice) for row, branch in enumerate(part) for choice in branch.choices]
    rows = torch.tensor([row for row, _, _ in asked], device=logits.device)
    width = logits.shape[1]
    tails = [group[question].choices[choice][1:] for _, question, choice in asked]
    targets = torch.tensor([[*tail, *[-100] * (width - len(tail))] for tail in tails], device=logits.device)
    steps = torch.arange(width, device=logits.device)
    chosen = logits[rows[:, None], steps[None, :], targets.clamp(min=0)].float()
    values = (chosen - log_normaliser(logits)[rows]).masked_fill(targets < 0, 0.0).cpu().double().sum(-1).tolist()
    return {(question, choice): value for (_, question, choice), value in zip(asked, values, strict=True)}


def log_normaliser(logits: Tensor) -> Tensor:
    """[..., vocabulary] -> [...] float32 logsumexp, widened piece by piece: large vocabularies do not fit twice."""
    flat = logits.flatten(0, -2)
    pieces = torch.split(flat, max(1, _CHUNK // flat.shape[-1]))
    return torch.cat([piece.float().logsumexp(-1) for piece in pieces]).view(logits.shape[:-1])


def answer_nll(
    model: Any, examples: Sequence[Example], *, pad_id: int, max_tokens: int, tick: Tick
) -> list[tuple[float, int]]:
    """Summed NLL (nats) and count of each example's answer tokens, in the order given."""
    found = [(0.0, 0)] * len(examples)
    size = vocabulary(model)
    for group in packed(
        range(len(examples)),
        lambda index: len(examples[index].ids),
        lambda rows, width: rows * width <= max_tokens,
        spread=SPREAD,
    ):
        for part in packed(
            group,
            lambda index: len(examples[index].ids) - examples[index].answer_from,
            lambda rows, longest: rows * (longest + 1) * size <= LOGITS,
        ):
            totals, counts = _batch_nll(model, collate([examples[index] for index in part], pad_id).to(model.device))
            for index, total, tokens in zip(part, totals, counts, strict=True):
                found[index] = (total, tokens)
            tick(len(part))
    return found


def _batch_nll(model: Any, batch: Batch) -> tuple[list[float], list[int]]:
    with head_reads(model, batch.predicting):
        logits = model(input_ids=batch.input_ids, use_cache=False).logits  # [N, vocabulary]
    losses = log_normaliser(logits) - logits.gather(-1, batch.targets[:, None])[:, 0].float()
    counts = batch.predicting.sum(-1).tolist()
    return [float(part.double().sum()) for part in losses.cpu().split(counts)], counts
