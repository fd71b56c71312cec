"""One forward pass: its inputs, from a padded or a packed batch, and the outputs that losses are made of.

Shapes: N tokens of a pass in all its rows, M of them with a label behind them, V vocabulary, H hidden size, T tokens of
a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prunetune.config.recipe import DistillConfig
from prunetune.data.batches import IGNORE_INDEX, SMALL_BATCH_TOKENS, Batch, PackedBatch, collate, micro_batches
from prunetune.data.encoding import Example
from prunetune.model.lm_head import capture_head_inputs, chunked_loss, logits_function
from prunetune.pruning.teacher_student_weights import copy_sharing_weights
from prunetune.train.parallel.ranks import SINGLE_PROCESS, Ranks


@dataclass(frozen=True)
class ForwardInputs:
    """What one pass reads, the same for padded and packed batches; positions count along the flattened rows."""

    model_kwargs: Mapping[str, Any]  # of the model's forward
    label_positions: Tensor  # long [M], where labels are predicted
    targets: Tensor  # long [M], the labels; -100 does not count
    token_mask: Tensor  # bool [N], false at padding


def inputs_from_batch(batch: Batch) -> ForwardInputs:
    """Of a padded batch."""
    positions = batch.prediction_mask.flatten().nonzero()[:, 0]
    return ForwardInputs({"input_ids": batch.input_ids}, positions, batch.targets, batch.token_mask.flatten())


def inputs_from_pack(row: PackedBatch) -> ForwardInputs:
    """Of a packed row, for a model under `use_packed_attention`."""
    model_kwargs = {
        "input_ids": row.input_ids,
        "position_ids": row.position_ids,
        "cu_seq_lens_q": row.cu_seq_lens,
        "cu_seq_lens_k": row.cu_seq_lens,
        "max_length_q": row.max_seq_len,
        "max_length_k": row.max_seq_len,
    }
    token_mask = torch.arange(row.input_ids.shape[1], device=row.unpadded_length.device) < row.unpadded_length
    return ForwardInputs(model_kwargs, row.prediction_positions, row.targets, token_mask)


def micro_batch_inputs(
    examples: Sequence[Example], pad_id: int, micro_tokens: int, device: torch.device, ranks: Ranks = SINGLE_PROCESS
) -> list[ForwardInputs]:
    """This rank's share of all examples in padded batches of at most `micro_tokens`.

    Ranks that exchange weights in every pass need equally many passes: some get passes in which no token counts.
    """
    # A GPU waits for launches, not for tokens: there, one padded pass is cheaper than two lean ones.
    small = SMALL_BATCH_TOKENS if device.type == "cpu" else micro_tokens
    by_rank = [micro_batches(share, micro_tokens, small) for share in ranks.split_examples(examples)]
    passes = [inputs_from_batch(collate(batch, pad_id).to(device)) for batch in by_rank[ranks.rank]]
    if ranks.uses_fsdp:
        unlabelled = replace(examples[0], answer_start=len(examples[0].token_ids))
        empty = inputs_from_batch(collate([unlabelled], pad_id).to(device))
        empty = replace(empty, token_mask=torch.zeros_like(empty.token_mask))
        passes += [empty] * (max(map(len, by_rank)) - len(passes))
    return passes


@dataclass(frozen=True)
class ForwardOutputs:
    """What one pass of a model gives to the loss terms; `teacher` holds the same of its teacher, without gradients."""

    model: Any
    inputs: ForwardInputs  # the teacher's `token_mask` marks the tokens on which it counts
    hidden: Tensor  # [N, H], what the head would read: it has not run yet
    layer_outputs: Sequence[Tensor] = ()  # [rows, T, H] of every layer, if asked for
    teacher: ForwardOutputs | None = None
    compiled: bool = False  # whether functions of tensors are to be compiled to single kernels

    def sum_over_logits(self, function: Callable[[Tensor, slice], Tensor], positions: Tensor | None = None) -> Tensor:
        """The sum of `function(logits [n, V], portion)` over portions of all N tokens, or of those at `positions`.

        A portion is a slice of the N tokens, or of `positions`. Logits of a whole pass would be the largest tensor of
        a step; portions are dropped as soon as their gradient is known (see `chunked_loss`).
        """
        head, config = logits_function(self.model), self.model.config.get_text_config()
        hidden = self.hidden if positions is None else self.hidden.index_select(0, positions)
        return chunked_loss(hidden, int(config.vocab_size), lambda rows, portion: function(head(rows), portion))

    @torch.no_grad()
    def logits(self, portion: slice) -> Tensor:
        """[n, V] of a portion of the N tokens, without gradients: what a term reads of a teacher."""
        return logits_function(self.model)(self.hidden[portion])


def run_forward(
    model: Any,
    inputs: ForwardInputs,
    teacher: Teacher | None = None,
    *,
    layer_outputs: bool = False,
    compiled: bool = False,
) -> ForwardOutputs:
    """One pass of the model, and of its teacher where one is given."""
    hidden, layers = _hidden_states(model, inputs, layer_outputs)
    taught = None
    if teacher is not None:
        with torch.no_grad():
            teacher_hidden, teacher_layers = _hidden_states(teacher.model, inputs, layer_outputs)
        mask = inputs.token_mask
        if not teacher.is_tuned:  # real tokens whose next token is no label
            labels = torch.zeros_like(mask, dtype=torch.int32)
            labels = labels.index_add(0, inputs.label_positions, (inputs.targets != IGNORE_INDEX).to(torch.int32))
            mask = mask & (labels == 0)
        taught = ForwardOutputs(teacher.model, replace(inputs, token_mask=mask), teacher_hidden, teacher_layers)
    return ForwardOutputs(model, inputs, hidden, layers, taught, compiled)


def _hidden_states(model: Any, inputs: ForwardInputs, layer_outputs: bool) -> tuple[Tensor, Sequence[Tensor]]:
    with capture_head_inputs(model) as head_inputs:
        result = model(**inputs.model_kwargs, use_cache=False, output_hidden_states=layer_outputs)
    return head_inputs[0], result.hidden_states[1:] if layer_outputs else ()


def autocast(model: Any, device: torch.device) -> torch.autocast:
    """Mixed precision: adapters are float32 and compute in the base's dtype."""
    # Without a cache of casts, which would outlive a recording of the pass.
    return torch.autocast(
        device.type, model.dtype, enabled=model.dtype != torch.float32, cache_enabled=device.type != "cuda"
    )


# -- the teacher that a student is distilled from, and the examples it sees --------------------------------------------


@dataclass(frozen=True)
class Teacher:
    """A frozen model of the student's hidden size; `distill.logits` and `distill.hidden` weigh its loss terms."""

    model: Any
    is_tuned: bool = True  # on the task; an untuned one counts only on tokens without a label
    shares_weights: bool = False  # its weights are the student's, see `pruning/teacher_student_weights.py`
    share: float = 1.0  # of a batch's examples that it sees, in (0, 1]

    def __post_init__(self) -> None:
        assert 0 < self.share <= 1, "`resolve_auto` decides what 0 means"


def split_by_teacher(
    examples: Sequence[Example], teacher: Teacher | None
) -> list[tuple[Teacher | None, Sequence[Example]]]:
    """A batch in the part that the teacher sees and the part that it does not, (None, examples); neither is empty.

    It sees its share, rounded up, and examples without a label first: nothing else teaches these, so it sees them all.
    """
    if teacher is None or teacher.share == 1:
        return [(teacher, examples)] if examples else []
    ordered = sorted(examples, key=lambda example: example.loss_tokens > 0)
    unlabelled = sum(example.loss_tokens == 0 for example in examples)
    count = max(unlabelled, math.ceil(teacher.share * len(examples)))
    subsets = [(teacher, ordered[:count]), (None, ordered[count:])]
    return [(seen_by, subset) for seen_by, subset in subsets if subset]


def base_teacher(model: Any, distill: DistillConfig) -> Teacher:
    """The untuned model, over the student's own tensors; to be made before adapters are added to the student."""
    return Teacher(copy_sharing_weights(model), is_tuned=False, shares_weights=True, share=distill.share)
