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

from prunetune.data.batches import IGNORED, SMALL, Batch, collate, micro_batches
from prunetune.data.packs import Pack
from prunetune.data.templates import Example
from prunetune.model.lm_head import head_of, headless, in_portions
from prunetune.pruning.units import Site, closed
from prunetune.train.adapters import group_norms
from prunetune.train.parallel.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Teacher:
    """A frozen model of the same hidden size, and how much its logits and its layers' outputs weigh."""

    model: Any
    logits: float
    hidden: float
    tuned: bool = True  # knows the task; one that does not is heard only where there is no label
    lends: bool = False  # its weights are the student's, see `model.shared`
    share: float = 1.0  # of a batch's examples that it sees, in (0, 1]

    def __post_init__(self) -> None:
        assert 0 < self.share <= 1, "`by_size` decides what 0 means"


def lessons(examples: Sequence[Example], teacher: Teacher | None) -> list[tuple[Teacher | None, Sequence[Example]]]:
    """A batch by who teaches: (the teacher, those it sees), (None, the others); none of the parts is empty.

    It sees its share, rounded up, and first what has no label: nothing else would teach that, so all of it is seen.
    """
    if teacher is None or teacher.share == 1:
        return [(teacher, examples)] if examples else []
    ordered = sorted(examples, key=lambda example: example.answer_from < len(example.ids))
    bare = sum(example.answer_from == len(example.ids) for example in examples)
    seen = max(bare, math.ceil(teacher.share * len(examples)))
    parts = [(teacher, ordered[:seen]), (None, ordered[seen:])]
    return [(each, part) for each, part in parts if part]


@dataclass(frozen=True)
class Feed:
    """One pass, whatever its layout; places count along the flattened rows."""

    arguments: Mapping[str, Any]  # of the model's forward
    predicting: Tensor  # long [M], where logits are needed
    targets: Tensor  # long [M], what they predict; -100 does not count
    real: Tensor  # bool [N], false at padding


def feed_of_batch(batch: Batch) -> Feed:
    """A padded batch."""
    predicting = batch.predicting.flatten().nonzero()[:, 0]
    return Feed({"input_ids": batch.input_ids}, predicting, batch.targets, batch.real.flatten())


def feed_of_pack(row: Pack) -> Feed:
    """A packed row, for a model under `packed_rows`."""
    arguments = {
        "input_ids": row.input_ids,
        "position_ids": row.position_ids,
        "cu_seq_lens_q": row.bounds,
        "cu_seq_lens_k": row.bounds,
        "max_length_q": row.longest,
        "max_length_k": row.longest,
    }
    real = torch.arange(row.input_ids.shape[1], device=row.length.device) < row.length
    return Feed(arguments, row.predicting, row.targets, real)


def without_label(feed: Feed) -> Tensor:
    """Bool [N]: real tokens behind which no label stands."""
    labels = torch.zeros_like(feed.real, dtype=torch.int32)
    labels = labels.index_add(0, feed.predicting, (feed.targets != IGNORED).to(torch.int32))
    return feed.real & (labels == 0)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[n, V] logits and long [n] targets -> their cross-entropy summed, nats; a target of -100 does not count."""
    return F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORED)


def divergence(found: Tensor, wanted: Tensor, real: Tensor) -> Tensor:
    """[n, V] logits twice -> KL(wanted || found) of the next token, summed over the places of bool [n] `real`."""
    found, wanted = F.log_softmax(found.float(), -1), F.log_softmax(wanted.float(), -1)
    apart = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    return (apart * real).sum()


def relative_error(output: Tensor, aim: Tensor) -> Tensor:
    """[rows, T, H] twice -> [N]: squared distance over the aim's squared length, token by token.

    Relative, because single tokens (the first above all) have outputs a thousand times as long as others'.
    """
    aim = aim.float().flatten(0, 1)
    return (output.float().flatten(0, 1) - aim).square().sum(-1) / aim.square().sum(-1).clamp_min(1e-6)


def lean_relative_error(output: Tensor, aim: Tensor) -> Tensor:
    """The same to the bit, of which autograd keeps the two inputs and no float32 copies: a layer's are made again."""
    error: Tensor = checkpoint(relative_error, output, aim, use_reentrant=False, preserve_rng_state=False)
    return error


@dataclass(frozen=True)
class Terms:
    """What the losses are made of: functions of tensors, as they are or compiled."""

    cross_entropy: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    divergence: Callable[[Tensor, Tensor, Tensor], Tensor] = divergence
    relative_error: Callable[[Tensor, Tensor], Tensor] = lean_relative_error  # compiled, it keeps no more by itself


PLAIN = Terms()


@functools.cache
def compiled_terms() -> Terms:
    """The same, each compiled at its first call: logits are then read and written once, not a dozen times."""
    return Terms(*(torch.compile(term, dynamic=True) for term in (cross_entropy, divergence, relative_error)))


def answer_loss(model: Any, feed: Feed, terms: Terms = PLAIN) -> Tensor:
    """Summed cross-entropy (nats) over the labelled tokens; the head runs only where labels are."""
    with _mixed(model, feed):
        return _answers(model, feed, _forward(model, feed)[0], terms)


def losses(model: Any, feed: Feed, teacher: Teacher | None, terms: Terms = PLAIN) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy over the labelled tokens, and summed distance to the teacher over all tokens it is heard on.

    Distance: KL(teacher || student) of the next token (Hinton et al. 2015) and the squared error of every layer's
    output relative to the teacher's, mean over layers; weighed as the teacher says.
    """
    if teacher is None:
        loss = answer_loss(model, feed, terms)
        return loss, torch.zeros_like(loss.detach())
    deep, heard = teacher.hidden > 0, feed.real if teacher.tuned else without_label(feed)
    with _mixed(model, feed):
        hidden, layers = _forward(model, feed, deep=deep)
        with torch.no_grad():
            aim, aims = _forward(teacher.model, feed, deep=deep)
        distance = torch.zeros((), device=hidden.device)
        if teacher.logits:
            distance = distance + teacher.logits * _apart(model, hidden, teacher.model, aim, heard, terms)
        if deep:
            errors = torch.stack([terms.relative_error(one, other) for one, other in zip(layers, aims, strict=True)])
            distance = distance + teacher.hidden * (errors.mean(0) * heard).sum()
        return _answers(model, feed, hidden, terms), distance


def _mixed(model: Any, feed: Feed) -> Any:
    """Adapters are float32 and compute in the base's dtype, as is usual for mixed precision."""
    device = feed.real.device
    # Without a cache of casts, which would outlive a recording of the pass.
    return torch.autocast(
        device.type, model.dtype, enabled=model.dtype != torch.float32, cache_enabled=device.type != "cuda"
    )


def _forward(model: Any, feed: Feed, *, deep: bool = False) -> tuple[Tensor, Sequence[Tensor]]:
    """What the head would read, [N, H], and every layer's output where asked for."""
    with headless(model) as seen:
        result = model(**feed.arguments, use_cache=False, output_hidden_states=deep)
    return seen[0], result.hidden_states[1:] if deep else ()


def _answers(model: Any, feed: Feed, hidden: Tensor, terms: Terms) -> Tensor:
    """Cross-entropy of all labels, from what the head would read."""
    head = head_of(model)

    def loss(portion: Tensor, places: slice) -> Tensor:
        return terms.cross_entropy(head(portion), feed.targets[places])

    return in_portions(hidden.index_select(0, feed.predicting), _vocabulary(model), loss)


def _apart(model: Any, hidden: Tensor, teacher: Any, aim: Tensor, heard: Tensor, terms: Terms) -> Tensor:
    """KL(teacher || student) of the next token, summed over the tokens that bool [N] `heard` marks."""
    head, other = head_of(model), head_of(teacher)

    def loss(portion: Tensor, places: slice) -> Tensor:
        with torch.no_grad():
            wanted = other(aim[places])
        return terms.divergence(head(portion), wanted, heard[places])

    return in_portions(hidden, _vocabulary(model), loss)


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def feeds(
    examples: Sequence[Example], pad_id: int, micro_tokens: int, device: torch.device, ranks: Ranks = ALONE
) -> list[Feed]:
    """This rank's share of all examples in padded batches of at most `micro_tokens`.

    Ranks that exchange weights in every pass take equally many: the last may count for nothing.
    """
    # A GPU waits for launches, not for tokens: there, one padded pass is cheaper than two lean ones.
    small = SMALL if device.type == "cpu" else micro_tokens
    shares = [micro_batches(share, micro_tokens, small) for share in ranks.shares(examples)]
    found = [feed_of_batch(collate(part, pad_id).to(device)) for part in shares[ranks.rank]]
    if ranks.shards:
        found += [_idle(examples[0], pad_id, device)] * (max(map(len, shares)) - len(found))
    return found


def _idle(example: Example, pad_id: int, device: torch.device) -> Feed:
    """A pass of which nothing counts."""
    feed = feed_of_batch(collate([replace(example, answer_from=len(example.ids))], pad_id).to(device))
    return replace(feed, real=torch.zeros_like(feed.real))


def labels_of(examples: Sequence[Example]) -> int:
    """Labels that count, at least 1: what a sum of losses is divided by."""
    return max(1, sum(len(example.ids) - example.answer_from for example in examples))


def tokens_of(examples: Sequence[Example]) -> int:
    """Tokens, at least 1: what a sum of distances is divided by."""
    return max(1, sum(len(example.ids) for example in examples))


def backward(
    model: Any,
    examples: Sequence[Example],
    pad_id: int,
    micro_tokens: int,
    teacher: Teacher | None = None,
    ranks: Ranks = ALONE,
) -> tuple[float, float]:
    """Accumulate gradients of the mean answer loss per label plus the mean distance per token seen; returns the two.

    Of several ranks each has its share of both, which add up.
    """
    device = next(model.parameters()).device
    labels = labels_of(examples)
    loss, distance = torch.zeros((), device=device), torch.zeros((), device=device)
    for who, part in lessons(examples, teacher):
        tokens = tokens_of(part)
        for feed in feeds(part, pad_id, micro_tokens, device, ranks):
            answers, apart = losses(model, feed, who)
            (answers / labels + apart / tokens).backward()  # type: ignore[no-untyped-call]
            loss += answers.detach() / labels
            distance += apart.detach() / tokens
    return float(loss), float(distance)


@torch.no_grad()
def mean_loss(model: Any, examples: Sequence[Example], pad_id: int, micro_tokens: int, ranks: Ranks = ALONE) -> float:
    """Mean answer loss per token over `examples`, nats; of several ranks each has its share, which add up."""
    parts = feeds(examples, pad_id, micro_tokens, next(model.parameters()).device, ranks) if examples else []
    return sum(float(answer_loss(model, feed)) for feed in parts) / labels_of(examples)


def group_lasso(model: Any, gates: Mapping[str, Tensor], sites: Sequence[Site]) -> Tensor:
    """Sum over closed units of the L2 norm of their adapter parts, mean over sites (ATP, section 3.3); a scalar.

    Drives what adapters hold for removed units to zero, so that cutting it changes nothing.
    """
    shut = closed(gates, sites)
    return torch.stack([(group_norms(model, site) * shut[site.name]).sum() for site in sites if site.is_sliced]).mean()
