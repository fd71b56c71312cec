"""The cut: rows and columns of removed units leave every linear layer, its bias and its adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from prunetune.model.masking import gates_of
from prunetune.model.sites import Cut, Site, find_sites
from prunetune.plan import Plan


class NoAttention(nn.Module):
    """Stands where a layer lost its last KV group: attends to nothing and adds nothing, or a constant [hidden]."""

    def __init__(self, constant: Tensor | None = None) -> None:
        super().__init__()
        self.constant = None if constant is None else nn.Parameter(constant.detach().clone(), requires_grad=False)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[..., hidden] -> zeros of the same shape, or the constant at each place, and no attention weights."""
        nothing = torch.zeros_like(hidden_states)
        return (nothing if self.constant is None else nothing + self.constant.to(nothing.dtype)), None


class OwnNumbers:
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
        module: Any = model.get_submodule(name)
        linear = module.get_base_layer() if isinstance(module, LoraLayer) else module
        total = bias.to(linear.weight.device, torch.float32)
        if linear.bias is not None:
            total = total + linear.bias.float()
        linear.bias = nn.Parameter(total.to(linear.weight.dtype), requires_grad=False)


def cut(model: nn.Module, plan: Plan, *, sites: Iterable[Site] | None = None) -> nn.Module:
    """Merge the adapters and remove what `plan` does not keep, in place; returns the model.

    One operation, because each half alone is wrong: an adapter merged into a masked weight un-prunes it. The result
    equals `masked(model, plan)`. Raises `PlanError` where the plan was made for another model.
    """
    cut_linears(model, plan, sites=sites)
    merge_adapters(model)
    return model


@torch.no_grad()
def cut_linears(model: nn.Module, plan: Plan, *, sites: Iterable[Site] | None = None) -> None:
    """Remove rows and columns in place; adapters stay adapters, so that tuning goes on with the smaller model."""
    sites = tuple(find_sites(model) if sites is None else sites)
    gates_of(plan, sites)  # refuses a plan of another model before anything is cut
    for site in sites:
        kept = plan.kept[site.name]
        if len(kept) == site.units:
            continue
        if not kept:
            parent, _, child = site.name.rpartition(".")
            setattr(model.get_submodule(parent), child, NoAttention(_bias(model, site.consumer)))
            continue
        for producer in site.producers:
            _keep_rows(model.get_submodule(producer.module), producer.indices(kept, site.units))
        _keep_columns(model.get_submodule(site.consumer.module), site.consumer.indices(kept, site.units))
        if site.kind == "attention" and any(len(producer.parts) > 1 for producer in site.producers):
            _tell_heads(model.get_submodule(site.name), site, len(kept))


def _tell_heads(attention: Any, site: Site, groups: int) -> None:
    """A fused projection is taken apart by the numbers of heads that the configuration names, see `modeling_phi3`."""
    ratio = attention.config.num_attention_heads // site.units
    attention.config = OwnNumbers(attention.config, num_attention_heads=groups * ratio)
    attention.num_key_value_heads = groups


def _bias(model: nn.Module, consumer: Cut) -> Tensor | None:
    module: Any = model.get_submodule(consumer.module)
    bias: Tensor | None = (module.get_base_layer() if isinstance(module, LoraLayer) else module).bias
    return bias


def _keep_rows(module: nn.Module, rows: Tensor) -> None:
    if isinstance(module, LoraLayer):
        for adapter in module.lora_B.values():
            _shrink(adapter, rows, axis=0)
        module.out_features = len(rows)
        module = module.get_base_layer()
    _shrink(module, rows, axis=0)


def _keep_columns(module: nn.Module, columns: Tensor) -> None:
    if isinstance(module, LoraLayer):
        for adapter in module.lora_A.values():
            _shrink(adapter, columns, axis=1)
        module.in_features = len(columns)
        module = module.get_base_layer()
    _shrink(module, columns, axis=1)


def _shrink(linear: Any, index: Tensor, *, axis: int) -> None:
    index = index.to(linear.weight.device)
    linear.weight = _selected(linear.weight, index, axis)
    if axis == 0:
        linear.out_features = len(index)
        if linear.bias is not None:
            linear.bias = _selected(linear.bias, index, 0)
    else:
        linear.in_features = len(index)


def _selected(parameter: nn.Parameter, index: Tensor, axis: int) -> nn.Parameter:
    return nn.Parameter(
        parameter.detach().index_select(axis, index).contiguous(), requires_grad=parameter.requires_grad
    )


@torch.no_grad()
def merge_adapters(model: nn.Module, *, trainable: bool = False) -> None:
    """Fold every LoRA adapter into its base weight (sum in float32, stored in the base's dtype), in place."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        base: Any = module.get_base_layer()
        delta = sum(module.get_delta_weight(adapter).float() for adapter in module.lora_A)
        dtype = torch.float32 if trainable else base.weight.dtype
        base.weight = nn.Parameter((base.weight.float() + delta).to(dtype), requires_grad=trainable)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
