"""Laws: generators depend on their seed alone, gates are straight-through, logits keep the order of importance."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from prunetune.cost.parameters import keep_ratio_loss, kept_share, prunable_params
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import Site
from prunetune.search.decision_generator import EMBEDDING, DecisionGenerator, orthogonal_vectors
from prunetune.search.gumbel_gates import gumbel_sigmoid, round_straight_through, straight_through
from prunetune.search.initial_logits import importance_to_logits, score_threshold
from prunetune.search.nested_sites import NestedSites
from support.models import tiny

every_kind = pytest.mark.parametrize("kind", ["transformer", "gru"])


@cache
def sites() -> tuple[Site, ...]:
    return find_sites(tiny("llama"))


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the network -----------------------------------------------------------------------------------------------------


@every_kind
def test_generator_returns_one_logit_per_unit(kind: str) -> None:
    logits = DecisionGenerator(sites(), kind=kind, seed=0)()
    assert {name: tuple(value.shape) for name, value in logits.items()} == {s.name: (s.units,) for s in sites()}
    assert all(value.isfinite().all() for value in logits.values())


@every_kind
def test_generator_depends_on_its_seed_alone(kind: str) -> None:
    torch.manual_seed(1)
    first = DecisionGenerator(sites(), kind=kind, seed=7)
    torch.manual_seed(2)
    again = DecisionGenerator(sites(), kind=kind, seed=7)
    other = DecisionGenerator(sites(), kind=kind, seed=8)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in first.state_dict().items())
    assert any(not torch.equal(weight, other()[name]) for name, weight in first().items())


@every_kind
def test_generator_leaves_global_random_state_unchanged(kind: str) -> None:
    sites()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    DecisionGenerator(sites(), kind=kind, seed=0)()
    assert torch.equal(torch.get_rng_state(), before)


@every_kind
def test_every_weight_has_a_gradient_and_layers_differ(kind: str) -> None:
    net = DecisionGenerator(sites(), kind=kind, seed=0)
    logits = net()
    torch.cat(
        [value * torch.randn(len(value), generator=generator_of(1)) for value in logits.values()]
    ).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert "layer_vectors" not in dict(net.named_parameters())
    mlps = [logits[site.name] for site in sites() if site.kind == "mlp"]
    assert not torch.allclose(mlps[0], mlps[1])


@pytest.mark.parametrize("rows", [1, 3, 64, 65, 130])
def test_layer_vectors_are_orthogonal_within_a_block(rows: int) -> None:
    vectors = orthogonal_vectors(rows, EMBEDDING, generator_of(0))
    assert vectors.shape == (rows, EMBEDDING)
    for start in range(0, rows, EMBEDDING):
        block = vectors[start : start + EMBEDDING]
        assert torch.allclose(block @ block.T, EMBEDDING * torch.eye(len(block)), atol=1e-3)


# -- gates -----------------------------------------------------------------------------------------------------------


def draw(logits: torch.Tensor, *, offset: float = 0.0, temperature: float = 0.4, seed: int = 0) -> torch.Tensor:
    return gumbel_sigmoid(logits, temperature=temperature, offset=offset, rng=generator_of(seed))


def test_soft_gates_are_between_zero_and_one() -> None:
    soft = draw(torch.linspace(-5, 5, 10_000))
    assert soft.shape == (10_000,)
    assert ((soft >= 0) & (soft <= 1)).all()
    assert soft.isfinite().all()


def test_open_gates_have_the_probability_of_the_logit() -> None:
    for logit in (-1.0, 0.0, 2.0):
        share = float((draw(torch.full((20_000,), logit)) > 0.5).float().mean())
        assert share == pytest.approx(torch.sigmoid(torch.tensor(logit)).item(), abs=0.015)


def test_offset_opens_most_gates() -> None:
    zeros = torch.zeros(20_000)
    assert 0.48 < float((draw(zeros) > 0.5).float().mean()) < 0.52
    assert float((draw(zeros, offset=3.0) > 0.5).float().mean()) > 0.94


def test_draws_depend_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = draw(torch.zeros(50)), draw(torch.zeros(50)), draw(torch.zeros(50), seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_gates_are_hard_forward_and_soft_backward() -> None:
    logits = torch.randn(100, generator=generator_of(0), requires_grad=True)
    soft = draw(logits)
    gates = round_straight_through(soft)
    assert torch.allclose(gates, (soft > 0.5).float(), atol=1e-6)
    weights = torch.randn(100, generator=generator_of(1))
    (gradient,) = torch.autograd.grad((gates * weights).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((soft * weights).sum(), logits)
    assert torch.equal(gradient, expected)
    assert (gradient != 0).any()


def test_straight_through_has_hard_value_and_soft_gradient() -> None:
    soft = torch.tensor([0.2, 0.9], requires_grad=True)
    gate = straight_through(soft, torch.tensor([1.0, 0.0]))
    gate.sum().backward()
    assert torch.allclose(gate.detach(), torch.tensor([1.0, 0.0]))
    assert soft.grad is not None
    assert torch.equal(soft.grad, torch.ones(2))


# -- initial logits --------------------------------------------------------------------------------------------------


def importance(seed: int = 0) -> dict[str, torch.Tensor]:
    """Over many orders of magnitude, as squared gradients are."""
    rng = generator_of(seed)
    return {site.name: torch.exp(8 * torch.randn(site.units, generator=rng)) for site in sites()}


def joined(values: dict[str, torch.Tensor], *, per_param: bool = False) -> torch.Tensor:
    return torch.cat([values[s.name].double() / (s.unit_params if per_param else 1) for s in sites()])


def test_logits_keep_the_order_of_importance_per_parameter() -> None:
    measured = importance()
    logits = importance_to_logits(measured, sites())
    assert torch.equal(joined(logits).argsort(), joined(measured, per_param=True).argsort())
    assert all(logits[site.name].shape == (site.units,) for site in sites())


def test_logits_are_normal_over_parameters() -> None:
    prices = torch.cat([torch.full((s.units,), float(s.unit_params), dtype=torch.float64) for s in sites()])
    logits = joined(importance_to_logits(importance(), sites()))
    mean = (prices * logits).sum() / prices.sum()
    deviation = ((prices * (logits - mean).square()).sum() / prices.sum()).sqrt()
    assert abs(float(mean)) < 0.05
    assert float(deviation) == pytest.approx(1, abs=0.1)


def test_logits_depend_on_the_order_of_importance_alone() -> None:
    first, cubed = (
        importance_to_logits(importance(), sites()),
        importance_to_logits({k: v**0.3 for k, v in importance().items()}, sites()),
    )
    # x ** 0.3 / p orders units of one price as x / p does.
    for site in sites():
        assert torch.equal(first[site.name].argsort(), cubed[site.name].argsort())
    scaled = importance_to_logits({name: 1000 * value for name, value in importance().items()}, sites())
    assert all(torch.equal(first[name], scaled[name]) for name in first)


def test_logits_of_zero_importance_are_finite() -> None:
    logits = importance_to_logits({site.name: torch.zeros(site.units) for site in sites()}, sites())
    assert joined(logits).isfinite().all()


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.6, 0.95, 1.0])
def test_units_above_the_threshold_have_the_kept_share(keep: float) -> None:
    logits = importance_to_logits(importance(), sites())
    threshold = score_threshold(NestedSites(sites(), logits), keep)
    open_ = {name: (value.double() >= threshold).float() for name, value in logits.items()}
    largest = max(site.unit_params for site in sites()) / prunable_params(sites())
    assert keep - 1e-6 <= float(kept_share(open_, sites())) <= keep + largest + 1e-6


# -- the price of gates ----------------------------------------------------------------------------------------------


def test_kept_share_is_a_share_of_parameters() -> None:
    gates = {site.name: torch.ones(site.units, requires_grad=True) for site in sites()}
    share = kept_share(gates, sites())
    share.backward()
    assert float(share.detach()) == pytest.approx(1)
    for site in sites():
        gradient = gates[site.name].grad
        assert gradient is not None
        assert torch.allclose(gradient, torch.full((site.units,), site.unit_params / prunable_params(sites())))


def test_ratio_loss_is_zero_on_target_and_symmetric() -> None:
    def loss(share: float) -> float:
        return float(keep_ratio_loss(torch.tensor(share), 0.4))

    assert loss(0.4) == pytest.approx(0, abs=1e-6)
    assert loss(0.8) == pytest.approx(loss(0.2), rel=1e-5)
    assert torch.isfinite(keep_ratio_loss(torch.tensor(0.0), 0.4))
