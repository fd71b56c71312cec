"""Compiled kernels: models compute the same numbers, and are restored after the block."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from prunetune.model import compiled_kernels
from prunetune.model.activation_checkpointing import use_checkpointing
from prunetune.model.compiled_kernels import use_compiled_kernels
from prunetune.pruning.cut import cut_linears
from prunetune.pruning.masking import gates_from_plan, masked
from prunetune.pruning.sites import find_sites
from prunetune.train.adapters import trainable_parameters
from support.models import random_plan, tiny, tokens, with_lora

# Norms of rows and of heads, rotary embeddings of whole and of half heads, one that is decorated, and none at all.
SOME = ("llama", "gemma3_text", "qwen3", "olmo2", "phi3", "gpt_neox", "opt")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the compiled graphs; they run eagerly, since PyTorch's kernels are not tested here."""
    names: list[str] = []

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        names.append(graph._get_name())
        return graph.forward  # type: ignore[no-any-return]

    monkeypatch.setattr(
        compiled_kernels, "_compiled", lambda function: torch.compile(function, dynamic=True, backend=backend)
    )
    compiled_kernels._compiled_forward.cache_clear()
    torch.compiler.reset()
    yield names
    compiled_kernels._compiled_forward.cache_clear()
    torch.compiler.reset()


@torch.no_grad()
def logits(model: nn.Module, length: int) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=torch.arange(3, 3 + length)[None], use_cache=False).logits
    return result


def with_float_norms(model: Any) -> Any:
    """The model, with the weights of its norms in float32."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.grad, parameter.data = None, parameter.data.float()
    return model


@pytest.mark.parametrize("family", SOME)
def test_compiled_kernels_give_the_same_logits(family: str, compiled: list[str]) -> None:
    model = tiny(family)
    before = logits(model, 9)
    with use_compiled_kernels(model):
        assert torch.equal(logits(model, 9), before)
    assert torch.equal(logits(model, 9), before)


def test_other_lengths_and_widths_are_not_recompiled(compiled: list[str]) -> None:
    model = tiny("llama", groups=4, ratio=2)
    sites = tuple(find_sites(model))
    with use_compiled_kernels(model):
        logits(model, 9)
        first = len(compiled)
        logits(model, 17)
        cut_linears(model, random_plan(model), sites=sites)
        logits(model, 21)
    assert 0 < first <= 3  # the norm, the rotary embedding and the gated activation
    assert len(compiled) <= first + 2  # one KV group, and sizes that happened to be equal, are each one more


def test_compiled_kernels_restore_the_model(compiled: list[str]) -> None:
    model, other = tiny("llama"), tiny("llama")
    plain = [type(module).forward for module in model.modules()]
    with use_compiled_kernels(model):
        assert any("forward" in vars(module) for module in model.modules())
        assert not any("forward" in vars(module) for module in other.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert [type(module).forward for module in model.modules()] == plain


@pytest.mark.filterwarnings("ignore:.*is not a leaf:UserWarning")
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3", "phi3", "gpt_neox"])
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_no_variant_exceeds_the_recompile_limit(family: str, compiled: list[str]) -> None:
    # A teacher, a search and the tuning of all weights, of models with one KV group left and with several, whose norms
    # are held in the dtype of the model and in float32.
    whole, cut = (tiny(family, groups=groups, ratio=2).bfloat16() for groups in (2, 1))
    for change, model in itertools.product((nn.Identity(), with_float_norms), (whole, cut)):
        with torch.autocast("cpu", torch.bfloat16), use_compiled_kernels(change(model)):
            logits(model, 9)
            for tuned in (False, True):
                model.requires_grad_(tuned)
                model.get_input_embeddings().weight.requires_grad_()
                model(tokens(), use_cache=False).logits.sum().backward()
    assert compiled


@pytest.mark.filterwarnings("ignore:.*is not a leaf:UserWarning")
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("form", ["gated", "free"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_compiled_kernels_give_gates_and_adapters_the_same_gradients(
    family: str, form: Any, again: bool, compiled: list[str]
) -> None:
    model = tiny(family).requires_grad_(False)
    sites = find_sites(model)
    gates = {name: gate.requires_grad_() for name, gate in gates_from_plan(random_plan(model), sites).items()}
    with_lora(model)
    results = []
    for kernels in (nullcontext(), use_compiled_kernels(model)):
        parameters = [*gates.values(), *trainable_parameters(model).values()]
        for parameter in parameters:
            parameter.grad = None
        with (
            kernels,
            use_checkpointing(model) if again else nullcontext(),
            masked(model, gates, adapters=form, sites=sites),
        ):
            output = model(tokens(), use_cache=False).logits
            output.square().mean().backward()
        results.append([output.detach(), *(parameter.grad for parameter in parameters if parameter.grad is not None)])
    assert compiled
    assert len(results[0]) == len(results[1]) > len(gates)
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # SiLU, and GELU by tanh
def test_layers_share_one_gated_activation(family: str, compiled: list[str]) -> None:
    model = tiny(family, layers=12)
    mlps = [layer.mlp for layer in model.model.layers]
    with use_compiled_kernels(*mlps):
        for width, mlp in enumerate(mlps, 5):
            x = torch.randn(2, width, 48)
            expected = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
            torch.testing.assert_close(mlp(x), expected)
    assert len(compiled) == 1


class GatedMLP(nn.Module):
    """A gated MLP with the usual attribute names."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn = nn.SiLU()

    def forward(self, x):  # type: ignore[no-untyped-def]
        """The usual gated MLP, over two statements."""
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj  # noqa: RET504


class ClampedMLP(GatedMLP):
    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=1) * self.up_proj(x))


class SwappedMLP(GatedMLP):
    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class SummedMLP(GatedMLP):
    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class VariadicMLP(GatedMLP):
    def forward(self, x, *rest):  # type: ignore[no-untyped-def]
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class KeywordMLP(GatedMLP):
    def forward(self, x, *, scale=None):  # type: ignore[no-untyped-def]
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", [GatedMLP, ClampedMLP, SwappedMLP, SummedMLP, VariadicMLP, KeywordMLP])
def test_only_gated_mlps_are_compiled(kind: type[GatedMLP], compiled: list[str]) -> None:
    module = kind()
    x = torch.randn(3, 4)
    before = module(x)
    with use_compiled_kernels(module):
        assert ("forward" in vars(module)) is (kind is GatedMLP)
        torch.testing.assert_close(module(x), before)
