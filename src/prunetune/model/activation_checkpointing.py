"""Layers that keep their inputs alone for the backward pass, and compute the rest again in it.

Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): one more forward pass of time, one layer's activations of
memory instead of all layers'. transformers' own does it in training mode only, where the search is not.
"""

from __future__ import annotations

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
    """Whether a recipe has it so from the first step on."""
    wanted = config.train.checkpointing
    return wanted == "on" or (wanted == "auto" and config.lora.quantize != "off")


@contextmanager
def use_checkpointing(model: Any) -> Iterator[None]:
    """For the block, forward passes with a gradient keep one input a layer.

    Their backward pass runs the layers' submodules again: hooks on these and the choice of attention have to be as they
    were until it is over.
    """
    layers = [model.get_submodule(prefix) for prefix in architecture_info(model).layer_prefixes]
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _checkpointed_forward(layer)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def _checkpointed_forward(layer: nn.Module) -> Callable[..., Any]:
    forward = layer.forward

    def run(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        # Dropout draws the same numbers again; where there is none, as always while recording, none are saved.
        return checkpoint(
            partial(forward, **options), *inputs, use_reentrant=False, preserve_rng_state=_draws(layer)
        )  # fmt: skip

    return run


def _draws(layer: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.training for module in layer.modules())
