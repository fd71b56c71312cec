"""FLOPs of a training step: the estimate is near what torch counts."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from prunetune.cost.training_memory import training_setup, training_shapes
from prunetune.data.encoding import Example
from prunetune.pruning.cut import merge_adapters
from prunetune.pruning.sites import find_sites
from prunetune.train.adapters import add_adapters
from prunetune.train.forward import Teacher
from prunetune.train.passes import PaddedPasses
from support.memory import LENGTH, SIZES, build_model, config_of, skip_without_bitsandbytes, tiny

FILE = Path(__file__).parents[2] / "benchmarks" / "training_flops.py"
SPEC = importlib.util.spec_from_file_location("training_flops", FILE)
assert SPEC is not None and SPEC.loader is not None  # noqa: PT018
training_flops = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(training_flops)


class FlopCounter(TorchDispatchMode):
    """Sums torch's FLOPs of each operation; torch's own counter fails inside the gradient of a chunk."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        product = getattr(torch.ops.aten, func._overloadpacket.__name__.removesuffix("_"), None)  # addmm_ is one, too
        if product in flop_registry:
            self.total += flop_registry[product](*args, **(kwargs or {}), out_val=result)
        return result


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"checkpointing": "on"},
        {"teacher": "base"},
        {"teacher": "base", "share": "0.5"},
        {"weights": "all"},
        {"quantize": "nf4"},
    ],
)
def test_step_flops_are_near_those_torch_counts(changes: dict[str, str]) -> None:
    skip_without_bitsandbytes(changes.get("quantize", "off"))
    merged = changes.get("weights") == "all"
    config = config_of(**{name: value for name, value in changes.items() if name != "weights"})
    plain_model, (model, sites) = tiny(**SIZES), build_model(config, torch.float32)
    share = float(changes.get("share", 1))
    teacher = Teacher(build_model(config, torch.float32)[0], share=share) if "teacher" in changes else None
    add_adapters(model, sites, config.lora, seed=0)
    if merged:
        merge_adapters(model, trainable=True)
    passes, gates = (
        PaddedPasses(model, sites, 0, config, teacher),
        {site.name: torch.ones(site.units) for site in sites},
    )
    half = [Example(tuple(range(3, 3 + LENGTH)), LENGTH // 2, "row")] * 2

    def step() -> Any:
        if merged:
            return passes.tune(half, None)
        passes.gate_gradients(half, gates)
        return passes.tune(half, gates)

    with FlopCounter() as counter:
        step()
    setup = training_setup(config, torch.float32, longest=LENGTH, all_weights=merged)
    estimate = training_flops.step_flops(
        training_shapes(plain_model, find_sites(plain_model)),
        setup,
        phase="tune" if merged else "search",
        tokens=2 * LENGTH,
        length=0,  # torch does not count attention on a CPU
        label_share=0.5,
    )
    assert estimate == pytest.approx(counter.total, rel=0.03)


@pytest.mark.parametrize("merged", [False, True])
def test_flops_of_scores_are_near_those_torch_counts(merged: bool) -> None:
    """On the dense model with adapters, and with all weights on a cut one, here cut by nothing that counts."""
    config = config_of()
    plain_model, (model, sites) = tiny(**SIZES), build_model(config, torch.float32)
    add_adapters(model, sites, config.lora, seed=0)
    if merged:
        merge_adapters(model, trainable=True)
    passes, batch = PaddedPasses(model, sites, 0, config), [Example(tuple(range(3, 3 + LENGTH)), LENGTH // 2, "row")]
    with FlopCounter() as counter:
        passes.gate_gradients(batch, {site.name: torch.ones(site.units) for site in sites})
    setup = training_setup(config, torch.float32, longest=LENGTH, all_weights=merged)
    setup = replace(setup, keep=1 - 1e-9 if merged else 1.0)
    shapes = training_shapes(plain_model, find_sites(plain_model))
    estimate = training_flops.step_flops(shapes, setup, phase="scores", tokens=LENGTH, length=0, label_share=0.5)
    assert estimate == pytest.approx(counter.total, rel=0.03)


def test_attention_flops_grow_with_the_square_of_the_length() -> None:
    plain_model = tiny(**SIZES)
    shapes, setup = (
        training_shapes(plain_model, find_sites(plain_model)),
        training_setup(config_of(), torch.float32, longest=LENGTH),
    )
    without, once, twice = (
        training_flops.step_flops(shapes, setup, phase="search", tokens=512, length=length) for length in (0, 256, 512)
    )
    assert twice - without == 2 * (once - without) > 0
    read = SIZES["groups"] * 2 * SIZES["head_dim"] * SIZES["layers"]  # 2 queries a group
    assert once - without == 2 * 512 * 3 * (2 * 256 * read)  # passes, tokens, forward and backward
