"""A model's norms, rotary embeddings and gated activations as single kernels: compiled by PyTorch, for a block.

A small model's step is thousands of kernels of some microseconds each, and many of them are these three's. Whole layers
would fuse further, but compiling one that may have any width takes minutes; these take seconds, and no gate or adapter
ever hangs on them.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ROTARY = "apply_rotary_pos_emb"  # what transformers calls it in every modelling file that has it


@contextmanager
def use_compiled_kernels(*models: nn.Module) -> Iterator[None]:
    """For the block, the models compute what they did, in fewer kernels; no other model is touched."""
    with ExitStack() as stack:
        for module in (module for model in models for module in model.modules()):
            forward = _faster(type(module))  # type: ignore[arg-type]
            if forward is not None and "forward" not in vars(module):
                module.forward = types.MethodType(forward, module)
                stack.callback(delattr, module, "forward")
        yield


@functools.cache
def _faster(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """The forward of a class with its slow part compiled, where it has one."""
    forward = kind.forward
    if kind.__name__.endswith("RMSNorm") and not issubclass(kind, nn.RMSNorm):  # PyTorch's own is one kernel already
        return _by_form(forward)
    if isinstance(forward, types.FunctionType) and ROTARY in forward.__code__.co_names:
        return _copy_function(forward, {ROTARY: _compiled(forward.__globals__[ROTARY])})
    if _is_usual_mlp(forward):
        return _mlp_with(_compiled(_gated))
    return None


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, dynamic=True)
    return compiled


def _by_form(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A norm's forward, compiled apart for rows [B, T, H], for heads [B, n, T, D] or [B, T, n, D], and for one head.

    PyTorch gives a function up after eight forms, and each of the three comes with and without gradients, with frozen
    and with tuned weights, in the dtype of the model and in float32.
    """
    if not isinstance(forward, types.FunctionType):
        return _compiled(forward)
    forms = ("rows", "heads", "head")
    by_form = {form: _compiled(_copy_function(forward, name=f"{forward.__name__}_of_{form}")) for form in forms}

    def norm(self: nn.Module, *given: Any, **named: Any) -> Any:
        shape = given[0].shape if given else ()
        form = "rows" if len(shape) != 4 else "head" if 1 in shape[1:3] else "heads"
        return by_form[form](self, *given, **named)

    return norm


def _copy_function(
    function: types.FunctionType, names: dict[str, Any] | None = None, name: str = ""
) -> types.FunctionType:
    """The same function, to which these global names mean something else; another one to PyTorch if it has a name."""
    name = name or function.__name__
    around, code = {**function.__globals__, **(names or {})}, function.__code__.replace(co_name=name)
    anew = types.FunctionType(code, around, name, function.__defaults__, function.__closure__)
    anew.__kwdefaults__ = function.__kwdefaults__
    return anew


def _gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


def _mlp_with(gated: Callable[..., Tensor]) -> Callable[..., Any]:
    """The usual MLP's forward, whose linears are called as ever: gates and adapters hang on them."""

    def forward(self: Any, x: Tensor) -> Any:
        return self.down_proj(gated(self.act_fn, self.gate_proj(x), self.up_proj(x)))

    return forward


def _is_usual_mlp(forward: Any) -> bool:
    """Whether a forward is, instruction by instruction, one of the two ways in which transformers writes it."""
    return isinstance(forward, types.FunctionType) and _code_signature(forward) in (
        _code_signature(_mlp),
        _code_signature(_mlp_in_two),
    )


def _mlp(self: Any, x: Tensor) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _mlp_in_two(self: Any, x: Tensor) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj  # noqa: RET504


def _code_signature(function: Any) -> tuple[object, ...]:
    """All that a function says which has no constants in it."""
    code = function.__code__
    return code.co_code, code.co_names, code.co_varnames, code.co_argcount
