"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174) for a block of code, in training mode or not.

Every layer keeps only its input for the backward pass, and is computed again there: the time of one more forward pass,
for the memory of one layer's activations instead of all layers'. The checkpointing of transformers works in training
mode only, and the search runs in eval mode.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from prunetune.config.recipe import RunConfig
from prunetune.pruning.families import architecture_info


def uses_checkpointing(config: RunConfig) -> bool:
    """Whether a recipe asks for checkpointing from the first step on."""
    wanted = config.train.checkpointing
    return wanted == "on" or (wanted == "auto" and config.lora.quantize != "off")


@contextmanager
def use_checkpointing(model: Any) -> Iterator[None]:
    """For the block, checkpoint every layer in forward passes with a gradient.

    The backward pass runs the layers' submodules again, so hooks on them and the attention implementation must not
    change until it is done.
    """
    layers = [model.get_submodule(prefix) for prefix in architecture_info(model).layer_prefixes]
    own_forwards = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _checkpointed_forward(layer)
    try:
        yield
    finally:
        for layer, own_forward in zip(layers, own_forwards, strict=True):
            if own_forward is None:
                del layer.forward
            else:
                layer.forward = own_forward


def _checkpointed_forward(layer: nn.Module) -> Callable[..., Any]:
    forward = layer.forward

    def run(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        # With dropout, the recomputation draws the same numbers; without, as always in CUDA graphs, none are saved.
        has_dropout = any(isinstance(module, nn.Dropout) and module.training for module in layer.modules())
        return checkpoint(partial(forward, **options), *inputs, use_reentrant=False, preserve_rng_state=has_dropout)

    return run
