"""Laws of curvature: sums over the tokens that the loss depends on; what others can take over costs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prunetune.errors import ConfigError
from prunetune.model.activation_checkpointing import use_checkpointing
from prunetune.pruning.compensation import (
    Curvature,
    compensate_consumers,
    consumer_name,
    record_curvature,
    removal_costs,
)
from prunetune.pruning.linears import get_base_linear
from prunetune.pruning.sites import find_sites
from prunetune.utils.threads import CAPTURE_LOCK
from support.models import FAMILIES, random_plan, tiny, tokens


def loss_of(model: Any, ids: Tensor, length: int) -> Tensor:
    """Cross-entropy of the third token on, up to the `length`th: later ones are padding."""
    logits = model(ids).logits[:, 2 : length - 1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 3:length].flatten())


def curvatures_of(model: Any, ids: Tensor, length: int) -> Mapping[str, Curvature]:
    with record_curvature(model, find_sites(model)) as curvatures:
        loss_of(model, ids, length).backward()
    return curvatures


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_curvature_is_the_sum_of_outer_products_over_tokens(family: str) -> None:
    model, ids, seen = tiny(family), tokens(batch=2, length=9), []
    name = consumer_name(find_sites(model)[0])
    handle = model.get_submodule(name).register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    with record_curvature(model, find_sites(model)) as curvatures:
        loss = loss_of(model, ids, 9)
        (gradient,) = torch.autograd.grad(loss, seen[0][1], retain_graph=True)  # the hook adds it, too
        for part in curvatures[name].sums():
            part.zero_()
        loss.backward()
    handle.remove()
    curvature, inputs, gradient = curvatures[name], seen[0][0].detach().flatten(0, -2), gradient.flatten(0, -2)
    counts = (gradient != 0).any(1)
    torch.testing.assert_close(curvature.gradients, gradient.t() @ gradient)
    torch.testing.assert_close(curvature.inputs, inputs[counts].t() @ inputs[counts])
    assert int(curvature.tokens) == int(counts.sum())


def test_padding_does_not_count() -> None:
    model, ids = tiny(), tokens(batch=2, length=9)
    short, padded = curvatures_of(model, ids, 9), curvatures_of(model, F.pad(ids, (0, 5), value=1), 9)
    for name, curvature in short.items():
        for part, same in zip(curvature.sums(), padded[name].sums(), strict=True):
            torch.testing.assert_close(part, same)


def test_activations_that_are_computed_again_count_once() -> None:
    model, ids = tiny(), tokens(batch=2, length=9)
    plain = curvatures_of(model, ids, 9)
    with use_checkpointing(model):
        again = curvatures_of(model, ids, 9)
    for name, curvature in plain.items():
        for part, same in zip(curvature.sums(), again[name].sums(), strict=True):
            torch.testing.assert_close(part, same)


def test_pass_that_is_not_finite_adds_nothing() -> None:
    curvature = Curvature(torch.eye(3), torch.eye(2), torch.tensor(1.0))
    gradient = torch.tensor([[1.0, 2.0], [float("nan"), 1.0]])
    curvature.add(torch.ones(2, 3), gradient)
    torch.testing.assert_close(curvature.sums(), (torch.eye(3), torch.eye(2), torch.tensor(1.0)))


def test_frozen_model_is_measured_too() -> None:
    """A two-stage method's model has no weight that needs a gradient."""
    model, ids = tiny(), tokens(batch=2, length=9)
    expected = curvatures_of(model, ids, 9)
    frozen = curvatures_of(model.requires_grad_(False), ids, 9)
    for name, curvature in expected.items():
        torch.testing.assert_close(curvature.sums(), frozen[name].sums())


def test_unit_that_another_one_repeats_costs_nothing() -> None:
    """A channel's twin takes over; then the twin is what costs."""
    model, ids = tiny(layers=1), tokens(batch=8, length=20)
    site = find_sites(model)[-1]
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[1] = linear.weight[0]
    curvature = curvatures_of(model, ids, 20)[consumer_name(site)]
    costs = removal_costs(model, site, curvature)
    assert float(costs[:2].min()) < 0.2 * float(costs[:2].max())
    assert costs.shape == (site.units,)
    assert bool((costs >= 0).all())


def test_costs_grow_with_the_square_of_the_weights() -> None:
    model, ids = tiny(), tokens(batch=4, length=12)
    site = find_sites(model)[0]
    curvature = curvatures_of(model, ids, 12)[consumer_name(site)]
    costs = removal_costs(model, site, curvature)
    with torch.no_grad():
        get_base_linear(model, consumer_name(site)).weight.mul_(2)
    torch.testing.assert_close(4 * costs, removal_costs(model, site, curvature), rtol=1e-4, atol=0.0)


def test_no_linear_algebra_runs_while_a_cuda_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end the recording of another thread."""
    model, ids, genuine, locked = tiny(), tokens(batch=2, length=9), torch.linalg.cholesky, []
    sites = find_sites(model)
    curvatures = curvatures_of(model, ids, 9)
    monkeypatch.setattr(torch.linalg, "cholesky", lambda gram: (locked.append(CAPTURE_LOCK.locked()), genuine(gram))[1])
    removal_costs(model, sites[0], curvatures[consumer_name(sites[0])])
    grams = {name: curvature.inputs for name, curvature in curvatures.items()}
    compensate_consumers(model, sites, random_plan(model), grams)
    assert len(locked) > 2
    assert all(locked)
    assert not CAPTURE_LOCK.locked()


def test_unit_without_a_linear_of_its_own_is_refused() -> None:
    model = tiny()
    sites = find_sites(model, ("attention-blocks",))
    with pytest.raises(ConfigError, match="attention-blocks"), record_curvature(model, sites):
        pass
