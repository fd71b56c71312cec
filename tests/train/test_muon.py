"""Laws of Muon: it equals torch's, and its updates are orthogonal whatever the gradient's scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunetune.train.checkpoints import optimizer_tensors, restore_optimizer
from prunetune.train.muon import WARMUP, Muon, orthogonalize

SHAPES = [(12, 8), (8, 12), (12, 8), (16, 16), (1, 8)]


def weights(seed: int = 0) -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=rng)) for shape in SHAPES]


def fill(listed: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    rng = torch.Generator().manual_seed(100 + step)
    for weight in listed:
        weight.grad = scale * torch.randn(weight.shape, generator=rng)


def end_warmup(optimizer: Muon, listed: list[nn.Parameter]) -> None:
    """Set the step as after the warm-up of the learning rate, without momentum."""
    for weight in listed:
        optimizer.state[weight] = {"step": torch.tensor(float(WARMUP)), "momentum": torch.zeros_like(weight)}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_equals_torch_muon() -> None:
    ours, theirs = weights(), weights()
    muon = Muon(ours, lr=1e-2)
    end_warmup(muon, ours)
    other = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        fill(ours, step)
        fill(theirs, step)
        muon.step()
        other.step()
    before = weights()
    for mine, torchs, start in zip(ours, theirs, before, strict=True):
        # Theirs multiplies in bfloat16, one by one; ours batched, and on a CPU in float32.
        moved, expected = (mine - start).detach(), (torchs - start).detach()
        assert (moved - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, int], scale: float) -> None:
    matrix = scale * torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize(matrix).float())
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_orthogonalize_computes_in_float32_on_a_cpu() -> None:
    """Most CPUs have no fast bfloat16, so a step would take longer than its passes."""
    matrix = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(1))
    assert orthogonalize(matrix).dtype == torch.float32
    assert torch.equal(orthogonalize(matrix), orthogonalize(matrix.double()))


def test_zero_gradient_changes_no_weight() -> None:
    listed = weights()
    optimizer = Muon(listed, lr=1.0)
    for weight in listed:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert all(torch.equal(weight, before) for weight, before in zip(listed, weights(), strict=True))


def test_learning_rate_of_muon_warms_up() -> None:
    listed = weights()
    optimizer, moved = Muon(listed, lr=1e-2), []
    for _ in range(3):
        before = listed[0].detach().clone()
        fill(listed, 0)  # the same gradient every time: only the rate differs
        optimizer.step()
        moved.append(float((listed[0].detach() - before).norm()))
    assert moved[1] == pytest.approx(2 * moved[0], rel=0.05)
    assert moved[2] == pytest.approx(3 * moved[0], rel=0.05)


def test_restored_muon_equals_uninterrupted() -> None:
    names = [f"w{index}" for index in range(len(SHAPES))]
    whole, halved = weights(), weights()
    uninterrupted, restored = Muon(whole, lr=1e-2), Muon(halved, lr=1e-2)
    for step in range(6):
        if step == 3:
            kept = {name: tensor.clone() for name, tensor in optimizer_tensors(restored, names).items()}
            restored = Muon(halved, lr=1e-2)
            restore_optimizer(restored, names, kept)
        for optimizer, listed in ((uninterrupted, whole), (restored, halved)):
            fill(listed, step)
            optimizer.step()
    assert all(torch.equal(first, second) for first, second in zip(whole, halved, strict=True))
