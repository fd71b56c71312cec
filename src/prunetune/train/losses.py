"""The training loss: a weighted sum of named terms (`TERMS`), and the group sparsity of adapters under closed gates.

A new term is one entry of `TERMS`, and its weight one option in `config/training.py`: docs/extend/loss-term.md.
Padded, packed, recorded, compiled and distributed passes all go through `TrainingLoss`.

Shapes: N tokens of a pass in all its rows, M of them with a label behind them, V vocabulary, H hidden size.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from prunetune.config.recipe import RunConfig
from prunetune.data.batches import IGNORE_INDEX
from prunetune.data.encoding import Example
from prunetune.pruning.units import Site, UnitKind, closed_fractions
from prunetune.train.adapters import adapter_norms
from prunetune.train.forward import ForwardInputs, ForwardOutputs, Teacher, autocast, micro_batch_inputs, run_forward
from prunetune.train.parallel.ranks import SINGLE_PROCESS, Ranks

# The group lasso's gradient is multiplied by these: while decisions are searched, and in the last epoch, when the
# decision is final (ATP, authors' code).
SEARCH_LASSO, FINAL_LASSO = 0.03, 100.0

# -- the terms ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """One addend of the training loss."""

    function: Callable[[ForwardOutputs], Tensor]  # one pass -> a scalar: the sum over its labels or real tokens
    weight: Callable[[RunConfig], float]  # 0: the term is left out
    per: Literal["label", "token"]  # what the sum over a batch is divided by: the labels, or the tokens of its examples
    metric: str  # key in metrics.jsonl; terms with the same key are added up there, and divide by the same
    needs_teacher: bool = False  # `outputs.teacher` is there, and only the examples that the teacher sees count
    needs_layers: bool = False  # `outputs.layer_outputs` is there


def answer_loss(outputs: ForwardOutputs) -> Tensor:
    """Cross-entropy (nats) of the labels; the head runs only where labels are."""
    inputs, loss = outputs.inputs, compile_once(cross_entropy) if outputs.compiled else cross_entropy
    return outputs.sum_over_logits(
        lambda logits, portion: loss(logits, inputs.targets[portion]), inputs.label_positions
    )


def distill_logits_loss(outputs: ForwardOutputs) -> Tensor:
    """KL(teacher || student) of the next token (Hinton et al. 2015) over the tokens on which the teacher counts."""
    teacher, loss = outputs.teacher, compile_once(kl_divergence) if outputs.compiled else kl_divergence
    assert teacher is not None
    return outputs.sum_over_logits(
        lambda logits, portion: loss(logits, teacher.logits(portion), teacher.inputs.token_mask[portion])
    )


def distill_hidden_loss(outputs: ForwardOutputs) -> Tensor:
    """Relative squared error of every layer's output, mean over layers, over the tokens on which the teacher counts."""
    teacher, loss = outputs.teacher, compile_once(relative_error) if outputs.compiled else checkpointed_relative_error
    assert teacher is not None
    student, targets = outputs.model, teacher.layer_outputs
    if (kept := getattr(student, "kept_hidden_channels", None)) is not None:  # its stream is narrower
        targets = [target.index_select(-1, kept) * student.stream_scale for target in targets]
    errors = torch.stack([loss(*pair) for pair in zip(outputs.layer_outputs, targets, strict=True)])
    return (errors.mean(0) * teacher.inputs.token_mask).sum()


TERMS: dict[str, Term] = {
    "answer": Term(answer_loss, lambda config: 1.0, per="label", metric="loss"),
    "distill_logits": Term(
        distill_logits_loss, lambda config: config.distill.logits, per="token", metric="distance", needs_teacher=True
    ),
    "distill_hidden": Term(
        distill_hidden_loss,
        lambda config: config.distill.hidden,
        per="token",
        metric="distance",
        needs_teacher=True,
        needs_layers=True,
    ),
}

# -- functions of tensors that terms are made of -----------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[n, V] logits and long [n] targets -> their cross-entropy summed, nats; a target of -100 does not count."""
    return F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE_INDEX)


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
    """[n, V] logits twice -> KL(teacher || student), summed over the tokens that bool [n] `mask` marks."""
    student, teacher = (F.log_softmax(logits.float(), -1) for logits in (student_logits, teacher_logits))
    return (F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * mask).sum()


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """[rows, T, H] twice -> [N]: squared distance over the target's squared length, token by token.

    Relative, because single tokens (the first above all) have outputs a thousand times as long as others'.
    """
    target = target.float().flatten(0, 1)
    return (output.float().flatten(0, 1) - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-6)


def checkpointed_relative_error(output: Tensor, target: Tensor) -> Tensor:
    """The same to the bit, but autograd keeps the inputs only and recomputes their float32 copies."""
    error: Tensor = checkpoint(relative_error, output, target, use_reentrant=False, preserve_rng_state=False)
    return error


@functools.cache
def compile_once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of tensors, compiled at its first call: logits are then read and written once, not a dozen times."""
    return torch.compile(function, dynamic=True)


# -- their sum ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingLoss:
    """The sum of the terms in use, by their weights; a pass without the teacher leaves out the terms that need it."""

    weights: Mapping[str, float]  # by name of the term
    compiled: bool = False

    @classmethod
    def from_config(cls, config: RunConfig, *, has_teacher: bool) -> Self:
        """The terms to which the recipe gives a weight, and whose teacher there is."""
        usable = {name: term for name, term in TERMS.items() if has_teacher or not term.needs_teacher}
        weights = {name: term.weight(config) for name, term in usable.items()}
        return cls({name: weight for name, weight in weights.items() if weight})

    @property
    def metrics(self) -> tuple[str, ...]:
        """Keys of the losses in the records of steps."""
        return tuple(dict.fromkeys(TERMS[name].metric for name in self.weights))

    def normalisers(self, examples: Sequence[Example], taught: Sequence[Example]) -> dict[str, int]:
        """By metric: the labels of a batch, or the tokens of those of its examples that the term sees; at least 1.

        `examples` are the batch, `taught` those of them that the teacher sees.
        """
        labels = max(1, sum(example.loss_tokens for example in examples))
        tokens, taught_tokens = (max(1, sum(len(row.token_ids) for row in rows)) for rows in (examples, taught))
        terms = [TERMS[name] for name in self.weights]
        return {
            term.metric: labels if term.per == "label" else taught_tokens if term.needs_teacher else tokens
            for term in terms
        }

    def __call__(self, model: Any, inputs: ForwardInputs, teacher: Teacher | None) -> dict[str, Tensor]:
        """One pass of model and teacher -> {metric: weighted sum of its terms}, not yet divided."""
        terms = {name: TERMS[name] for name in self.weights if teacher is not None or not TERMS[name].needs_teacher}
        sums: dict[str, Tensor] = {}
        with autocast(model, inputs.token_mask.device):
            outputs = run_forward(
                model,
                inputs,
                teacher if any(term.needs_teacher for term in terms.values()) else None,
                layer_outputs=any(term.needs_layers for term in terms.values()),
                compiled=self.compiled,
            )
            for name, term in terms.items():
                value = self.weights[name] * term.function(outputs)
                sums[term.metric] = sums[term.metric] + value if term.metric in sums else value
        return sums


# -- the answer loss alone, and the penalty on adapters ----------------------------------------------------------------


def summed_answer_loss(model: Any, inputs: ForwardInputs) -> Tensor:
    """Cross-entropy (nats) summed over the labels of one pass: what validation scores."""
    with autocast(model, inputs.token_mask.device):
        return answer_loss(run_forward(model, inputs))


@torch.no_grad()
def mean_loss(
    model: Any, examples: Sequence[Example], pad_id: int, micro_tokens: int, ranks: Ranks = SINGLE_PROCESS
) -> float:
    """Mean answer loss per label over `examples`, nats; of several ranks each has its share, which add up."""
    if not examples:
        return 0.0
    passes = micro_batch_inputs(examples, pad_id, micro_tokens, next(model.parameters()).device, ranks)
    labels = sum(example.loss_tokens for example in examples)
    return sum(float(summed_answer_loss(model, inputs)) for inputs in passes) / max(1, labels)


def group_lasso(model: Any, gates: Mapping[str, Tensor], sites: Sequence[Site]) -> Tensor:
    """Sum of the L2 norms of closed units' pieces of the adapters, mean over groups: a scalar (ATP, authors' code).

    Drives what adapters hold for removed units to zero, so that cutting it changes nothing. A layer has three groups:
    keys with queries and values with outputs, which a KV group joins, and the MLP.
    """
    closed, sites = closed_fractions(gates, sites), [site for site in sites if site.linear_slices()]
    groups = sum(2 if site.kind is UnitKind.KV_GROUP else 1 for site in sites)
    return torch.stack([(adapter_norms(model, site) * closed[site.name]).sum() for site in sites]).sum() / groups
