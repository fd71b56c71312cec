"""LoRA adapters on all seven linears, by peft; and how they shrink with the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.config.recipe import LoraSettings, TrainConfig
from prunetune.cost.parameters import prunable_params
from prunetune.errors import ModelError
from prunetune.plan import Plan
from prunetune.pruning.linears import COLUMNS, ROWS, get_base_linear, is_transposed, stored_axis
from prunetune.pruning.nf4 import NF4Linear
from prunetune.pruning.sites import lora_target_modules
from prunetune.pruning.units import Site, closed_fractions, kept_indices, removed_linears
from prunetune.train.checkpoints import TrainingState
from prunetune.train.lora_forward import use_fused_forward

ADAPTER_NAME = "default"
LARGE_MODEL_PARAMS = 10**9  # prunable parameters from which `train.weights: auto` leaves it at adapters


def add_adapters(model: nn.Module, sites: Sequence[Site], settings: LoraSettings, *, seed: int) -> None:
    """Wrap every producer and consumer in place (Hu et al. 2021); B starts at zero, so nothing changes yet.

    Adapters are float32 whatever the base's dtype: their updates are too small for 16 bits.
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
        layer.cast_input_dtype_enabled = False  # autocast does it, see `objectives`
        use_fused_forward(layer, ADAPTER_NAME)
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in trainable_parameters(model).items():
        values = torch.zeros(parameter.shape)
        if ".lora_A." in name:  # peft's initialisation, from a generator of our own
            bound = parameter.shape[1] ** -0.5
            values.uniform_(-bound, bound, generator=rng)
        parameter.data = values.to(parameter.device)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is tuned, by name, in the model's order: all adapter weights; once merged, all that has a gradient."""
    named = dict(model.named_parameters())
    found = {name: parameter for name, parameter in named.items() if ".lora_" in name}
    return found or {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def trains_all_weights(train: TrainConfig, sites: Iterable[Site]) -> bool:
    """Whether all weights are tuned once the model is cut. A matter of the model's size, never of the machine."""
    return train.weights == "all" or (train.weights == "auto" and prunable_params(sites) < LARGE_MODEL_PARAMS)


@contextmanager
def lora_dropout_enabled(model: nn.Module) -> Iterator[None]:
    """For the block, adapters' inputs are dropped out as `lora.dropout` says; a model's own dropout stays off."""
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
    """For the block, adapters need no gradient."""
    weights = list(trainable_parameters(model).values())
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def cut_adapter_tensors(state: Mapping[str, Tensor], plan: Plan, sites: Iterable[Site]) -> dict[str, Tensor]:
    """Adapter-shaped tensors {adapter name: tensor} as the cut leaves them; those of vanished blocks are dropped."""
    sites, result = tuple(sites), dict(state)
    for (module, axis), index in kept_indices(plan, sites).items():
        name = _name(module, axis)
        if name in result:
            result[name] = result[name].index_select(axis, index.to(result[name].device)).contiguous()
    for module in removed_linears(plan, sites):
        for axis in (ROWS, COLUMNS):
            result.pop(_name(module, axis), None)
    return result


def expand_adapter_tensors(
    state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], plan: Plan, sites: Iterable[Site]
) -> dict[str, Tensor]:
    """The inverse of `cut_state`: dense shapes again, zero where a unit is gone."""
    result = {name: state.get(name, torch.zeros(shape)) for name, shape in shapes.items()}
    for (module, axis), index in kept_indices(plan, sites).items():
        name = _name(module, axis)
        if name in state:
            result[name] = torch.zeros(shapes[name]).index_copy(axis, index, state[name])
    return result


def load_into_dense(model: nn.Module, state: TrainingState, sites: Sequence[Site], train: TrainConfig) -> None:
    """Put what a state holds on the dense model with its adapters, in place; zero for removed units.

    Weights that adapters were merged into take the dense ones' place in float32, as they were tuned, and the adapters
    stay empty.
    """
    weights = state.tensors["adapters"]
    if state.is_cut and trains_all_weights(train, sites):
        assert state.plan is not None
        expand_weights(model, weights, state.plan, sites, torch.float32)
        return
    named = trainable_parameters(model)
    if state.is_cut:
        assert state.plan is not None
        weights = expand_adapter_tensors(weights, {name: each.shape for name, each in named.items()}, state.plan, sites)
    for name, parameter in named.items():
        parameter.data = weights[name].to(parameter.device)


def expand_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    plan: Plan,
    sites: Iterable[Site],
    dtype: torch.dtype | None = None,
) -> None:
    """Put weights of a cut model into the dense one, in place; what belongs to removed units becomes zero.

    They are stored in the dense model's dtype where no other is given. Linears in 4 bits become ordinary ones.
    """
    lines = kept_indices(plan, sites)
    for name, weight in state.items():
        linear = _writable(model, name.removesuffix(".weight"))
        for axis in (ROWS, COLUMNS):
            index = lines.get((name.removesuffix(".weight"), axis))
            if index is not None:
                place = stored_axis(linear, axis)
                shape = [*weight.shape[:place], linear.weight.shape[place], *weight.shape[place + 1 :]]
                weight = torch.zeros(shape, dtype=weight.dtype).index_copy(place, index, weight)
        linear.weight.data = weight.to(linear.weight.device, dtype or linear.weight.dtype)


def _writable(model: nn.Module, name: str) -> Any:
    """The linear of that name, an ordinary one: the weights of one in 4 bits cannot be set."""
    linear = get_base_linear(model, name)
    if not isinstance(linear, NF4Linear):
        return linear
    wrapped = hasattr(model.get_submodule(name), "base_layer")
    parent, _, child = (f"{name}.base_layer" if wrapped else name).rpartition(".")
    plain = linear.dequantize()
    setattr(model.get_submodule(parent), child, plain)
    return plain


def _name(module: str, axis: int) -> str:
    """The adapter weight that rows (B) or columns (A) of a linear are of."""
    return f"{module}.{'lora_B' if axis == ROWS else 'lora_A'}.{ADAPTER_NAME}.weight"


def _adapter_weight_rows(model: Any, module: str, axis: int) -> Tensor:
    """That weight, with its rows or columns first."""
    weight: Tensor = model.get_parameter(_name(module, axis))
    return weight if axis == ROWS else weight.t()


def adapter_group_norms(model: Any, site: Site) -> Tensor:
    """L2 norm of everything the adapters hold for each unit of a site: [U].

    Rows of B where the unit is produced, columns of A where it is consumed (ATP, section 3.3).
    """
    squares = torch.zeros((), device=next(model.parameters()).device)
    for cut, axis in site.linear_slices():
        lines = _adapter_weight_rows(model, cut.module, axis)
        squares = squares + cut.sum_per_unit(lines.square() if axis == ROWS else lines.t().square().sum(0), site.units)
    norms: Tensor = (squares + 1e-12).sqrt()
    return norms


@torch.no_grad()
def soft_threshold(model: Any, gates: Mapping[str, Tensor], sites: Sequence[Site], threshold: float) -> None:
    """Take `threshold` off the norm of each closed unit's adapter parts, in place; none falls below zero.

    The proximal step of the group lasso (Yuan and Lin 2006), on the groups of `group_norms`: the alternative to the
    penalty of ATP, section 3.3. Parts of open units keep every bit.
    """
    shut = closed_fractions(gates, sites)
    for site in sites:
        if not site.has_linear_slices:
            continue
        taken = (threshold / adapter_group_norms(model, site)).clamp(max=1)
        scale = 1 - shut[site.name] * taken
        for cut, axis in site.linear_slices():
            _adapter_weight_rows(model, cut.module, axis).mul_(cut.expand_to_rows(scale)[:, None])
