"""What is minimised: cross-entropy on answers, distance to a teacher, group sparsity of adapters under closed gates.

Shapes: N tokens of a pass in all its rows, M of them with a label behind them, V vocabulary, H hidden size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from prunetune.data.batches import IGNORE_INDEX, SMALL_BATCH_TOKENS, Batch, collate, micro_batches
from prunetune.data.encoding import Example
from prunetune.data.packing import PackedBatch
from prunetune.model.lm_head import capture_head_inputs, chunked_loss, logits_function
from prunetune.pruning.units import Site, closed_fractions
from prunetune.train.adapters import adapter_group_norms
from prunetune.train.parallel.ranks import SINGLE_PROCESS, Ranks


@dataclass(frozen=True)
class Teacher:
    """A frozen model of the same hidden size, and how much its logits and its layers' outputs weigh."""

    model: Any
    logits_weight: float
    hidden_weight: float
    is_tuned: bool = True  # knows the task; one that does not is heard only where there is no label
    shares_weights: bool = False  # its weights are the student's, see `model.shared`
    share: float = 1.0  # of a batch's examples that it sees, in (0, 1]

    def __post_init__(self) -> None:
        assert 0 < self.share <= 1, "`by_size` decides what 0 means"


def split_by_teacher(
    examples: Sequence[Example], teacher: Teacher | None
) -> list[tuple[Teacher | None, Sequence[Example]]]:
    """A batch by who teaches: (the teacher, those it sees), (None, the others); none of the parts is empty.

    It sees its share, rounded up, and first what has no label: nothing else would teach that, so all of it is seen.
    """
    if teacher is None or teacher.share == 1:
        return [(teacher, examples)] if examples else []
    ordered = sorted(examples, key=lambda example: example.answer_start < len(example.token_ids))
    bare = sum(example.answer_start == len(example.token_ids) for example in examples)
    seen = max(bare, math.ceil(teacher.share * len(examples)))
    parts = [(teacher, ordered[:seen]), (None, ordered[seen:])]
    return [(each, part) for each, part in parts if part]


@dataclass(frozen=True)
class ForwardInputs:
    """One pass, whatever its layout; places count along the flattened rows."""

    model_kwargs: Mapping[str, Any]  # of the model's forward
    label_positions: Tensor  # long [M], where logits are needed
    targets: Tensor  # long [M], what they predict; -100 does not count
    token_mask: Tensor  # bool [N], false at padding


def inputs_from_batch(batch: Batch) -> ForwardInputs:
    """A padded batch."""
    predicting = batch.prediction_mask.flatten().nonzero()[:, 0]
    return ForwardInputs({"input_ids": batch.input_ids}, predicting, batch.targets, batch.token_mask.flatten())


def inputs_from_pack(row: PackedBatch) -> ForwardInputs:
    """A packed row, for a model under `packed_rows`."""
    arguments = {
        "input_ids": row.input_ids,
        "position_ids": row.position_ids,
        "cu_seq_lens_q": row.cu_seq_lens,
        "cu_seq_lens_k": row.cu_seq_lens,
        "max_length_q": row.max_seq_len,
        "max_length_k": row.max_seq_len,
    }
    real = torch.arange(row.input_ids.shape[1], device=row.unpadded_length.device) < row.unpadded_length
    return ForwardInputs(arguments, row.prediction_positions, row.targets, real)


def unlabelled_mask(feed: ForwardInputs) -> Tensor:
    """Bool [N]: real tokens behind which no label stands."""
    labels = torch.zeros_like(feed.token_mask, dtype=torch.int32)
    labels = labels.index_add(0, feed.label_positions, (feed.targets != IGNORE_INDEX).to(torch.int32))
    return feed.token_mask & (labels == 0)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[n, V] logits and long [n] targets -> their cross-entropy summed, nats; a target of -100 does not count."""
    return F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE_INDEX)


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, real: Tensor) -> Tensor:
    """[n, V] logits twice -> KL(wanted || found) of the next token, summed over the places of bool [n] `real`."""
    student_logits, teacher_logits = (
        F.log_softmax(student_logits.float(), -1),
        F.log_softmax(teacher_logits.float(), -1),
    )
    apart = F.kl_div(student_logits, teacher_logits, reduction="none", log_target=True).sum(-1)
    return (apart * real).sum()


def relative_error(output: Tensor, aim: Tensor) -> Tensor:
    """[rows, T, H] twice -> [N]: squared distance over the aim's squared length, token by token.

    Relative, because single tokens (the first above all) have outputs a thousand times as long as others'.
    """
    aim = aim.float().flatten(0, 1)
    return (output.float().flatten(0, 1) - aim).square().sum(-1) / aim.square().sum(-1).clamp_min(1e-6)


def checkpointed_relative_error(output: Tensor, aim: Tensor) -> Tensor:
    """The same to the bit, of which autograd keeps the two inputs and no float32 copies: a layer's are made again."""
    error: Tensor = checkpoint(relative_error, output, aim, use_reentrant=False, preserve_rng_state=False)
    return error


@dataclass(frozen=True)
class LossTerms:
    """What the losses are made of: functions of tensors, as they are or compiled."""

    cross_entropy: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    divergence: Callable[[Tensor, Tensor, Tensor], Tensor] = kl_divergence
    relative_error: Callable[[Tensor, Tensor], Tensor] = (
        checkpointed_relative_error  # compiled, it keeps no more by itself
    )


EAGER_TERMS = LossTerms()


@functools.cache
def compiled_terms() -> LossTerms:
    """The same, each compiled at its first call: logits are then read and written once, not a dozen times."""
    return LossTerms(*(torch.compile(term, dynamic=True) for term in (cross_entropy, kl_divergence, relative_error)))


def answer_loss(model: Any, feed: ForwardInputs, terms: LossTerms = EAGER_TERMS) -> Tensor:
    """Summed cross-entropy (nats) over the labelled tokens; the head runs only where labels are."""
    with _autocast(model, feed):
        return _answer_loss_from_hidden(model, feed, _forward(model, feed)[0], terms)


def answer_and_distill_loss(
    model: Any, feed: ForwardInputs, teacher: Teacher | None, terms: LossTerms = EAGER_TERMS
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy over the labelled tokens, and summed distance to the teacher over all tokens it is heard on.

    Distance: KL(teacher || student) of the next token (Hinton et al. 2015) and the squared error of every layer's
    output relative to the teacher's, mean over layers; weighed as the teacher says.
    """
    if teacher is None:
        loss = answer_loss(model, feed, terms)
        return loss, torch.zeros_like(loss.detach())
    deep, heard = teacher.hidden_weight > 0, feed.token_mask if teacher.is_tuned else unlabelled_mask(feed)
    with _autocast(model, feed):
        hidden, layers = _forward(model, feed, deep=deep)
        with torch.no_grad():
            aim, aims = _forward(teacher.model, feed, deep=deep)
        distance = torch.zeros((), device=hidden.device)
        if teacher.logits_weight:
            distance = distance + teacher.logits_weight * _kl_from_hidden(
                model, hidden, teacher.model, aim, heard, terms
            )
        if deep:
            errors = torch.stack([terms.relative_error(one, other) for one, other in zip(layers, aims, strict=True)])
            distance = distance + teacher.hidden_weight * (errors.mean(0) * heard).sum()
        return _answer_loss_from_hidden(model, feed, hidden, terms), distance


def _autocast(model: Any, feed: ForwardInputs) -> Any:
    """Adapters are float32 and compute in the base's dtype, as is usual for mixed precision."""
    device = feed.token_mask.device
    # Without a cache of casts, which would outlive a recording of the pass.
    return torch.autocast(
        device.type, model.dtype, enabled=model.dtype != torch.float32, cache_enabled=device.type != "cuda"
    )


def _forward(model: Any, feed: ForwardInputs, *, deep: bool = False) -> tuple[Tensor, Sequence[Tensor]]:
    """What the head would read, [N, H], and every layer's output where asked for."""
    with capture_head_inputs(model) as seen:
        result = model(**feed.model_kwargs, use_cache=False, output_hidden_states=deep)
    return seen[0], result.hidden_states[1:] if deep else ()


def _answer_loss_from_hidden(model: Any, feed: ForwardInputs, hidden: Tensor, terms: LossTerms) -> Tensor:
    """Cross-entropy of all labels, from what the head would read."""
    head = logits_function(model)

    def loss(portion: Tensor, places: slice) -> Tensor:
        return terms.cross_entropy(head(portion), feed.targets[places])

    return chunked_loss(hidden.index_select(0, feed.label_positions), _vocabulary(model), loss)


def _kl_from_hidden(model: Any, hidden: Tensor, teacher: Any, aim: Tensor, heard: Tensor, terms: LossTerms) -> Tensor:
    """KL(teacher || student) of the next token, summed over the tokens that bool [N] `heard` marks."""
    head, other = logits_function(model), logits_function(teacher)

    def loss(portion: Tensor, places: slice) -> Tensor:
        with torch.no_grad():
            wanted = other(aim[places])
        return terms.divergence(head(portion), wanted, heard[places])

    return chunked_loss(hidden, _vocabulary(model), loss)


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def micro_batch_inputs(
    examples: Sequence[Example], pad_id: int, micro_tokens: int, device: torch.device, ranks: Ranks = SINGLE_PROCESS
) -> list[ForwardInputs]:
    """This rank's share of all examples in padded batches of at most `micro_tokens`.

    Ranks that exchange weights in every pass take equally many: the last may count for nothing.
    """
    # A GPU waits for launches, not for tokens: there, one padded pass is cheaper than two lean ones.
    small = SMALL_BATCH_TOKENS if device.type == "cpu" else micro_tokens
    shares = [micro_batches(share, micro_tokens, small) for share in ranks.split_examples(examples)]
    found = [inputs_from_batch(collate(part, pad_id).to(device)) for part in shares[ranks.rank]]
    if ranks.uses_fsdp:
        found += [_zero_weight_inputs(examples[0], pad_id, device)] * (max(map(len, shares)) - len(found))
    return found


def _zero_weight_inputs(example: Example, pad_id: int, device: torch.device) -> ForwardInputs:
    """A pass of which nothing counts."""
    feed = inputs_from_batch(collate([replace(example, answer_start=len(example.token_ids))], pad_id).to(device))
    return replace(feed, token_mask=torch.zeros_like(feed.token_mask))


def count_labels(examples: Sequence[Example]) -> int:
    """Labels that count, at least 1: what a sum of losses is divided by."""
    return max(1, sum(len(example.token_ids) - example.answer_start for example in examples))


def count_tokens(examples: Sequence[Example]) -> int:
    """Tokens, at least 1: what a sum of distances is divided by."""
    return max(1, sum(len(example.token_ids) for example in examples))


def accumulate_gradients(
    model: Any,
    examples: Sequence[Example],
    pad_id: int,
    micro_tokens: int,
    teacher: Teacher | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> tuple[float, float]:
    """Accumulate gradients of the mean answer loss per label plus the mean distance per token seen; returns the two.

    Of several ranks each has its share of both, which add up.
    """
    device = next(model.parameters()).device
    labels = count_labels(examples)
    loss, distance = torch.zeros((), device=device), torch.zeros((), device=device)
    for who, part in split_by_teacher(examples, teacher):
        tokens = count_tokens(part)
        for feed in micro_batch_inputs(part, pad_id, micro_tokens, device, ranks):
            answers, apart = answer_and_distill_loss(model, feed, who)
            (answers / labels + apart / tokens).backward()  # type: ignore[no-untyped-call]
            loss += answers.detach() / labels
            distance += apart.detach() / tokens
    return float(loss), float(distance)


@torch.no_grad()
def mean_loss(
    model: Any, examples: Sequence[Example], pad_id: int, micro_tokens: int, ranks: Ranks = SINGLE_PROCESS
) -> float:
    """Mean answer loss per token over `examples`, nats; of several ranks each has its share, which add up."""
    parts = (
        micro_batch_inputs(examples, pad_id, micro_tokens, next(model.parameters()).device, ranks) if examples else []
    )
    return sum(float(answer_loss(model, feed)) for feed in parts) / count_labels(examples)


def group_lasso(model: Any, gates: Mapping[str, Tensor], sites: Sequence[Site]) -> Tensor:
    """Sum over closed units of the L2 norm of their adapter parts, mean over sites (ATP, section 3.3); a scalar.

    Drives what adapters hold for removed units to zero, so that cutting it changes nothing.
    """
    shut = closed_fractions(gates, sites)
    return torch.stack(
        [(adapter_group_norms(model, site) * shut[site.name]).sum() for site in sites if site.has_linear_slices]
    ).mean()
