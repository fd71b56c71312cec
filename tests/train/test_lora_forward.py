"""Laws of the adapters' fused forward pass: its outputs and gradients are those of peft.

A hook on the base linear disables fusing, which gives the reference of the fused forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from prunetune.config.recipe import LoraSettings
from prunetune.model.activation_checkpointing import use_checkpointing
from prunetune.pruning.masking import gates_from_plan, masked
from prunetune.pruning.sites import find_sites, lora_target_modules
from prunetune.train import lora_forward
from prunetune.train.adapters import add_adapters, trainable_parameters
from support.models import random_plan, tiny

FAMILIES = ("llama", "qwen2", "gpt2")


def adapted(family: str, **settings: Any) -> Any:
    model = tiny(family)
    add_adapters(model, find_sites(model), LoraSettings(rank=3, **settings), seed=0)
    for name, weight in trainable_parameters(model).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_forward_equals_peft_in_outputs_and_gradients(family: str) -> None:
    ours = adapted(family)
    theirs = copy.deepcopy(ours)
    for name in lora_target_modules(tiny(family)):
        del theirs.get_submodule(name).forward  # the class's own again
    tokens = torch.tensor([[1, 5, 6, 7, 3], [4, 4, 2, 9, 8]])
    for model in (ours, theirs):
        model(tokens).logits.square().mean().backward()
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-6)
    for name, weight in trainable_parameters(ours).items():
        torch.testing.assert_close(weight.grad, theirs.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_copied_layer_uses_its_own_weights() -> None:
    model = adapted("llama")
    tokens = torch.tensor([[1, 5, 6, 7, 3]])
    before, other = model(tokens).logits, copy.deepcopy(model)
    for weight in trainable_parameters(other).values():
        weight.data.zero_()
    assert torch.equal(model(tokens).logits, before)
    assert not torch.allclose(other(tokens).logits, before)


def test_layer_with_dropout_keeps_the_forward_of_peft() -> None:
    model = adapted("llama", dropout=0.5)
    assert not any("forward" in vars(model.get_submodule(name)) for name in lora_target_modules(tiny("llama")))


def layer(*, bias: bool = True, dtype: torch.dtype = torch.float64, of_adapters: torch.dtype | None = None) -> Any:
    """One frozen linear with its adapter: 7 inputs, 5 outputs."""
    torch.manual_seed(2)
    model = nn.ModuleDict({"down_proj": nn.Linear(7, 5, bias=bias).to(dtype).requires_grad_(False)})
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["down_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    adapted_layer: Any = model["down_proj"]
    adapted_layer.cast_input_dtype_enabled = False
    for weight in (adapted_layer.lora_A["default"].weight, adapted_layer.lora_B["default"].weight):
        weight.data = weight.data.to(of_adapters or dtype)
    lora_forward.use_fused_forward(adapted_layer, "default")
    return adapted_layer


@contextmanager
def unfused(model: Any) -> Iterator[None]:
    """For the block, every linear with an adapter has a hook, so that its forward is not fused."""
    handles = [
        module.base_layer.register_forward_hook(lambda *_: None)
        for module in model.modules()
        if hasattr(module, "base_layer")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fused_and_unfused(model: Any, run: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values of `run` and the gradients that it leaves, fused and unfused."""
    results = []
    for context in (nullcontext(), unfused(model)):
        model.zero_grad()
        with context:
            values = run()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        results.append(values | gradients)
    return results[0], results[1]


def is_fused(result: Tensor) -> bool:
    """Whether a layer's result was fused; a view of 2-D rows adds one node."""
    node: Any = result.grad_fn
    return "_FusedLora" in str([node, *(before for before, _ in node.next_functions)])


@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7), (2, 2, 3, 7), (0, 7)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trainable", ["xAB", "AB", "x", "A", "B", "xA", "xB"])
def test_fused_lora_equals_unfused(shape: tuple[int, ...], bias: bool, trainable: str) -> None:
    linear = layer(bias=bias)
    linear.lora_A["default"].weight.requires_grad_("A" in trainable)
    linear.lora_B["default"].weight.requires_grad_("B" in trainable)
    weights = torch.randn(*shape[:-1], 5, dtype=torch.float64)

    def run() -> dict[str, Tensor]:
        torch.manual_seed(4)
        x = torch.randn(shape, dtype=torch.float64, requires_grad="x" in trainable)
        result = linear(x)
        assert is_fused(result) is not bool(linear.base_layer._forward_hooks)
        (result * weights).sum().backward()
        return {"y": result.detach()} | ({"x": x.grad} if x.grad is not None else {})

    short, long = fused_and_unfused(linear, run)
    assert short.keys() == long.keys()
    for name, value in long.items():
        torch.testing.assert_close(short[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_adapters_on_16_bit_base_have_float32_gradients(dtype: torch.dtype) -> None:
    linear = layer(dtype=torch.bfloat16, of_adapters=torch.float32)

    def run() -> dict[str, Tensor]:
        x = torch.randn(2, 9, 7, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            result = linear(x)
            assert is_fused(result) is not bool(linear.base_layer._forward_hooks)
        assert result.dtype == torch.bfloat16
        result.float().square().sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == dtype
        return {"y": result.detach(), "x": x.grad}

    short, long = fused_and_unfused(linear, run)
    for name, value in long.items():
        assert short[name].dtype == value.dtype
        torch.testing.assert_close(short[name], value, rtol=0.02, atol=0.02 * float(value.abs().max()))
    assert {short[name].dtype for name in short if "lora_" in name} == {torch.float32}


def test_backward_under_autocast_computes_in_the_dtype_of_forward() -> None:
    linear = layer(dtype=torch.float32)
    x = torch.ones(3, 7, requires_grad=True)
    result = linear(x).sum()
    with torch.autocast("cpu", torch.bfloat16):
        result.backward()
    short = x.grad
    x.grad = None
    with unfused(linear):
        linear(x).sum().backward()
    torch.testing.assert_close(short, x.grad)


class DoubledLinear(nn.Linear):
    """A linear with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _replaced(linear: Any) -> None:
    linear.forward = lambda x: torch.nn.functional.linear(x, linear.weight, linear.bias)


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: linear.register_forward_hook(lambda *_: None),
        lambda linear: linear.register_forward_pre_hook(lambda *_: None),
        lambda linear: linear.register_full_backward_hook(lambda *_: None),
        lambda linear: linear.weight.requires_grad_(),
        lambda linear: linear.bias.requires_grad_(),
        lambda linear: setattr(linear, "__class__", DoubledLinear),
        _replaced,
    ],
)
def test_linear_with_hooks_or_trainable_weights_is_not_fused(change: Callable[[Any], Any]) -> None:
    lora_linear = layer()
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert is_fused(lora_linear(x))
    change(lora_linear.base_layer)
    expected = lora_linear.base_layer(x) + lora_linear.scaling["default"] * lora_linear.lora_B["default"](
        lora_linear.lora_A["default"](x)
    )
    result = lora_linear(x)
    assert not is_fused(result)
    torch.testing.assert_close(result, expected)


def test_fusing_is_decided_at_every_call() -> None:
    linear = layer()
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    handle = linear.base_layer.register_forward_hook(lambda *args: 0 * args[-1])
    assert not is_fused(linear(x))
    handle.remove()
    assert is_fused(linear(x))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("form", ["gated", "free", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_model_has_equal_gradients_fused_and_unfused(family: str, form: Any, again: bool) -> None:
    model = tiny(family).requires_grad_(False)
    sites = find_sites(model)
    gates = {name: gate.requires_grad_() for name, gate in gates_from_plan(random_plan(model), sites).items()}
    add_adapters(model, sites, LoraSettings(rank=3), seed=0)
    for name, weight in trainable_parameters(model).items():
        if ".lora_B." in name:
            nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[1, 5, 6, 7, 3], [4, 4, 2, 9, 8]])

    def run() -> dict[str, Tensor]:
        for gate in gates.values():
            gate.grad = None
        gated = masked(model, gates, adapters=form, sites=sites) if form else nullcontext()
        with use_checkpointing(model) if again else nullcontext(), gated:
            logits = model(tokens, use_cache=False).logits
            logits.square().mean().backward()
        gate_gradients = {f"gate {name}": gate.grad for name, gate in gates.items() if gate.grad is not None}
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, plain, rtol=1e-5, atol=1e-5)
        return {"logits": logits.detach(), **gate_gradients}

    with unfused(model), torch.no_grad():
        plain = model(tokens).logits
    short, long = fused_and_unfused(model, run)
    assert short.keys() == long.keys()
    for name, value in long.items():
        torch.testing.assert_close(short[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, at=name: f"{at}: {text}")


@pytest.mark.parametrize(("trainable", "sizes"), [("AB", 2), ("B", 1), ("A", 1), ("", 0)])
def test_fused_lora_saves_only_tensors_that_gradients_need(trainable: str, sizes: int) -> None:
    """Of tensors as long as the rows, A needs x and B needs A x; frozen adapters need neither."""
    linear = layer()
    linear.lora_A["default"].weight.requires_grad_("A" in trainable)
    linear.lora_B["default"].weight.requires_grad_("B" in trainable)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(torch.randn(11, 7, dtype=torch.float64, requires_grad=True))
    assert sum(len(tensor) == 11 for tensor in kept) == sizes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_adapter_gradients_are_float32_on_a_gpu() -> None:
    left, right = (torch.randn(64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    wide = lora_forward._product(left.t(), right, torch.float32)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, left.t().float() @ right.float(), rtol=1e-3, atol=1e-3)
