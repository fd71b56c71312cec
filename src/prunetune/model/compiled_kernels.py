"""Faster passes for a block of code: norms, rotary embeddings and gated activations compiled to single kernels.

A small model's step runs thousands of kernels of some microseconds each, and many belong to these three. Compiling
whole layers would fuse more, but takes minutes where layers may have any width. These take seconds, and no gate or
adapter is attached to them.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ROTARY = "apply_rotary_pos_emb"  # its name in every modelling file of transformers


@contextmanager
def use_compiled_kernels(*models: nn.Module) -> Iterator[None]:
    """For the block, the models compute the same in fewer kernels; other models of the same classes are unchanged."""
    with ExitStack() as stack:
        for module in (module for model in models for module in model.modules()):
            forward = _compiled_forward(type(module))  # type: ignore[arg-type]
            if forward is not None and "forward" not in vars(module):
                module.forward = types.MethodType(forward, module)
                stack.callback(delattr, module, "forward")
        yield


@functools.cache
def _compiled_forward(module_class: type[nn.Module]) -> Callable[..., Any] | None:
    """The compiled forward of a norm, of attention with rotary embeddings or of a gated MLP; None of other classes."""
    forward = module_class.forward
    is_norm = module_class.__name__.endswith("RMSNorm")
    if is_norm and not issubclass(module_class, nn.RMSNorm):  # PyTorch's own is one kernel already
        return _norm_by_shape(forward)
    if not isinstance(forward, types.FunctionType):
        return None
    if ROTARY in forward.__code__.co_names:
        return _copy_function(forward, {ROTARY: _compiled(forward.__globals__[ROTARY])})
    is_gated_mlp = _code_signature(forward) in map(_code_signature, (_mlp, _mlp_in_two_statements))
    if not is_gated_mlp:
        return None
    gated_activation = _compiled(_gated_activation)

    def gated_mlp(self: Any, x: Tensor) -> Any:  # its linears are still called as modules: gates and adapters work
        return self.down_proj(gated_activation(self.act_fn, self.gate_proj(x), self.up_proj(x)))

    return gated_mlp


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, dynamic=True)
    return compiled


def _norm_by_shape(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A norm's forward, compiled apart for rows [B, T, H], for heads [B, n, T, D] or [B, T, n, D], and for one head.

    PyTorch stops compiling a function after eight variants, and each of the three comes with and without gradients,
    with frozen and with tuned weights, in the dtype of the model and in float32.
    """
    if not isinstance(forward, types.FunctionType):
        return _compiled(forward)
    names = {shape: f"{forward.__name__}_of_{shape}" for shape in ("rows", "heads", "head")}
    by_shape = {shape: _compiled(_copy_function(forward, name=name)) for shape, name in names.items()}

    def norm(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        sizes = args[0].shape if args else ()
        shape = "rows" if len(sizes) != 4 else "head" if 1 in sizes[1:3] else "heads"
        return by_shape[shape](self, *args, **kwargs)

    return norm


def _copy_function(
    function: types.FunctionType, names: dict[str, Any] | None = None, name: str = ""
) -> types.FunctionType:
    """The same function with other values of some globals; under another name, PyTorch compiles it separately."""
    name = name or function.__name__
    names_in_copy, code = {**function.__globals__, **(names or {})}, function.__code__.replace(co_name=name)
    copied = types.FunctionType(code, names_in_copy, name, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _gated_activation(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


# The two ways in which transformers writes a gated MLP, which is recognised by its bytecode.
def _mlp(self: Any, x: Tensor) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _mlp_in_two_statements(self: Any, x: Tensor) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj  # noqa: RET504


def _code_signature(function: Any) -> tuple[object, ...]:
    """What identifies a function without constants: its bytecode and names."""
    code = function.__code__
    return code.co_code, code.co_names, code.co_varnames, code.co_argcount
