"""LoRA adapters on all seven linears, by peft; and how they shrink with the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.config import LoraSettings
from prunetune.model.sites import Site
from prunetune.plan import Plan

NAME = "default"


def add_adapters(model: nn.Module, sites: Sequence[Site], settings: LoraSettings, *, seed: int) -> None:
    """Wrap every producer and consumer in place (Hu et al. 2021); B starts at zero, so nothing changes yet.

    Adapters are float32 whatever the base's dtype: their updates are too small for 16 bits.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = [cut.module for site in sites for cut in (*site.producers, site.consumer)]
    alpha = settings.alpha or 2 * settings.rank
    config = LoraConfig(r=settings.rank, lora_alpha=alpha, lora_dropout=settings.dropout, target_modules=targets)
    inject_adapter_in_model(config, model)
    model.eval()  # new modules start in training mode, and their dropout would reach the search
    for site in sites:
        for cut in (*site.producers, site.consumer):
            layer: Any = model.get_submodule(cut.module)
            layer.cast_input_dtype_enabled = False  # autocast does it, see `objectives`
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in adapters(model).items():
        parameter.data = parameter.data.float()
        if ".lora_A." in name:  # peft's initialisation, from a generator of our own
            bound = parameter.shape[1] ** -0.5
            parameter.data.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=rng))


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All adapter weights by name, in the model's order."""
    named = dict(model.named_parameters())
    found = {name: parameter for name, parameter in named.items() if ".lora_" in name}
    return found or {name: parameter for name, parameter in named.items() if parameter.requires_grad}


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
    result = dict(state)
    for site in sites:
        kept = plan.kept[site.name]
        for cut, part, axis in [*((cut, "lora_B", 0) for cut in site.producers), (site.consumer, "lora_A", 1)]:
            name = f"{cut.module}.{part}.{NAME}.weight"
            if not kept:
                for gone in ("lora_A", "lora_B"):
                    result.pop(f"{cut.module}.{gone}.{NAME}.weight", None)
            elif name in result:
                index = cut.indices(kept, site.units).to(result[name].device)
                result[name] = result[name].index_select(axis, index).contiguous()
    return result


def grow_state(
    state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], plan: Plan, sites: Iterable[Site]
) -> dict[str, Tensor]:
    """The inverse of `cut_state`: dense shapes again, zero where a unit is gone."""
    result = {name: state.get(name, torch.zeros(shape)) for name, shape in shapes.items()}
    for site in sites:
        kept = plan.kept[site.name]
        for cut, part, axis in [*((cut, "lora_B", 0) for cut in site.producers), (site.consumer, "lora_A", 1)]:
            name = f"{cut.module}.{part}.{NAME}.weight"
            if kept and name in state:
                result[name] = torch.zeros(shapes[name]).index_copy(axis, cut.indices(kept, site.units), state[name])
    return result


def group_norms(model: Any, site: Site) -> Tensor:
    """L2 norm of everything the adapters hold for each unit of a site: [U].

    Rows of B where the unit is produced, columns of A where it is consumed (ATP, section 3.3).
    """
    squares = torch.zeros((), device=next(model.parameters()).device)
    for cut in site.producers:
        rows = model.get_submodule(cut.module).lora_B[NAME].weight
        squares = squares + cut.summed(rows.square(), site.units)
    columns = model.get_submodule(site.consumer.module).lora_A[NAME].weight
    squares = squares + site.consumer.summed(columns.square().sum(0), site.units)
    norms: Tensor = (squares + 1e-12).sqrt()
    return norms


@torch.no_grad()
def soft_threshold(model: Any, gates: Mapping[str, Tensor], sites: Iterable[Site], threshold: float) -> None:
    """Take `threshold` off the norm of each closed unit's adapter parts, in place; none falls below zero.

    The proximal step of the group lasso (Yuan and Lin 2006), on the groups of `group_norms`: the alternative to the
    penalty of ATP, section 3.3. Parts of open units keep every bit.
    """
    for site in sites:
        taken = (threshold / group_norms(model, site)).clamp(max=1)
        scale = 1 - (1 - gates[site.name]) * taken
        for cut in site.producers:
            rows = model.get_submodule(cut.module).lora_B[NAME].weight
            rows.mul_(cut.spread(scale)[:, None])
        columns = model.get_submodule(site.consumer.module).lora_A[NAME].weight
        columns.mul_(site.consumer.spread(scale))
