"""Laws of the searcher: draws repeat by seed and step, the budget loss rounds gates, the final plan is in budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prunetune.config.recipe import from_mapping
from prunetune.cost.parameters import keep_ratio_loss, kept_share, prunable_params
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import kept_params
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.searcher import Searcher
from support.models import tiny

KEEP = 0.6
SITES = find_sites(tiny())
every_kind = pytest.mark.parametrize("kind", ["transformer", "gru", "none"])


def searcher_of(seed: int = 0, **search: Any) -> Searcher:
    config = from_mapping({"seed": seed, "budget": {"keep": KEEP}, "search": search})
    return Searcher(SITES, PlanConstraints(align=8), config, torch.device("cpu"))


def joined(gates: Any) -> Tensor:
    return torch.cat([gates[name] for name in sorted(gates)])


@every_kind
def test_same_seed_and_step_give_the_same_draws(kind: str) -> None:
    torch.manual_seed(1)
    first = searcher_of(generator=kind)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, other = searcher_of(generator=kind), searcher_of(seed=1, generator=kind)
    for step in (0, 3):
        assert torch.equal(joined(first.sample(step)), joined(again.sample(step)))
        assert torch.equal(joined(first.decide(step).gates), joined(again.decide(step).gates))
        assert not torch.equal(joined(first.sample(step)), joined(other.sample(step)))
    assert not torch.equal(joined(first.sample(0)), joined(first.sample(3)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("kind", "least"), [("none", 1.0), ("transformer", 0.998), ("gru", 0.98)])
def test_search_starts_dense(kind: str, least: float) -> None:
    """Logits of zero drop no unit; those of a new network are spread, and drop few."""
    searcher = searcher_of(generator=kind)
    for draws in (
        torch.cat([joined(searcher.sample(step)).detach() > 0.5 for step in range(20)]),
        torch.cat([joined(searcher.decide(step).gates) for step in range(20)]),
    ):
        assert float(draws.float().mean()) >= least


def test_decisions_are_hard_draws_of_their_own() -> None:
    searcher = searcher_of(offset=0.0)
    decided = joined(searcher.decide(3).gates)
    assert ((decided == 0) | (decided == 1)).all()
    assert not decided.requires_grad
    assert not torch.equal(decided, joined(searcher.sample(3)).round())


def test_straight_through_gates_are_rounded_soft_ones_with_their_gradient() -> None:
    drawn, gradients = [], []
    for straight in (True, False):
        searcher = searcher_of(straight_through=straight, offset=0.0)
        sample = joined(searcher.sample(3))
        (sample @ torch.linspace(-1, 1, len(sample))).backward()  # type: ignore[no-untyped-call]
        drawn.append(sample.detach())
        gradients.append([weight.grad for weight in searcher.generator.parameters()])
    assert torch.equal(drawn[0], (drawn[1] > 0.5).float())
    assert ((drawn[1] > 0.01) & (drawn[1] < 0.99)).any()
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_budget_loss_sees_rounded_gates_and_soft_ones_get_its_gradient() -> None:
    searcher = searcher_of(offset=0.0)
    gates = {name: gate.detach().requires_grad_() for name, gate in searcher.sample(3).items()}
    rounded = {name: (gate > 0.5).float() for name, gate in gates.items()}
    loss = searcher.budget_loss(gates)
    of_rounded, of_soft = (keep_ratio_loss(kept_share(values, SITES), KEEP).detach() for values in (rounded, gates))
    assert torch.equal(loss.detach(), of_rounded)
    assert not torch.allclose(loss.detach(), of_soft, rtol=1e-3)
    loss.backward()  # type: ignore[no-untyped-call]
    for gate in gates.values():
        assert gate.grad is not None
        assert (gate.grad != 0).all()


@every_kind
def test_final_plan_is_within_the_budget_and_ignores_noise(kind: str) -> None:
    searcher = searcher_of(generator=kind)
    plan = searcher.final_decision().plan
    assert plan is not None
    assert (KEEP - 0.15) * prunable_params(SITES) < kept_params(SITES, plan)
    assert kept_params(SITES, plan) <= KEEP * prunable_params(SITES)
    assert searcher.final_decision().plan == plan
    searcher.allowed_keep = 0.9
    larger = searcher.final_decision().plan
    assert larger is not None
    assert kept_params(SITES, larger) > kept_params(SITES, plan)


def test_legal_plan_of_a_draw_keeps_as_large_a_share() -> None:
    searcher = searcher_of(offset=1.0)
    decision = searcher.decide(0)
    share, legal = float(kept_share(decision.gates, SITES)), searcher.with_legal_plan(decision)
    assert legal.plan is not None
    kept = kept_params(SITES, legal.plan) / prunable_params(SITES)
    assert share - 0.15 < kept <= share + 1e-6


@every_kind
def test_state_tensors_round_trip(kind: str) -> None:
    searcher, other = searcher_of(generator=kind), searcher_of(seed=1, generator=kind)
    searcher.steps_on_budget = 7
    with torch.no_grad():
        for weight in searcher.generator.parameters():
            weight.add_(0.1)
    other.load_state_tensors(searcher.state_tensors())
    assert other.steps_on_budget == 7
    assert all(torch.equal(logits, other.logits()[name]) for name, logits in searcher.logits().items())
    assert searcher.state_tensors().keys() == other.state_tensors().keys()
