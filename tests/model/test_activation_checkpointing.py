"""Activation checkpointing: losses and gradients of weights and gates equal those without it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.data import batches
from prunetune.data.encoding import Example
from prunetune.model.activation_checkpointing import use_checkpointing, uses_checkpointing
from prunetune.pruning.masking import gates_from_plan
from prunetune.pruning.sites import find_sites
from prunetune.train.adapters import trainable_parameters
from prunetune.train.forward import Teacher
from prunetune.train.passes import PackedPasses, PaddedPasses, build_passes
from support.models import random_plan, tiny, tokens, with_lora

DEFAULT = ("kv-groups", "mlp-channels")
CASES: list[tuple[str, Collection[str]]] = [
    ("llama", DEFAULT), ("gemma3_text", DEFAULT), ("phi3", DEFAULT), ("gpt2", DEFAULT), ("bloom", DEFAULT),
    ("llama", ("layers", "attention-blocks", "query-heads", "mlp-channels")), ("mixtral", ("kv-groups", "experts")),
    ("qwen3_moe", ("experts", "expert-channels")),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round row lengths up to 32 tokens: the default of a thousand is for GPUs."""
    monkeypatch.setattr(batches, "TOKEN_STEP", 32)
    monkeypatch.setattr(batches, "LABEL_STEP", 32)


def examples() -> list[Example]:
    rows = tokens(batch=3, length=11).tolist()
    return [Example(tuple(row[: 5 + 3 * index]), 2, f"row {index}") for index, row in enumerate(rows)]


def config_of(checkpointing: str, **changes: Any) -> RunConfig:
    return from_mapping({"train": {"checkpointing": checkpointing}, "lora": changes})


def losses_and_gradients(passes: Any, model: Any, gates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses and gradients of one batch, by every kind of pass."""
    results: dict[str, Tensor] = {}
    for name, (losses, gradients) in {
        "tune": (passes.tune(examples(), gates), {}),
        "as it is": (passes.tune(examples(), None), {}),
        "gate gradients": passes.gate_gradients(examples(), gates),
    }.items():
        results |= {f"{name} {key}": torch.tensor(value) for key, value in losses.items()}
        results |= {f"{name} {site}": gradient for site, gradient in gradients.items()}
    for name, weight in trainable_parameters(model).items():
        assert weight.grad is not None
        results[name], weight.grad = weight.grad, None
    return results


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize(
    ("family", "units", "kind"),
    [
        (*case, kind)
        for case in CASES
        for kind in (PaddedPasses, PackedPasses)
        if (case[0], kind) != ("bloom", PackedPasses)
    ],
)
def test_checkpointing_changes_no_loss_and_no_gradient(
    family: str, units: Collection[str], kind: Any, taught: bool
) -> None:
    model = tiny(family).requires_grad_(False)
    sites = find_sites(model, units)
    gates = gates_from_plan(random_plan(model, seed=2, units=units), sites)
    with_lora(model)
    teacher = Teacher(tiny(family, seed=4).requires_grad_(False)) if taught else None
    kept, again = (
        losses_and_gradients(kind(model, sites, 0, config_of(checkpointing), teacher), model, gates)
        for checkpointing in ("off", "on")
    )
    assert kept.keys() == again.keys()
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, at=name: f"{at}: {text}")


def test_checkpointing_redraws_the_same_dropout() -> None:
    results = []
    for checkpointing in ("off", "on"):
        model = tiny().requires_grad_(False)
        sites = find_sites(model)
        with_lora(model)
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(0.5)
        torch.manual_seed(3)
        loss = PaddedPasses(model, sites, 0, config_of(checkpointing)).tune(examples(), None)
        results.append((loss, [weight.grad for weight in trainable_parameters(model).values()]))
    assert results[0][0] == results[1][0]
    for gradient, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(gradient, other)


def test_checkpointing_keeps_less_and_restores_the_model() -> None:
    model = with_lora(tiny(layers=6).requires_grad_(False))

    def kept(_: Tensor) -> int:
        sizes.append(_.numel())
        return 0

    def total() -> int:
        sizes.clear()
        with saved_tensors_hooks(kept, lambda _: torch.zeros(())):
            model(tokens())
        return sum(sizes)

    sizes: list[int] = []
    before, forwards = total(), [layer.forward for layer in model.model.layers]
    with use_checkpointing(model):
        assert total() < before / 4
        with torch.no_grad():  # a pass without gradient is as it always is
            model(tokens())
    assert total() == before
    assert [layer.forward for layer in model.model.layers] == forwards
    assert all("forward" not in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize(
    ("checkpointing", "quantize", "expected"),
    [("auto", "off", False), ("auto", "nf4", True), ("on", "off", True), ("off", "nf4", False)],
)
def test_uses_checkpointing_by_recipe(checkpointing: str, quantize: str, expected: bool) -> None:
    config = config_of(checkpointing, quantize=quantize)
    assert uses_checkpointing(config) is expected
    assert build_passes(tiny(), find_sites(tiny()), 0, config).size.recompute is expected
