"""Laws: generators depend on their seed alone, gates have the probability of a Gumbel draw and may be rounded."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import Site, kept_share, prunable_params
from prunetune.search.searcher import (
    EMBEDDING,
    FEED_FORWARD,
    HEADS,
    DecisionGenerator,
    EncoderLayer,
    gumbel_sigmoid,
    keep_ratio_loss,
    orthogonal_vectors,
    round_straight_through,
)
from support.models import tiny


@cache
def sites() -> tuple[Site, ...]:
    return find_sites(tiny("llama"))


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the network -----------------------------------------------------------------------------------------------------


def test_generator_returns_one_logit_per_unit() -> None:
    logits = DecisionGenerator(sites(), seed=0)()
    assert {name: tuple(value.shape) for name, value in logits.items()} == {s.name: (s.units,) for s in sites()}
    assert all(value.isfinite().all() for value in logits.values())


def test_generator_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    first = DecisionGenerator(sites(), seed=7)
    torch.manual_seed(2)
    again = DecisionGenerator(sites(), seed=7)
    other = DecisionGenerator(sites(), seed=8)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in first.state_dict().items())
    assert any(not torch.equal(weight, other()[name]) for name, weight in first().items())


def test_generator_leaves_global_random_state_unchanged() -> None:
    sites()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    DecisionGenerator(sites(), seed=0)()
    assert torch.equal(torch.get_rng_state(), before)


def test_every_weight_has_a_gradient_and_layers_differ() -> None:
    net = DecisionGenerator(sites(), seed=0)
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
        assert torch.allclose(block @ block.T, torch.eye(len(block)), atol=1e-5)


def test_dropout_depends_on_its_random_generator() -> None:
    net = DecisionGenerator(sites(), seed=0)
    plain, first, again, other = (net(rng) for rng in (None, generator_of(1), generator_of(1), generator_of(2)))
    assert all(torch.equal(logits, again[name]) for name, logits in first.items())
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert not any(torch.equal(first[name], plain[name]) for name in first)


def test_encoder_layer_without_dropout_equals_pytorchs() -> None:
    ours, theirs = EncoderLayer(), torch.nn.TransformerEncoderLayer(EMBEDDING, HEADS, FEED_FORWARD, dropout=0.0)
    renamed = {
        "queries_keys_values.weight": theirs.self_attn.in_proj_weight,
        "queries_keys_values.bias": theirs.self_attn.in_proj_bias,
        "mixed.weight": theirs.self_attn.out_proj.weight,
        "mixed.bias": theirs.self_attn.out_proj.bias,
        "up.weight": theirs.linear1.weight,
        "up.bias": theirs.linear1.bias,
        "down.weight": theirs.linear2.weight,
        "down.bias": theirs.linear2.bias,
        "attention_norm.weight": theirs.norm1.weight,
        "attention_norm.bias": theirs.norm1.bias,
        "feed_forward_norm.weight": theirs.norm2.weight,
        "feed_forward_norm.bias": theirs.norm2.bias,
    }
    ours.load_state_dict(renamed)
    x = torch.randn(5, EMBEDDING, generator=generator_of(0))
    torch.testing.assert_close(ours(x, lambda values: values), theirs(x))


# -- gates -----------------------------------------------------------------------------------------------------------


def draw(logits: torch.Tensor, *, offset: float = 0.0, temperature: float = 0.4, seed: int = 0) -> torch.Tensor:
    return gumbel_sigmoid(logits, temperature=temperature, offset=offset, rng=generator_of(seed))


def test_soft_gates_are_between_zero_and_one() -> None:
    soft = draw(torch.linspace(-5, 5, 10_000))
    assert soft.shape == (10_000,)
    assert ((soft >= 0) & (soft <= 1)).all()
    assert soft.isfinite().all()


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("logit", [-2.0, -1.0, 0.0])
def test_open_gates_have_the_probability_of_one_gumbel_draw(logit: float, offset: float) -> None:
    share = float((draw(torch.full((20_000,), logit), offset=offset) > 0.5).float().mean())
    assert share == pytest.approx(1 - math.exp(-math.exp(logit + offset)), abs=0.015)


def test_training_starts_dense() -> None:
    """At logit 0 and offset 3, ATP's, a unit is dropped with probability 2e-9."""
    assert math.exp(-math.exp(3)) == pytest.approx(2e-9, rel=0.06)
    assert (draw(torch.zeros(1_000_000), offset=3.0) > 0.5).all()


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
    assert torch.equal(gates, (soft > 0.5).float())
    weights = torch.randn(100, generator=generator_of(1))
    (gradient,) = torch.autograd.grad((gates * weights).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((soft * weights).sum(), logits)
    assert torch.equal(gradient, expected)
    assert (gradient != 0).any()


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
