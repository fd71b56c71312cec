"""LoRA adapters on all linears of attention and MLP, by peft: adding, freezing, cutting and expanding them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.config.recipe import LoraSettings
from prunetune.errors import ModelError
from prunetune.plan import Plan
from prunetune.pruning.linears import COLUMNS, ROWS, axis_size, get_base_linear, is_transposed, stored_axis
from prunetune.pruning.sites import lora_target_modules
from prunetune.pruning.units import Site, hidden_site, kept_indices, removed_linears, without_removed_modules
from prunetune.train.lora_forward import use_fused_forward

ADAPTER_NAME = "default"
SMOOTHING = 1e-8  # added to the square of a norm, so that it has a gradient at zero (ATP, authors' code)
LARGE_MODEL_PARAMS = 10**9  # prunable parameters from which `auto` means: adapters only (see `resolve_auto`)


def add_adapters(model: nn.Module, sites: Sequence[Site], settings: LoraSettings, *, seed: int) -> None:
    """Wrap every producer and consumer in place (Hu et al. 2021); B starts at zero, so nothing changes yet.

    Adapters are float32 whatever the base's dtype: their updates are too small for 16 bits. Raises `ModelError` if the
    model has no linear to tune.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = lora_target_modules(model)
    if not targets:
        raise ModelError("no linear of this model can be tuned: its attention stays whole, and its experts are frozen")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=is_transposed(get_base_linear(model, targets[0])),
        init_lora_weights=False,  # drawn below
    )
    inject_adapter_in_model(config, model)
    model.eval()  # new modules start in training mode, and their dropout would reach the search
    for name in targets:
        layer: Any = model.get_submodule(name)
        layer.cast_input_dtype_enabled = False  # autocast does it, see `forward.autocast`
        use_fused_forward(layer, ADAPTER_NAME)
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in trainable_parameters(model).items():
        values = torch.zeros(parameter.shape)
        if ".lora_A." in name:  # peft's initialisation, from a generator of our own
            bound = parameter.shape[1] ** -0.5
            values.uniform_(-bound, bound, generator=rng)
        parameter.data = values.to(parameter.device)


def copy_adapters(model: nn.Module, adapters: Mapping[str, Tensor]) -> None:
    """Let a model's adapters begin as others of at most their rank and of the same scale, {name: A or B}, in place."""
    named = trainable_parameters(model)
    for name, weight in adapters.items():
        named[name].data[: weight.shape[0], : weight.shape[1]] = weight


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights that are tuned, by name, in the model's order: adapters, and all that require a gradient."""
    return {name: weight for name, weight in model.named_parameters() if ".lora_" in name or weight.requires_grad}


@contextmanager
def lora_dropout_enabled(model: nn.Module) -> Iterator[None]:
    """For the block, `lora.dropout` acts on the adapters' inputs; the model's own dropout is off."""
    layers = [module for name, module in model.named_modules() if name.endswith(f".lora_dropout.{ADAPTER_NAME}")]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()


@contextmanager
def frozen_adapters(model: Any) -> Iterator[None]:
    """For the block, adapters require no gradient."""
    weights = list(trainable_parameters(model).values())
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def cut_tensors(model: nn.Module, state: Mapping[str, Tensor], plan: Plan, sites: Iterable[Site]) -> dict[str, Tensor]:
    """Tensors of the shapes of adapters or weights, {name: tensor}, after a cut; those of removed blocks are left out.

    The model tells how its weights are stored, and may be cut already.
    """
    sites, result = tuple(sites), dict(state)
    for name, dim, index, _ in _kept_entries(model, plan, sites):
        if name in result:
            result[name] = result[name].index_select(dim, index.to(result[name].device)).contiguous()
    for module in removed_linears(plan, sites):
        for name in (_weight_name(module, ROWS), _weight_name(module, COLUMNS), f"{module}.weight"):
            result.pop(name, None)
    return result


def expand_tensors(
    dense: nn.Module, state: Mapping[str, Tensor], plan: Plan, sites: Iterable[Site]
) -> dict[str, Tensor]:
    """The inverse of `cut_tensors`: the dense model's shapes again, zero for removed units, none for removed blocks."""
    result = dict(state)
    for name, dim, index, size in _kept_entries(dense, plan, sites):
        if name in result:
            cut = result[name]
            result[name] = cut.new_zeros(*cut.shape[:dim], size, *cut.shape[dim + 1 :]).index_copy(dim, index, cut)
    return result


def _kept_entries(model: nn.Module, plan: Plan, sites: Iterable[Site]) -> Iterator[tuple[str, int, Tensor, int]]:
    """(name, axis, kept entries along it, entries in the model) of each adapter and weight that a cut shortens."""
    sites = tuple(sites)
    if (hidden := hidden_site(without_removed_modules(sites, plan))) and len(plan.kept[hidden.name]) < hidden.units:
        index = torch.tensor(plan.kept[hidden.name])
        for param in hidden.weights.params:
            yield param.parameter, param.axis, index, hidden.units
    for (module, axis), index in kept_indices(plan, sites).items():
        linear = get_base_linear(model, module)
        yield _weight_name(module, axis), axis, index, axis_size(linear, axis)
        yield f"{module}.weight", stored_axis(linear, axis), index, axis_size(linear, axis)


def _weight_name(module: str, axis: int) -> str:
    """The adapter weight for a linear's rows (B) or columns (A)."""
    return f"{module}.{'lora_B' if axis == ROWS else 'lora_A'}.{ADAPTER_NAME}.weight"


def adapter_norms(model: Any, site: Site) -> Tensor:
    """Per unit of a site, the sum of the L2 norms of its pieces of the adapters: [U].

    A piece is a row of B where the unit is produced, or a column of A where it is consumed (ATP, authors' code).
    """
    sums = torch.zeros(site.units, device=next(model.parameters()).device)
    for linear_slice, axis in site.linear_slices():
        weight = model.get_parameter(_weight_name(linear_slice.module, axis))
        norms = (weight.square().sum(1 - axis) + SMOOTHING).sqrt()
        sums = sums + linear_slice.sum_per_unit(norms, site.units)
    return sums
