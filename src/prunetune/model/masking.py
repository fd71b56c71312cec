"""Gates by hooks: a model behaves as if units were gone, and nothing is left behind.

Scaling what a consumer reads equals removing what it does not read, so no modelling code is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunetune.errors import PlanError
from prunetune.model.sites import Site, find_sites
from prunetune.plan import Plan

Gates = Mapping[str, Tensor]  # site name -> one gate per unit, in [0, 1]
Adapters = Literal["gated", "free"]


def gates_of(plan: Plan, sites: Iterable[Site], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The plan as gates of 0 and 1 (float32, one vector of `units` per site)."""
    gates = {}
    for site in sites:
        if plan.units.get(site.name) != site.units:
            raise PlanError(
                f"plan has {plan.units.get(site.name, 'no')} units at {site.name}, the model has {site.units}: "
                "a plan fits only the dense model it was made for"
            )
        gate = torch.zeros(site.units, device=device)
        gate[list(plan.kept[site.name])] = 1.0
        gates[site.name] = gate
    return gates


@contextmanager
def masked(
    model: nn.Module,
    plan: Plan | Gates,
    *,
    adapters: Adapters = "gated",
    sites: Iterable[Site] | None = None,
) -> Iterator[nn.Module]:
    """Gate every site of `model` for the length of the block; yields the model itself.

    `adapters="gated"` behaves as after the cut. `adapters="free"` is the LoRA-aware forward of ATP (section 3.3,
    arXiv 2412.14426): y = gate * (W x) + B A x, so that a unit under a zero gate still learns and can come back.
    """
    sites = tuple(find_sites(model) if sites is None else sites)
    if isinstance(plan, Plan):
        plan = gates_of(plan, sites, next(model.parameters()).device)
    handles: list[RemovableHandle] = []
    try:
        for site in sites:
            handles += _gate_consumer(model, site, plan[site.name], adapters)
            if adapters == "free":
                handles += _gate_producers(model, site, plan[site.name])
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _gate_consumer(model: nn.Module, site: Site, gate: Tensor, adapters: Adapters) -> list[RemovableHandle]:
    consumer = model.get_submodule(site.consumer.module)
    if adapters == "free":
        consumer = getattr(consumer, "base_layer", consumer)
    return [consumer.register_forward_pre_hook(_scale_input(site.consumer.spread(gate)))]


def _gate_producers(model: nn.Module, site: Site, gate: Tensor) -> list[RemovableHandle]:
    handles = []
    for producer in site.producers:
        module = model.get_submodule(producer.module)
        base = getattr(module, "base_layer", module)
        handles.append(base.register_forward_hook(_scale_output(producer.spread(gate))))
    return handles


def _scale_input(scale: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]:
    return lambda _, inputs: (inputs[0] * scale.to(inputs[0].dtype),)


def _scale_output(scale: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    return lambda _, __, output: output * scale.to(output.dtype)
