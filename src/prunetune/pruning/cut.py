"""The cut: rows and columns of removed units leave every linear layer, its bias and its adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from prunetune.plan import Plan
from prunetune.pruning.families import head_counts
from prunetune.pruning.linears import ROWS, get_base_linear, is_transposed, set_axis_size, stored_axis
from prunetune.pruning.masking import gates_from_plan
from prunetune.pruning.nf4 import NF4Linear, has_nf4_linears
from prunetune.pruning.sites import sites_from_plan
from prunetune.pruning.units import LinearSlice, ParamSlice, Site, kept_indices
from prunetune.pruning.whole_blocks import RemovedAttention, remove_block, remove_layers

PORTION = 2**22  # weights that a merge holds in float32 at a time: 16 MiB each


class LayerConfigOverride:
    """A configuration that differs for one layer; all else is the model's, as it is when asked."""

    def __init__(self, config: Any, **own: Any) -> None:
        self.__dict__.update(own, _shared=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_shared" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._shared, name)


@torch.no_grad()
def add_biases(model: nn.Module, biases: Mapping[str, Tensor]) -> None:
    """Give linears a constant output in place, {module: [rows]}, added to a bias that is there; to call before the cut.

    It is not trained and survives the cut, also of a layer's last KV group. For what removed columns added on average.
    Not for export: the uniform layout refuses such a model, and a per-layer checkpoint of it fails its self-check.
    """
    for name, bias in biases.items():
        linear = get_base_linear(model, name)
        total = bias.to(linear.weight.device, torch.float32)
        if linear.bias is not None:
            total = total + linear.bias.float()
        linear.bias = nn.Parameter(total.to(linear.weight.dtype), requires_grad=False)


def cut(model: nn.Module, plan: Plan, *, sites: Iterable[Site] | None = None) -> nn.Module:
    """Merge the adapters and remove what `plan` does not keep, in place; returns the model.

    One operation, because each half alone is wrong: an adapter merged into a masked weight un-prunes it. The result
    equals `masked(model, plan)`. Layers that go leave the stack, and the configuration says how many are left.
    Raises `PlanError` where the plan was made for another model.
    """
    sites = tuple(sites_from_plan(model, plan) if sites is None else sites)
    cut_linears(model, plan, sites=sites)
    merge_adapters(model)
    remove_layers(model, plan, sites)
    return model


@torch.no_grad()
def cut_linears(model: nn.Module, plan: Plan, *, sites: Iterable[Site] | None = None) -> None:
    """Remove rows and columns in place; adapters stay adapters, so that tuning goes on with the smaller model.

    Names stay, too: a layer that goes is emptied and passes on what it is given.
    """
    sites = tuple(sites_from_plan(model, plan) if sites is None else sites)
    gates_from_plan(plan, sites)  # refuses a plan of another model before anything is cut
    closed: set[str] = set()
    for site in sites:  # outer ones first
        if site.parent in closed:
            closed.add(site.name)
        elif not plan.kept[site.name]:
            closed.add(site.name)
            if site.is_whole_block:
                remove_block(model, site)
            else:
                parent, _, child = site.name.rpartition(".")
                setattr(model.get_submodule(parent), child, RemovedAttention(_bias(model, site.consumer)))
    left = [site for site in sites if site.name not in closed]
    for (name, axis), index in kept_indices(plan, left).items():
        _keep(model.get_submodule(name), index, axis)
    for site in reversed(left):  # inner ones first, whose lanes are counted as in the dense model
        for part in site.param_slices:
            _keep_slice(model, part, site, plan.kept[site.name])
    for layer in {site.layer for site in left}:
        _update_head_counts(model, [site for site in left if site.layer == layer], plan)
        _update_expert_counts(model, [site for site in left if site.layer == layer], plan)


def _update_head_counts(model: Any, sites: Sequence[Site], plan: Plan) -> None:
    """Attention that was told its numbers of heads is told the new ones."""
    found = {site.kind: site for site in sites if site.kind in ("attention", "query-heads")}
    if not found:
        return
    dense, site = head_counts(model.config), next(iter(found.values()))
    groups = len(plan.kept[found["attention"].name]) if "attention" in found else dense.kv_heads
    queries = (
        len(plan.kept[found["query-heads"].name]) if "query-heads" in found else groups * dense.queries_per_kv_head
    )
    attention = model.get_submodule(site.name.partition(":")[0])
    if queries != groups * dense.queries_per_kv_head:
        attention.num_key_value_groups = queries // groups
    cuts = [cut for site in found.values() for cut in site.producers]
    if (groups, queries) != (dense.kv_heads, dense.query_heads) and any(
        len(cut.part_sizes) > 1 or cut.total_rows for cut in cuts
    ):
        # A fused projection is taken apart by the numbers of heads that the configuration names, see `modeling_phi3`.
        attention.config = LayerConfigOverride(attention.config, num_attention_heads=queries)
        attention.num_key_value_heads = groups


def _update_expert_counts(model: nn.Module, sites: Sequence[Site], plan: Plan) -> None:
    """Routers and fused experts know how many there are, and how wide."""
    for site in sites:
        if site.kind == "experts":
            places = {part.parameter.rpartition(".")[0] for part in site.param_slices}
            for place in places:
                told: Any = model.get_submodule(place)
                told.num_experts = len(plan.kept[site.name])
        elif site.kind == "expert-channels":
            experts: Any = model.get_submodule(site.gated_module)
            part = next(part for part in site.param_slices if part.parameter.endswith(".down_proj"))
            experts.num_experts, width = experts.down_proj.shape[0], experts.down_proj.shape[part.axis]
            for name in ("intermediate_dim", "intermediate_size"):
                if hasattr(experts, name):
                    setattr(experts, name, width)


def _bias(model: nn.Module, consumer: LinearSlice | None) -> Tensor | None:
    assert consumer is not None
    bias: Tensor | None = get_base_linear(model, consumer.module).bias
    return bias


def _keep(module: nn.Module, lines: Tensor, axis: int) -> None:
    """Rows (axis 0) or columns (axis 1) of a linear, and of what an adapter holds for them."""
    if isinstance(module, LoraLayer):
        for adapter in (module.lora_B if axis == ROWS else module.lora_A).values():
            _shrink(adapter, lines, axis)
        setattr(module, "out_features" if axis == ROWS else "in_features", len(lines))
        module = module.get_base_layer()
    _shrink(module, lines, axis)


def _shrink(linear: Any, index: Tensor, axis: int) -> None:
    if isinstance(linear, NF4Linear):
        linear.keep_indices(index.to(linear.packed.device), axis)
        return
    index = index.to(linear.weight.device)
    linear.weight = _selected(linear.weight, index, stored_axis(linear, axis))
    if axis == ROWS and linear.bias is not None:
        linear.bias = _selected(linear.bias, index, 0)
    set_axis_size(linear, axis, len(index))


def _selected(parameter: nn.Parameter, index: Tensor, axis: int) -> nn.Parameter:
    return nn.Parameter(
        parameter.detach().index_select(axis, index).contiguous(), requires_grad=parameter.requires_grad
    )


def _keep_slice(model: nn.Module, part: ParamSlice, site: Site, kept: Sequence[int]) -> None:
    place, _, name = part.parameter.rpartition(".")
    module: Any = model.get_submodule(place)
    parameter = getattr(module, name)
    if part.parent_groups == 1:
        index = part.indices(kept, site.units).to(parameter.device)
        setattr(module, name, _selected(parameter, index, part.axis))
        return
    lanes: dict[int, list[int]] = {}
    for unit in kept:
        lanes.setdefault(unit // site.units_per_group, []).append(unit % site.units_per_group)
    parts = [
        parameter.detach()[lane].index_select(
            part.axis - 1, part.indices(own, site.units_per_group).to(parameter.device)
        )
        for lane, own in lanes.items()
    ]
    setattr(module, name, nn.Parameter(torch.stack(parts), requires_grad=parameter.requires_grad))


@torch.no_grad()
def merge_adapters(model: nn.Module, *, trainable: bool = False) -> None:
    """Fold every LoRA adapter into its base weight (sum in float32, stored in the base's dtype), in place.

    `trainable`: the sum stays float32, as small updates need, and has a gradient from then on. A base in 4 bits becomes
    an ordinary linear: a sum has no place there.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        base: Any = module.get_base_layer()
        base = base.dequantize() if isinstance(base, NF4Linear) else base
        if trainable:
            # A copy where it is float32 already: the weight may be a teacher's, too, see `shared`.
            base.weight = nn.Parameter(base.weight.to(torch.float32, copy=True), requires_grad=True)
        _add_adapters(base, module)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)


def finalize_adapters(model: Any) -> None:
    """Make adapters part of a model that is only read from now on, in place: merged, or beside a base in 4 bits.

    Beside it they are held in the dtype of the model's arithmetic, and need no autocast any more.
    """
    if not has_nf4_linears(model):
        merge_adapters(model)
        return
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(model.dtype)


def _add_adapters(linear: Any, layer: Any) -> None:
    """Add scale * B A to the stored weight, in place, a portion at a time: no second weight is ever held."""
    weight = linear.weight.data
    step = max(1, PORTION // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        total = weight[rows].float()
        for name, a in layer.lora_A.items():
            a, b = a.weight.float(), layer.lora_B[name].weight.float()
            left, right = (a[:, rows].t(), b.t()) if is_transposed(linear) else (b[rows], a)
            total = torch.addmm(total, left, right, alpha=layer.scaling[name])
        weight[rows] = total.to(weight.dtype)
