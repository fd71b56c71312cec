"""Laws of scores: mean squared gradients at gates of one, per parameter or price; what is not finite does not count."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prunetune.cost.budget_limits import BudgetLimits
from prunetune.data.batches import BatchStream
from prunetune.data.encoding import Example
from prunetune.errors import ModelError
from prunetune.pruning.sites import find_sites
from prunetune.train.decisions import gate_importance, score_units
from prunetune.train.job import TrainingJob
from prunetune.train.passes import PaddedPasses
from prunetune.train.step_guard import StepGuard
from support.loop import config_of, identical, job_of
from support.models import tiny, with_lora


def job_and_passes(**search: Any) -> tuple[TrainingJob, PaddedPasses]:
    job = job_of(config_of({"search": {"init_batches": 3, **search}}))
    with_lora(job.model)
    return job, PaddedPasses(job.model, job.sites, 0, job.config)


def importance_of(job: TrainingJob, passes: PaddedPasses, guard: StepGuard | None = None) -> dict[str, Tensor]:
    return gate_importance(job, passes, guard or StepGuard(passes, 5), job.sites, 6)


def test_importance_is_the_mean_squared_gradient_at_gates_of_one() -> None:
    job, passes = job_and_passes()
    importance = importance_of(job, passes)
    ones = {site.name: torch.ones(site.units) for site in job.sites}
    gradients = [passes.gate_gradients(job.search_stream.batch_at(index), ones)[1] for index in range(3)]
    for site in job.sites:
        expected = torch.stack([by_site[site.name] for by_site in gradients]).square().mean(0)
        torch.testing.assert_close(importance[site.name], expected)
        assert importance[site.name].shape == (site.units,)


def test_score_is_the_importance_per_parameter_with_what_a_unit_contains_and_attention_has_its_weight() -> None:
    job, passes = job_and_passes()
    sites = find_sites(tiny(), ("attention-blocks", "kv-groups", "mlp-channels"))
    job, passes.sites = replace(job, sites=sites), sites
    weight = job.config.search.attention_weight
    scores = score_units(job, passes, StepGuard(passes, 5), sites, None, 6)
    importance = importance_of(job, passes)
    block, groups = sites[0], sites[1]
    channels = next(site for site in sites if site.kind == "mlp")
    assert (block.kind, groups.parent) == ("attention-blocks", block.name)
    whole = block.unit_params + groups.units * groups.unit_params
    torch.testing.assert_close(scores[block.name], weight * importance[block.name] / whole)
    torch.testing.assert_close(scores[groups.name], weight * importance[groups.name] / groups.unit_params)
    torch.testing.assert_close(scores[channels.name], importance[channels.name] / channels.unit_params)


def test_score_under_limits_is_the_importance_per_price() -> None:
    job, passes = job_and_passes()
    prices = {site.name: 2.0 + index for index, site in enumerate(job.sites)}
    limits = BudgetLimits((), prices=prices, prices_with_children=prices)
    job = replace(job, constraints=replace(job.constraints, limits=limits))
    scores = score_units(job, passes, StepGuard(passes, 5), job.sites, None, 6)
    kinds = {site.name: site.kind for site in job.sites}
    for name, importance in importance_of(job, passes).items():
        weight = job.config.search.attention_weight if kinds[name].is_head else 1
        torch.testing.assert_close(scores[name], weight * importance / prices[name])


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
    job, passes = job_and_passes()
    stream = job.search_stream

    class Without(BatchStream):
        def batch_at(self, step: int) -> list[Example]:
            return stream.batch_at((0, 2)[step])

    other = replace(
        job, search_stream=Without(stream.examples, 4, 2), config=config_of({"search": {"init_batches": 2}})
    )
    expected = importance_of(other, passes)
    give_nan(passes, monkeypatch, 2)
    guard = StepGuard(passes, 5)
    with caplog.at_level(logging.WARNING):
        importance = importance_of(job, passes, guard)
    assert identical(importance, expected)
    assert guard.skipped == 1
    assert "the gradient at the gates is nan at step 7 (rows row" in caplog.text


def test_importance_without_finite_batches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    job, passes = job_and_passes()
    give_nan(passes, monkeypatch, 1, 2, 3, 4, 5, 6)
    with pytest.raises(ModelError, match="2 batches were skipped before"):
        importance_of(job, passes, StepGuard(passes, 2))
    with pytest.raises(ModelError, match="none of the 3 batches of search has finite gradients at step 7"):
        importance_of(job, passes, StepGuard(passes, 5))
