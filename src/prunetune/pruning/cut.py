"""The exact cut: rows and columns of removed units leave linears, biases and adapters; blocks and layers go whole."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from prunetune.plan import Plan
from prunetune.pruning.experts import down_proj_slice
from prunetune.pruning.families import HeadCounts, architecture_info, get_family, head_counts
from prunetune.pruning.hidden_channels import set_hidden_size
from prunetune.pruning.linears import (
    ROWS,
    axis_size,
    get_base_linear,
    is_transposed,
    replace_module,
    set_axis_size,
    stored_axis,
)
from prunetune.pruning.masking import gates_from_plan
from prunetune.pruning.nf4 import NF4Linear, has_nf4_linears
from prunetune.pruning.sites import sites_from_plan
from prunetune.pruning.units import (
    ALL_LAYERS,
    ParamSlice,
    Site,
    UnitKind,
    hidden_site,
    kept_indices,
    surviving_layers,
    without_removed_modules,
)

MERGE_CHUNK = 2**22  # weights that a merge holds in float32 at a time: 16 MiB each


class LayerConfigOverride:
    """A configuration with values of its own for one layer; every other attribute is read from the model's."""

    def __init__(self, config: Any, **own: Any) -> None:
        self.__dict__.update(own, _shared=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_shared" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._shared, name)


@torch.no_grad()
def add_biases(model: nn.Module, biases: Mapping[str, Tensor]) -> None:
    """Add a constant, {linear: [rows]}, to the output of linears, in place; to call before the cut.

    It stands for what removed columns added on average. It is not trained, and survives the cut, also in a layer that
    loses its last KV group. Not for export: the uniform layout refuses such a model, and a per-layer checkpoint of it
    fails its self-check.
    """
    for name, bias in biases.items():
        linear = get_base_linear(model, name)
        total = bias.to(linear.weight.device, torch.float32)
        if linear.bias is not None:
            total = total + linear.bias.float()
        linear.bias = nn.Parameter(total.to(linear.weight.dtype), requires_grad=False)


def cut(model: nn.Module, plan: Plan, *, sites: Iterable[Site] | None = None) -> nn.Module:
    """Merge the adapters and remove what the plan does not keep, in place; returns the model.

    The result equals `masked(model, plan)`. Merging and cutting are one operation, as an adapter merged into a masked
    weight would bring removed units back. Removed layers leave the model's list and its configuration.
    Raises `PlanError` where the plan was made for another model.
    """
    sites = tuple(sites_from_plan(model, plan) if sites is None else sites)
    cut_linears(model, plan, sites=sites)
    merge_adapters(model)
    remove_layers(model, plan, sites)
    return model


@torch.no_grad()
def cut_linears(model: nn.Module, plan: Plan, *, sites: Iterable[Site] | None = None) -> None:
    """Remove rows and columns in place, but do not merge adapters, so that tuning continues with the smaller model.

    Modules keep their names: a removed layer is emptied and passes its input on.
    """
    sites = tuple(sites_from_plan(model, plan) if sites is None else sites)
    gates_from_plan(plan, sites)  # refuses a plan of another model before anything is cut
    removed: set[str] = set()
    for site in sites:  # outer ones first
        if site.parent in removed:
            removed.add(site.name)
        elif not plan.kept[site.name]:
            removed.add(site.name)
            if site.kind.is_whole_block:
                remove_block(model, site)
            else:  # the last KV group: an output bias of attention is kept
                assert site.consumer is not None
                bias = get_base_linear(model, site.consumer.module).bias
                replace_module(model, site.name, RemovedAttention(bias))
    left = without_removed_modules(sites, plan)
    kept_sites = [site for site in left if site.name not in removed]
    for (name, axis), index in kept_indices(plan, kept_sites).items():
        module: Any = model.get_submodule(name)
        if isinstance(module, LoraLayer):
            for adapter in (module.lora_B if axis == ROWS else module.lora_A).values():
                _keep_in_linear(adapter, index, axis)
            setattr(module, "out_features" if axis == ROWS else "in_features", len(index))
            module = module.get_base_layer()
        _keep_in_linear(module, index, axis)
    for site in reversed(kept_sites):  # inner ones first: their parent groups are counted as in the dense model
        for param in site.weights.params:
            _keep_in_parameter(model, param, site, plan.kept[site.name])
    if (hidden := hidden_site(kept_sites)) and len(plan.kept[hidden.name]) < hidden.units:
        for removed_module in model.modules():
            if isinstance(removed_module, RemovedLinear) and removed_module.rows == hidden.units:
                removed_module.rows = len(plan.kept[hidden.name])
        set_hidden_size(model, hidden, plan.kept[hidden.name])
    for layer in {site.layer for site in kept_sites} - {ALL_LAYERS}:
        by_kind = {site.kind: site for site in kept_sites if site.layer == layer}
        _update_head_counts(model, head_counts(model.config, layer), by_kind, plan)
        _update_expert_counts(model, by_kind, plan)


def _update_head_counts(model: Any, dense: HeadCounts, by_kind: Mapping[UnitKind, Site], plan: Plan) -> None:
    """Set the numbers of heads that a layer's attention module holds, `dense` before any cut."""
    kept = {kind: len(plan.kept[site.name]) for kind, site in by_kind.items() if kind.is_head}
    if not kept:
        return
    groups = kept.get(UnitKind.KV_GROUP, dense.kv_heads)
    queries = kept.get(UnitKind.QUERY_HEAD, groups * dense.queries_per_kv_head)
    attention = model.get_submodule(by_kind[next(iter(kept))].name.partition(":")[0])
    if queries != groups * dense.queries_per_kv_head:
        attention.num_key_value_groups = queries // groups
    producers = [producer for kind in kept for producer in by_kind[kind].producers]
    is_fused = any(len(producer.part_sizes) > 1 or producer.total_rows for producer in producers)
    if is_fused and (groups, queries) != (dense.kv_heads, dense.query_heads):
        # The forward splits a fused projection by the configuration's numbers of heads, see `modeling_phi3`.
        attention.config = LayerConfigOverride(attention.config, num_attention_heads=queries)
        attention.num_key_value_heads = groups


def _update_expert_counts(model: nn.Module, by_kind: Mapping[UnitKind, Site], plan: Plan) -> None:
    """Set the numbers of experts, and their width, that a layer's router and fused experts hold."""
    if site := by_kind.get(UnitKind.EXPERT):
        for name in {param.parameter.rpartition(".")[0] for param in site.weights.params}:
            module: Any = model.get_submodule(name)
            module.num_experts = len(plan.kept[site.name])
    if site := by_kind.get(UnitKind.EXPERT_CHANNEL):
        experts: Any = model.get_submodule(site.gated_module)
        shape = experts.down_proj.shape
        experts.num_experts, width = shape[0], shape[down_proj_slice(site).axis]
        for name in ("intermediate_dim", "intermediate_size"):
            if hasattr(experts, name):
                setattr(experts, name, width)


def _keep_in_linear(linear: Any, index: Tensor, axis: int) -> None:
    if isinstance(linear, NF4Linear):
        linear.keep_indices(index.to(linear.packed.device), axis)
        return
    index = index.to(linear.weight.device)
    linear.weight = _selected(linear.weight, index, stored_axis(linear, axis))
    if axis == ROWS and linear.bias is not None:
        linear.bias = _selected(linear.bias, index, 0)
    set_axis_size(linear, axis, len(index))


def _selected(parameter: nn.Parameter, index: Tensor, axis: int) -> nn.Parameter:
    kept = parameter.detach().index_select(axis, index).contiguous()
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def _keep_in_parameter(model: nn.Module, param: ParamSlice, site: Site, kept: Sequence[int]) -> None:
    """Keep the entries of a parameter that belong to kept units; parent groups without a kept unit leave whole."""
    module_name, _, name = param.parameter.rpartition(".")
    module: Any = model.get_submodule(module_name)
    parameter = getattr(module, name)
    if param.parent_groups == 1:
        index = param.indices(kept, site.units).to(parameter.device)
        setattr(module, name, _selected(parameter, index, param.axis))
        return
    kept_by_group: dict[int, list[int]] = {}
    for unit in kept:
        kept_by_group.setdefault(unit // site.units_per_group, []).append(unit % site.units_per_group)
    groups = []
    for group, units in kept_by_group.items():
        index = param.indices(units, site.units_per_group).to(parameter.device)
        groups.append(parameter.detach()[group].index_select(param.axis - 1, index))
    setattr(module, name, nn.Parameter(torch.stack(groups), requires_grad=parameter.requires_grad))


@torch.no_grad()
def merge_adapters(model: nn.Module, *, trainable: bool = False) -> None:
    """Add every LoRA adapter to its base weight (sum in float32, stored in the base's dtype), in place.

    With `trainable`, sums stay float32, as small updates need, and get gradients. A base in 4 bits becomes an ordinary
    linear.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        base: Any = module.get_base_layer()
        base = base.dequantize() if isinstance(base, NF4Linear) else base
        if trainable:
            # A copy even where it is float32 already: a teacher may share the weight, see `teacher_student_weights`.
            base.weight = nn.Parameter(base.weight.to(torch.float32, copy=True), requires_grad=True)
        for adapter, lora_a in module.lora_A.items():
            add_adapter(base, base.weight.data, lora_a.weight, module.lora_B[adapter].weight, module.scaling[adapter])
        replace_module(model, name, base)


def finalize_adapters(model: Any) -> None:
    """Prepare a tuned model for inference, in place: merge its adapters, or keep them on a base in 4 bits.

    Kept adapters get the dtype of the model's arithmetic, and need no autocast any more.
    """
    if not has_nf4_linears(model):
        merge_adapters(model)
        return
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(model.dtype)


def add_adapter(linear: nn.Module, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> None:
    """Add scale * B A to a weight as this linear stores it, in place and in chunks, so that no second one is held."""
    a, b = lora_a.float(), lora_b.float()
    step = max(1, MERGE_CHUNK // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        left, right = (a[:, rows].t(), b.t()) if is_transposed(linear) else (b[rows], a)
        weight[rows] = torch.addmm(weight[rows].float(), left, right, alpha=scale).to(weight.dtype)


# -- whole blocks and layers -------------------------------------------------------------------------------------------


class RemovedAttention(nn.Module):
    """Replaces attention that has no KV group left: its output is zero, or a constant [hidden].

    It also replaces a mixture of experts that returns router scores: None stands for them.
    """

    def __init__(self, constant: Tensor | None = None) -> None:
        super().__init__()
        self.constant = None if constant is None else nn.Parameter(constant.detach().clone(), requires_grad=False)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[..., hidden] -> (zeros of the same shape, or the constant at each position; no attention weights)."""
        zeros = torch.zeros_like(hidden_states)
        return (zeros if self.constant is None else zeros + self.constant.to(zeros.dtype)), None


class ResidualPassthrough(nn.Module):
    """Replaces attention that takes the residual and returns the sum: Bloom's."""

    def forward(self, hidden_states: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """(The residual; no attention weights)."""
        return residual, None


class RemovedLinear(nn.Module):
    """Replaces a linear, or a mixture of experts: its output is zeros, as many as the next module reads."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., columns] -> zeros [..., rows]."""
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.rows)


def remove_block(model: Any, site: Site) -> None:
    """Empty a block, or both blocks of a layer, in place, so that nothing is added to the residual."""
    architecture = architecture_info(model)
    prefix, family = architecture.layer_prefixes[site.layer], architecture.family
    if site.kind.removes_attention:
        empty = ResidualPassthrough() if family.adds_residual else RemovedAttention()
        replace_module(model, f"{prefix}.{architecture.attention_name}", empty)
    if site.kind is UnitKind.ATTENTION_BLOCK:
        return
    mixture, layer = family.mixture, model.get_submodule(prefix)
    if mixture and hasattr(layer.get_submodule(mixture.block), mixture.experts.rpartition(".")[2]):
        zeros = RemovedLinear(model.config.get_text_config().hidden_size)
        replace_module(model, f"{prefix}.{mixture.block}", RemovedAttention() if mixture.returns_scores else zeros)
        return
    block = architecture.mlp
    assert block is not None
    for name in block.producers:
        replace_module(model, f"{prefix}.{name}", RemovedLinear(0))
    consumer = f"{prefix}.{block.consumer}"
    replace_module(model, consumer, RemovedLinear(axis_size(get_base_linear(model, consumer), ROWS)))


def remove_layers(model: Any, plan: Plan, sites: Iterable[Site]) -> None:
    """Remove the layers that the plan removes from the model's list and its configuration, in place."""
    sites = tuple(sites)
    total = model.config.get_text_config().num_hidden_layers
    kept_layers = list(surviving_layers(plan, sites))
    if not any(site.kind is UnitKind.LAYER for site in sites) or len(kept_layers) == total:
        return
    list_name = architecture_info(model).layer_prefixes[0].rpartition(".")[0]
    layers = [model.get_submodule(list_name)[index] for index in kept_layers]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(module.__dict__.get("layer_idx"), int):
                module.layer_idx = index
    replace_module(model, list_name, nn.ModuleList(layers))
    remove_layers_from_config(model.config.get_text_config(), kept_layers)


def remove_layers_from_config(config: Any, kept_layers: Sequence[int]) -> None:
    """Set the number of layers, and shorten every list with one entry a layer, in place."""
    total = config.num_hidden_layers
    if get_family(config).mixture and hasattr(config, "mlp_only_layers"):
        # Layers with experts are counted by their index, which changes: name those without experts instead.
        plain = [i for i in range(total) if i in config.mlp_only_layers or (i + 1) % config.decoder_sparse_step]
        config.mlp_only_layers = [new_index for new_index, index in enumerate(kept_layers) if index in plain]
        config.decoder_sparse_step = 1
    for name, value in list(vars(config).items()):
        if "layer" in name and name != "mlp_only_layers" and isinstance(value, list) and len(value) == total:
            setattr(config, name, [value[index] for index in kept_layers])
    overrides = config.to_dict().get("per_layer_config", {}) if config.is_heterogeneous else {}
    config.num_hidden_layers = len(kept_layers)
    if overrides:
        by_layer = {int(layer): values for layer, values in overrides.items()}
        config.per_layer_config = {new: by_layer.get(old, {}) for new, old in enumerate(kept_layers)}
