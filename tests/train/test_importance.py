"""Laws of importance: mean squared gradients at gates of one; what is not finite does not count."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from prunetune.data.encoding import Example
from prunetune.errors import ModelError
from prunetune.pruning.sites import find_sites
from prunetune.train.importance import gate_importance
from prunetune.train.passes import PaddedPasses
from prunetune.train.step_guard import StepGuard
from support.loop import config_of, examples, identical
from support.models import tiny, with_lora


def passes_of() -> tuple[PaddedPasses, Any]:
    model = tiny().requires_grad_(False)
    sites = find_sites(model)
    return PaddedPasses(with_lora(model), sites, 0, config_of()), sites


def batches() -> list[Sequence[Example]]:
    rows = examples(12)
    return [rows[:4], rows[4:8], rows[8:]]


def test_importance_is_the_mean_squared_gradient_at_gates_of_one() -> None:
    passes, sites = passes_of()
    importance = gate_importance(passes, StepGuard(passes, 5), sites, batches(), torch.device("cpu"))
    ones = {site.name: torch.ones(site.units) for site in sites}
    gradients = [passes.gate_gradients(batch, ones)[1] for batch in batches()]
    for site in sites:
        expected = torch.stack([by_site[site.name] for by_site in gradients]).square().mean(0)
        torch.testing.assert_close(importance[site.name], expected)
        assert importance[site.name].shape == (site.units,)


def give_nan(passes: PaddedPasses, monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Gradients of these calls, counted from 1, are not finite."""
    genuine, count = passes.gate_gradients, [0]

    def gate_gradients(*arguments: Any) -> Any:
        losses, gradients = genuine(*arguments)
        count[0] += 1
        factor = math.nan if count[0] in calls else 1
        return losses, {name: gradient * factor for name, gradient in gradients.items()}

    monkeypatch.setattr(passes, "gate_gradients", gate_gradients)


def test_importance_of_a_batch_that_is_not_finite_does_not_count(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    passes, sites = passes_of()
    others = [batches()[0], batches()[2]]
    expected = gate_importance(passes, StepGuard(passes, 5), sites, others, torch.device("cpu"))
    give_nan(passes, monkeypatch, 2)
    guard = StepGuard(passes, 5)
    with caplog.at_level(logging.WARNING):
        importance = gate_importance(passes, guard, sites, batches(), torch.device("cpu"), step=6)
    assert identical(importance, expected)
    assert guard.skipped == 1
    assert "the importance is nan at step 7 (rows row" in caplog.text


def test_importance_without_finite_batches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, sites = passes_of()
    give_nan(passes, monkeypatch, 1, 2, 3)
    with pytest.raises(ModelError, match="2 batches were skipped before"):
        gate_importance(passes, StepGuard(passes, 2), sites, batches(), torch.device("cpu"))
