"""LoRA adapters on all seven linears, by peft; and how they shrink with the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.config.recipe import LoraSettings, TrainConfig
from prunetune.cost.parameters import total
from prunetune.errors import ModelError
from prunetune.plan import Plan
from prunetune.pruning.linears import COLUMNS, ROWS, is_transposed, linear_of, stored_axis
from prunetune.pruning.nf4 import FourBitLinear
from prunetune.pruning.sites import tuned_linears
from prunetune.pruning.units import Site, closed, gone_linears, kept_lines
from prunetune.train.checkpoints import State
from prunetune.train.lora_forward import simplify

NAME = "default"
LARGE = 10**9  # prunable parameters from which `train.weights: auto` leaves it at adapters


def add_adapters(model: nn.Module, sites: Sequence[Site], settings: LoraSettings, *, seed: int) -> None:
    """Wrap every producer and consumer in place (Hu et al. 2021); B starts at zero, so nothing changes yet.

    Adapters are float32 whatever the base's dtype: their updates are too small for 16 bits.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = tuned_linears(model)
    if not targets:
        raise ModelError("no linear of this model can be tuned: its attention stays whole, and its experts are frozen")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=is_transposed(linear_of(model, targets[0])),
        init_lora_weights=False,  # drawn below
    )
    inject_adapter_in_model(config, model)
    model.eval()  # new modules start in training mode, and their dropout would reach the search
    for name in targets:
        layer: Any = model.get_submodule(name)
        layer.cast_input_dtype_enabled = False  # autocast does it, see `objectives`
        simplify(layer, NAME)
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in adapters(model).items():
        values = torch.zeros(parameter.shape)
        if ".lora_A." in name:  # peft's initialisation, from a generator of our own
            bound = parameter.shape[1] ** -0.5
            values.uniform_(-bound, bound, generator=rng)
        parameter.data = values.to(parameter.device)


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is tuned, by name, in the model's order: all adapter weights; once merged, all that has a gradient."""
    named = dict(model.named_parameters())
    found = {name: parameter for name, parameter in named.items() if ".lora_" in name}
    return found or {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def tunes_all(train: TrainConfig, sites: Iterable[Site]) -> bool:
    """Whether all weights are tuned once the model is cut. A matter of the model's size, never of the machine."""
    return train.weights == "all" or (train.weights == "auto" and total(sites) < LARGE)


@contextmanager
def dropping(model: nn.Module) -> Iterator[None]:
    """For the block, adapters' inputs are dropped out as `lora.dropout` says; a model's own dropout stays off."""
    layers = [module for name, module in model.named_modules() if name.endswith(f".lora_dropout.{NAME}")]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """For the block, adapters need no gradient."""
    weights = list(adapters(model).values())
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def cut_state(state: Mapping[str, Tensor], plan: Plan, sites: Iterable[Site]) -> dict[str, Tensor]:
    """Adapter-shaped tensors {adapter name: tensor} as the cut leaves them; those of vanished blocks are dropped."""
    sites, result = tuple(sites), dict(state)
    for (module, axis), index in kept_lines(plan, sites).items():
        name = _name(module, axis)
        if name in result:
            result[name] = result[name].index_select(axis, index.to(result[name].device)).contiguous()
    for module in gone_linears(plan, sites):
        for axis in (ROWS, COLUMNS):
            result.pop(_name(module, axis), None)
    return result


def grow_state(
    state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], plan: Plan, sites: Iterable[Site]
) -> dict[str, Tensor]:
    """The inverse of `cut_state`: dense shapes again, zero where a unit is gone."""
    result = {name: state.get(name, torch.zeros(shape)) for name, shape in shapes.items()}
    for (module, axis), index in kept_lines(plan, sites).items():
        name = _name(module, axis)
        if name in state:
            result[name] = torch.zeros(shapes[name]).index_copy(axis, index, state[name])
    return result


def put_back(model: nn.Module, state: State, sites: Sequence[Site], train: TrainConfig) -> None:
    """Put what a state holds on the dense model with its adapters, in place; zero for removed units.

    Weights that adapters were merged into take the dense ones' place in float32, as they were tuned, and the adapters
    stay empty.
    """
    weights = state.tensors["adapters"]
    if state.is_cut and tunes_all(train, sites):
        assert state.plan is not None
        grow_weights(model, weights, state.plan, sites, torch.float32)
        return
    named = adapters(model)
    if state.is_cut:
        assert state.plan is not None
        weights = grow_state(weights, {name: each.shape for name, each in named.items()}, state.plan, sites)
    for name, parameter in named.items():
        parameter.data = weights[name].to(parameter.device)


def grow_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    plan: Plan,
    sites: Iterable[Site],
    dtype: torch.dtype | None = None,
) -> None:
    """Put weights of a cut model into the dense one, in place; what belongs to removed units becomes zero.

    They are stored in the dense model's dtype where no other is given. Linears in 4 bits become ordinary ones.
    """
    lines = kept_lines(plan, sites)
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
    linear = linear_of(model, name)
    if not isinstance(linear, FourBitLinear):
        return linear
    wrapped = hasattr(model.get_submodule(name), "base_layer")
    parent, _, child = (f"{name}.base_layer" if wrapped else name).rpartition(".")
    plain = linear.plain()
    setattr(model.get_submodule(parent), child, plain)
    return plain


def _name(module: str, axis: int) -> str:
    """The adapter weight that rows (B) or columns (A) of a linear are of."""
    return f"{module}.{'lora_B' if axis == ROWS else 'lora_A'}.{NAME}.weight"


def _lines(model: Any, module: str, axis: int) -> Tensor:
    """That weight, with its rows or columns first."""
    weight: Tensor = model.get_parameter(_name(module, axis))
    return weight if axis == ROWS else weight.t()


def group_norms(model: Any, site: Site) -> Tensor:
    """L2 norm of everything the adapters hold for each unit of a site: [U].

    Rows of B where the unit is produced, columns of A where it is consumed (ATP, section 3.3).
    """
    squares = torch.zeros((), device=next(model.parameters()).device)
    for cut, axis in site.cuts():
        lines = _lines(model, cut.module, axis)
        squares = squares + cut.summed(lines.square() if axis == ROWS else lines.t().square().sum(0), site.units)
    norms: Tensor = (squares + 1e-12).sqrt()
    return norms


@torch.no_grad()
def soft_threshold(model: Any, gates: Mapping[str, Tensor], sites: Sequence[Site], threshold: float) -> None:
    """Take `threshold` off the norm of each closed unit's adapter parts, in place; none falls below zero.

    The proximal step of the group lasso (Yuan and Lin 2006), on the groups of `group_norms`: the alternative to the
    penalty of ATP, section 3.3. Parts of open units keep every bit.
    """
    shut = closed(gates, sites)
    for site in sites:
        if not site.is_sliced:
            continue
        taken = (threshold / group_norms(model, site)).clamp(max=1)
        scale = 1 - shut[site.name] * taken
        for cut, axis in site.cuts():
            _lines(model, cut.module, axis).mul_(cut.spread(scale)[:, None])
