"""Laws of the loss terms: which are in use, what their sums are divided by, and under which key they are recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prunetune.config.recipe import from_mapping
from prunetune.data.batches import collate
from prunetune.data.encoding import Example
from prunetune.train import losses
from prunetune.train.forward import ForwardOutputs, Teacher, inputs_from_batch
from prunetune.train.losses import TERMS, Term, TrainingLoss
from support.models import tiny

BATCH = [Example((1, 2, 3, 4), 2), Example((1, 2, 3, 4, 5, 6), 5), Example((1, 2, 3), 3)]


def loss_of(has_teacher: bool, **distill: float) -> TrainingLoss:
    return TrainingLoss.from_config(from_mapping({"distill": distill}), has_teacher=has_teacher)


def test_terms_of_one_metric_have_one_normaliser() -> None:
    normalisers: dict[str, set[Any]] = {}
    for term in TERMS.values():
        normalisers.setdefault(term.metric, set()).add((term.per, term.needs_teacher))
    assert all(len(kinds) == 1 for kinds in normalisers.values())
    assert TERMS["answer"].metric == "loss", "which limits, trackers and reports read"


@pytest.mark.parametrize(
    ("has_teacher", "distill", "names"),
    [
        (False, {"logits": 1.0, "hidden": 1.0}, ["answer"]),
        (True, {"logits": 1.0, "hidden": 1.0}, ["answer", "distill_logits", "distill_hidden"]),
        (True, {"logits": 0.0, "hidden": 2.0}, ["answer", "distill_hidden"]),
        (True, {"logits": 0.0, "hidden": 0.0}, ["answer"]),
    ],
)
def test_terms_in_use_have_a_weight_and_their_teacher(
    has_teacher: bool, distill: dict[str, float], names: list[str]
) -> None:
    loss = loss_of(has_teacher, **distill)
    assert list(loss.weights) == names
    assert loss.metrics == ("loss", "distance")[: 1 + (len(names) > 1)]


def test_normalisers_count_labels_and_the_tokens_that_a_term_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TERMS, "extra", Term(lambda outputs: outputs.hidden.sum(), lambda _: 1.0, "token", "extra"))
    assert loss_of(True).normalisers(BATCH, BATCH[:1]) == {"loss": 3, "distance": 4, "extra": 13}
    assert loss_of(True).normalisers([], []) == {"loss": 1, "distance": 1, "extra": 1}


def test_loss_is_the_weighted_sum_of_its_terms() -> None:
    model, inputs = tiny(seed=1), inputs_from_batch(collate(BATCH, 0))
    teacher = Teacher(tiny(seed=2))
    alone = {name: loss_of(True, **{"logits": 0, "hidden": 0, name: 1}) for name in ("logits", "hidden")}
    with torch.no_grad():
        logits, hidden = (alone[name](model, inputs, teacher)["distance"] for name in ("logits", "hidden"))
        both = loss_of(True, logits=20.0, hidden=10.0)(model, inputs, teacher)
    torch.testing.assert_close(both["distance"], 20 * logits + 10 * hidden)
    assert logits > 0
    assert hidden > 0


def test_pass_without_the_teacher_leaves_out_its_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[ForwardOutputs] = []

    def spy(outputs: ForwardOutputs) -> Tensor:
        passes.append(outputs)
        return outputs.hidden.sum()

    monkeypatch.setattr(losses, "TERMS", {**TERMS, "spy": Term(spy, lambda _: 1.0, "token", "spy")})
    loss, inputs = loss_of(True), inputs_from_batch(collate(BATCH, 0))
    assert set(loss(tiny(), inputs, None)) == {"loss", "spy"}
    assert set(loss(tiny(), inputs, Teacher(tiny(seed=2)))) == {"loss", "distance", "spy"}
    alone, taught = passes
    assert alone.teacher is None
    assert not alone.layer_outputs
    assert taught.teacher is not None
    assert len(taught.layer_outputs) == len(taught.teacher.layer_outputs) > 0
