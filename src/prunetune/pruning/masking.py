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
from prunetune.plan import Plan
from prunetune.pruning.experts import gate_expert_columns, gate_router
from prunetune.pruning.linears import unwrap_adapter
from prunetune.pruning.sites import sites_from_plan
from prunetune.pruning.units import Site, kept_mask

Gates = Mapping[str, Tensor]  # site name -> one gate per unit, in [0, 1]
AdapterGating = Literal["gated", "free"]
Gate = Callable[[nn.Module, Site, Tensor], list[RemovableHandle]]


def gates_from_plan(plan: Plan, sites: Iterable[Site], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The plan as gates of 0 and 1 (float32, one vector of `units` per site); raises `PlanError` where it cannot be."""
    gates, seen = {}, dict[str, Site]()
    for site in sites:
        if plan.units.get(site.name) != site.units:
            raise PlanError(
                f"plan has {plan.units.get(site.name, 'no')} units at {site.name}, the model has {site.units}: "
                "a plan fits only the dense model it was made for"
            )
        stays = kept_mask(plan.kept[site.name], site.units)
        _check_parent_groups(plan, site, seen.get(site.parent), stays)
        seen[site.name] = site
        gates[site.name] = stays.to(device, torch.float32)
    return gates


def _check_parent_groups(plan: Plan, site: Site, outer: Site | None, stays: Tensor) -> None:
    """Lanes of open units keep the same number, others nothing."""
    if site.parent_groups == 1 and outer is None:
        return
    counts = stays.view(site.parent_groups, -1).sum(1).tolist()
    is_open = set(site.open_parent_groups(plan.kept[outer.name] if outer else None, outer.units if outer else 1))
    if len({counts[lane] for lane in is_open}) > 1 or any(
        counts[lane] for lane in set(range(site.parent_groups)) - is_open
    ):
        raise PlanError(
            f"plan at {site.name}: {site.parent_groups} lanes keep {counts} units, "
            "and each open one has to keep the same number, a closed one none"
        )


@contextmanager
def masked(
    model: nn.Module,
    plan: Plan | Gates,
    *,
    adapters: AdapterGating = "gated",
    sites: Iterable[Site] | None = None,
) -> Iterator[nn.Module]:
    """Gate every site of `model` for the length of the block; yields the model itself.

    `adapters="gated"` behaves as after the cut. `adapters="free"` is the LoRA-aware forward of ATP (section 3.3,
    arXiv 2412.14426): y = gate * (W x) + B A x, so that a unit under a zero gate still learns and can come back.
    Whole blocks and layers are gated with their adapters either way: these rest, and come back as they were.
    """
    if sites is None:
        sites = sites_from_plan(model, plan if isinstance(plan, Plan) else _dense(plan))
    sites = tuple(sites)
    if isinstance(plan, Plan):
        plan = gates_from_plan(plan, sites, next(model.parameters()).device)
    handles: list[RemovableHandle] = []
    try:
        for site in sites:
            if site.gating == "columns":
                handles += _gate_consumer(model, site, plan[site.name], adapters)
                if adapters == "free":
                    handles += _gate_producers(model, site, plan[site.name])
            else:
                handles += GATES[site.gating](model, site, plan[site.name])
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _dense(gates: Gates) -> Plan:
    return Plan(dict.fromkeys(gates, ()), {name: len(gate) for name, gate in gates.items()})


def _gate_consumer(model: nn.Module, site: Site, gate: Tensor, adapters: AdapterGating) -> list[RemovableHandle]:
    assert site.consumer is not None
    consumer = model.get_submodule(site.consumer.module)
    if adapters == "free":
        consumer = unwrap_adapter(consumer)
    return [consumer.register_forward_pre_hook(_scale_input(site.consumer.expand_to_rows(gate)))]


def _gate_producers(model: nn.Module, site: Site, gate: Tensor) -> list[RemovableHandle]:
    handles = []
    for producer in site.producers:
        base = unwrap_adapter(model.get_submodule(producer.module))
        handles.append(base.register_forward_hook(_scale_output(producer.expand_to_rows(gate))))
    return handles


def _scale_input(scale: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]:
    return lambda _, inputs: (inputs[0] * scale.to(inputs[0].dtype),)


def _scale_output(scale: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    """Of a module that gives a tensor, or a tuple that begins with one."""
    return lambda _, __, output: _first(output, lambda tensor: tensor * scale.to(tensor.dtype))


def _first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _gate_block(model: nn.Module, site: Site, gate: Tensor) -> list[RemovableHandle]:
    return [model.get_submodule(site.gated_module).register_forward_hook(_scale_output(gate))]


def _gate_layer(model: nn.Module, site: Site, gate: Tensor) -> list[RemovableHandle]:
    """From the layer's input (gate 0) to its output (gate 1), exact at both ends.

    Before all other hooks: those by which transformers collects hidden states come once and stay, and are to see this.
    """

    def hear(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
        before = inputs[0] if inputs else options["hidden_states"]
        return _first(output, lambda after: torch.lerp(before, after, gate.to(after.dtype)))

    return [model.get_submodule(site.gated_module).register_forward_hook(hear, with_kwargs=True, prepend=True)]


GATES: Mapping[str, Gate] = {
    "output": _gate_block,
    "layer": _gate_layer,
    "router": gate_router,
    "expert columns": gate_expert_columns,
}
