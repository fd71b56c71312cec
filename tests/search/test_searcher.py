"""Laws of the searcher: draws repeat by seed and step, the budget loss rounds gates, the final plan is in budget."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prunetune.config.recipe import from_mapping
from prunetune.cost.budget_limits import BudgetLimits
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import kept_params, kept_share, prunable_params
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.searcher import Searcher, keep_ratio_loss, round_straight_through
from support.models import tiny

KEEP = 0.6
SITES = find_sites(tiny())


def searcher_of(seed: int = 0, **search: Any) -> Searcher:
    config = from_mapping({"seed": seed, "budget": {"keep": KEEP}, "search": search})
    return Searcher(SITES, PlanConstraints(align=8), config, torch.device("cpu"))


def joined(gates: Any) -> Tensor:
    return torch.cat([gates[name] for name in sorted(gates)])


def test_same_seed_and_step_give_the_same_draws() -> None:
    torch.manual_seed(1)
    first = searcher_of()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, other = searcher_of(), searcher_of(seed=1)
    for step in (0, 3):
        assert torch.equal(joined(first.sample(step)), joined(again.sample(step)))
        assert torch.equal(joined(first.decide(step).gates), joined(again.decide(step).gates))
        assert not torch.equal(joined(first.sample(step)), joined(other.sample(step)))
    assert not torch.equal(joined(first.sample(0)), joined(first.sample(3)))
    assert torch.equal(torch.get_rng_state(), before)


def test_search_starts_dense() -> None:
    """Logits of a new network are spread, and drop few units."""
    searcher = searcher_of()
    for draws in (
        torch.cat([joined(searcher.sample(step)).detach() > 0.5 for step in range(20)]),
        torch.cat([joined(searcher.decide(step).gates) for step in range(20)]),
    ):
        assert float(draws.float().mean()) >= 0.998


def test_decisions_are_hard_draws_of_their_own() -> None:
    searcher = searcher_of(offset=0.0)
    decided = joined(searcher.decide(3).gates)
    assert ((decided == 0) | (decided == 1)).all()
    assert not decided.requires_grad
    assert not torch.equal(decided, joined(searcher.sample(3)).round())


def test_gates_of_a_generator_step_are_soft() -> None:
    sample = joined(searcher_of(offset=0.0).sample(3))
    assert ((sample > 0.01) & (sample < 0.99)).any()
    assert sample.requires_grad


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


def test_final_plan_is_within_the_budget_and_ignores_noise() -> None:
    searcher = searcher_of()
    plan = searcher.final_decision().plan
    assert plan is not None
    assert (KEEP - 0.15) * prunable_params(SITES) < kept_params(SITES, plan)
    assert kept_params(SITES, plan) <= KEEP * prunable_params(SITES)
    assert searcher.final_decision().plan == plan
    searcher.allowed_keep = 0.9
    larger = searcher.final_decision().plan
    assert larger is not None
    assert kept_params(SITES, larger) > kept_params(SITES, plan)


def test_budget_loss_under_limits_pulls_to_their_share_of_prices() -> None:
    """The share of parameters that may be kept is another one."""
    prices = {site.name: 1.0 + index for index, site in enumerate(SITES)}
    limits = BudgetLimits((), feasible_keep=KEEP, feasible_price_share=0.3, prices=prices)
    config = from_mapping({"budget": {"keep": KEEP}})
    searcher = Searcher(SITES, PlanConstraints(align=8, limits=limits), config, torch.device("cpu"))
    loss = searcher.budget_loss({site.name: torch.ones(site.units) for site in SITES})
    assert float(loss) == pytest.approx(math.log(1 / 0.3), rel=1e-5)
    searcher.allowed_keep = (1 + KEEP) / 2  # half way to the limits
    loss = searcher.budget_loss({site.name: torch.ones(site.units) for site in SITES})
    assert float(loss) == pytest.approx(math.log(1 / 0.65), rel=1e-5)


def test_rounded_gate_is_open_above_one_half_and_has_the_gradient_of_the_soft_one() -> None:
    soft = torch.tensor([0.0, 0.2, 0.5, 0.50001, 1.0], requires_grad=True)
    rounded = round_straight_through(soft)
    assert rounded.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
    weights = torch.arange(5.0)
    (rounded @ weights).backward()  # type: ignore[no-untyped-call]
    assert soft.grad is not None
    assert torch.equal(soft.grad, weights)
