"""Masking: a model behaves as if units were removed, for the length of a block, by hooks that scale activations.

Scaling what a consumer reads by zero equals removing it, so no modelling code is copied.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunetune.errors import PlanError
from prunetune.plan import Plan
from prunetune.pruning.experts import gate_expert_columns, gate_router
from prunetune.pruning.hidden_channels import gate_hidden
from prunetune.pruning.linears import unwrap_adapter
from prunetune.pruning.sites import sites_from_plan
from prunetune.pruning.units import Site, kept_mask

Gates = Mapping[str, Tensor]  # site name -> one gate per unit in [0, 1]: [U]
AdapterGating = Literal["gated", "free"]
GateFunction = Callable[[nn.Module, Site, Tensor], list[RemovableHandle]]


def gates_from_plan(plan: Plan, sites: Iterable[Site], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The plan as gates of 0 and 1, float32 [U] per site; raises `PlanError` where it was made for another model."""
    gates, by_name = {}, dict[str, Site]()
    for site in sites:
        if plan.units.get(site.name) != site.units:
            raise PlanError(
                f"plan has {plan.units.get(site.name, 'no')} units at {site.name}, the model has {site.units}: "
                "a plan fits only the dense model it was made for"
            )
        mask = kept_mask(plan.kept[site.name], site.units)
        parent = by_name.get(site.parent)
        if site.parent_groups > 1 or parent:  # open ones keep equal numbers of units, closed ones none
            counts = mask.view(site.parent_groups, -1).sum(1).tolist()
            kept_parents, parent_units = (plan.kept[parent.name], parent.units) if parent else (None, 1)
            open_groups = set(site.open_parent_groups(kept_parents, parent_units))
            closed_groups = set(range(site.parent_groups)) - open_groups
            if len({counts[group] for group in open_groups}) > 1 or any(counts[group] for group in closed_groups):
                raise PlanError(
                    f"plan at {site.name}: {site.parent_groups} groups keep {counts} units, "
                    "and each open one has to keep the same number, a closed one none"
                )
        by_name[site.name] = site
        gates[site.name] = mask.to(device, torch.float32)
    return gates


@contextmanager
def masked(
    model: nn.Module, plan: Plan | Gates, *, adapters: AdapterGating = "gated", sites: Iterable[Site] | None = None
) -> Iterator[nn.Module]:
    """Gate every site of the model for the length of the block; yields the model itself.

    `adapters="gated"` behaves as after the cut. `adapters="free"` is the LoRA-aware forward of ATP (authors' code):
    y = gate * (W x) + B A x, so that a unit with a zero gate still learns and can come back.
    Whole blocks, layers and hidden channels are gated with their adapters either way, which get no gradient while the
    gate is zero.
    """
    if sites is None:
        units = plan.units if isinstance(plan, Plan) else {name: len(gate) for name, gate in plan.items()}
        sites = sites_from_plan(model, Plan(dict.fromkeys(units, ()), units))
    sites = tuple(sites)
    gates = gates_from_plan(plan, sites, next(model.parameters()).device) if isinstance(plan, Plan) else plan
    handles: list[RemovableHandle] = []
    try:
        for site in sites:
            if site.gating == "columns":
                handles += _gate_columns(model, site, gates[site.name], adapters)
            else:
                handles += GATE_FUNCTIONS[site.gating](model, site, gates[site.name])
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _gate_columns(model: nn.Module, site: Site, gate: Tensor, adapters: AdapterGating) -> list[RemovableHandle]:
    """Scale what the consumer reads; with free adapters, scale the base linears alone, of producers too."""
    assert site.consumer is not None
    consumer = model.get_submodule(site.consumer.module)
    columns = site.consumer.expand_to_rows(gate)

    def scale_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        return (inputs[0] * columns.to(inputs[0].dtype),)

    if adapters == "gated":
        return [consumer.register_forward_pre_hook(scale_input)]
    handles = [unwrap_adapter(consumer).register_forward_pre_hook(scale_input)]
    for producer in site.producers:
        base = unwrap_adapter(model.get_submodule(producer.module))
        handles.append(base.register_forward_hook(_scale_output(producer.expand_to_rows(gate))))
    return handles


def _scale_output(scale: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    """For a module that returns a tensor, or a tuple that begins with one."""
    return lambda _, __, output: _map_first(output, lambda tensor: tensor * scale.to(tensor.dtype))


def _map_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _gate_layer(model: nn.Module, site: Site, gate: Tensor) -> list[RemovableHandle]:
    """Interpolate between the layer's input (gate 0) and its output (gate 1), exact at both ends.

    The hook comes before all others: transformers collects hidden states by hooks that are added once and never
    removed, and these have to see the gated output.
    """

    def interpolate(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
        before = inputs[0] if inputs else options["hidden_states"]
        return _map_first(output, lambda after: torch.lerp(before, after, gate.to(after.dtype)))

    layer = model.get_submodule(site.gated_module)
    return [layer.register_forward_hook(interpolate, with_kwargs=True, prepend=True)]


GATE_FUNCTIONS: Mapping[str, GateFunction] = {
    "output": lambda model, site, gate: [
        model.get_submodule(site.gated_module).register_forward_hook(_scale_output(gate))
    ],
    "layer": _gate_layer,
    "router": gate_router,
    "expert columns": gate_expert_columns,
    "hidden": gate_hidden,
}
