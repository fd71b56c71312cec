"""Memory of a training run: weights are exact, and activations near those that autograd keeps."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from prunetune.config.recipe import from_mapping
from prunetune.cost.training_memory import TrainingSetup, estimate_memory, training_setup, training_shapes
from prunetune.data.encoding import Example
from prunetune.pipeline.prepare import estimate_peak_memory, log_memory_estimate
from prunetune.pruning.cut import merge_adapters
from prunetune.pruning.sites import find_sites
from prunetune.search.searcher import DecisionGenerator
from prunetune.train.adapters import add_adapters, trainable_parameters
from prunetune.train.forward import Teacher
from prunetune.train.passes import PaddedPasses
from support.memory import LENGTH, SIZES, LiveMemoryCounter, build_model, config_of, skip_without_bitsandbytes
from support.models import tiny


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("quantize", ["off", "nf4"])
def test_weights_and_trained_parameters_are_exact(quantize: str) -> None:
    skip_without_bitsandbytes(quantize)
    config = config_of(quantize=quantize)
    plain_model, (model, sites) = tiny(**SIZES), build_model(config, torch.bfloat16)
    estimate = estimate_memory(
        training_shapes(plain_model, sites), training_setup(config, torch.bfloat16, longest=LENGTH), phase="search"
    )
    tensors = [*model.parameters(), *(tensor for name, tensor in model.named_buffers() if "inv_freq" not in name)]
    assert estimate.weights == size(tensors)
    assert estimate.teacher == 0
    add_adapters(model, sites, config.lora, seed=0)
    assert estimate.tuned == 4 * size(trainable_parameters(model).values())  # itself, its gradient, two moments
    generator = DecisionGenerator(sites, seed=0)
    assert estimate.generator == pytest.approx(4 * size(generator.parameters()), rel=0.05)


def test_scored_model_holds_adapters_without_gradients_and_no_generator() -> None:
    config = config_of(method="progressive")
    plain_model, (model, sites) = tiny(**SIZES), build_model(config, torch.bfloat16)
    setup = training_setup(config, torch.bfloat16, longest=LENGTH, all_weights=True)
    estimate = estimate_memory(training_shapes(plain_model, sites), setup, phase="scores")
    add_adapters(model, sites, config.lora, seed=0)
    assert estimate.tuned == size(trainable_parameters(model).values())
    assert estimate.generator == 0


CASES: list[tuple[torch.dtype, dict[str, str]]] = [
    (torch.float32, {}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"checkpointing": "on"}),
    (torch.bfloat16, {"quantize": "nf4", "checkpointing": "off"}),
    (torch.bfloat16, {"quantize": "nf4", "checkpointing": "auto"}),
    (torch.bfloat16, {"teacher": "base"}),
    (torch.bfloat16, {"weights": "all"}),
]


@pytest.mark.parametrize(("dtype", "changes"), CASES)
def test_activations_are_near_those_held(dtype: torch.dtype, changes: dict[str, str]) -> None:
    skip_without_bitsandbytes(changes.get("quantize", "off"))
    merged = changes.get("weights") == "all"
    config = config_of(**{name: value for name, value in changes.items() if name != "weights"})
    plain_model, (model, sites) = tiny(**SIZES), build_model(config, dtype)
    teacher = Teacher(build_model(config, dtype)[0]) if "teacher" in changes else None
    add_adapters(model, sites, config.lora, seed=0)
    if merged:
        merge_adapters(model, trainable=True)
    passes, gates = (
        PaddedPasses(model, sites, 0, config, teacher),
        {site.name: torch.ones(site.units) for site in sites},
    )
    batch = [Example(tuple(range(3, 3 + LENGTH)), 1, "row")]

    def run() -> None:
        passes.tune(batch, None if merged else gates)

    run()  # gradients have their place
    with LiveMemoryCounter() as live:
        run()
    setup = training_setup(config, dtype, longest=LENGTH, all_weights=merged)
    shapes = training_shapes(plain_model, sites)
    estimate = estimate_memory(shapes, setup, phase="tune" if merged else "search")
    beside = estimate.teacher - estimate_memory(shapes, replace(setup, distills_hidden=False), phase="search").teacher
    assert 0.85 * live.peak < estimate.activations + estimate.passing + beside < 1.2 * live.peak


def test_estimate_grows_and_shrinks_with_its_parts() -> None:
    plain_model = tiny(**SIZES)
    shapes, setup = (
        training_shapes(plain_model, find_sites(plain_model)),
        TrainingSetup(dtype_bytes=2, tokens=512, rank=8, keep=0.5),
    )

    def total(phase: Any = "search", **changes: Any) -> int:
        return estimate_memory(shapes, replace(setup, **changes), phase=phase).total

    assert total("tune") < total()
    assert total(recompute=True) < total() < total(teacher=True) < total(teacher=True, distills_hidden=True)
    assert total(quantize="nf4") < total() < total(rank=64)
    assert total(tokens=1024) > total()
    assert total("tune", all_weights=True) > total("tune")
    assert total("scores", keep=1.0) < total("search", keep=1.0) < total("search", uses_generator=True)
    assert total("scores", keep=0.5, all_weights=True) == total("tune", all_weights=True)


def test_tokens_of_a_pass_follow_the_recipe() -> None:
    config = from_mapping({"train": {"batch_size": 4, "micro_tokens": 1000}})
    lengths = {longest: training_setup(config, torch.bfloat16, longest=longest).tokens for longest in (100, 400, 3000)}
    assert lengths == {100: 400, 400: 1000, 3000: 3000}  # a longer example has a pass of its own
    for share, tokens in (
        (0.5, 200),
        (0.7, 300),
        (0.2, 300),
        (1, 400),
    ):  # rows that a teacher sees have passes of their own
        config = from_mapping({"train": {"batch_size": 4}, "distill": {"share": share}})
        assert training_setup(config, torch.bfloat16, longest=100).tokens == tokens


def test_memory_estimate_is_logged_with_a_warning_if_it_does_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    plain_model = tiny(**SIZES)
    sites = find_sites(plain_model)
    config = from_mapping({"train": {"weights": "all"}, "lora": {"rank": 4}, "distill": {"teacher": "none"}})
    estimate = estimate_peak_memory(plain_model, sites, config, torch.bfloat16, longest=LENGTH)
    setup = training_setup(config, torch.bfloat16, longest=LENGTH, all_weights=True)
    shapes = training_shapes(plain_model, sites)
    scores = estimate_memory(shapes, replace(setup, keep=1.0), phase="scores")
    kept = 1 - (1 - config.budget.keep) / config.search.cuts  # after the first cut
    first_stage = estimate_memory(shapes, replace(setup, keep=kept), phase="tune")
    assert estimate == max(scores, first_stage, key=lambda memory: memory.total)
    assert first_stage.total > estimate_memory(shapes, setup, phase="tune").total, "later stages take less"
    with caplog.at_level(logging.INFO):
        log_memory_estimate(replace(estimate, weights=2 * 10**9), 80 * 10**9)
        assert re.fullmatch(r"memory: about 2\.\d GB of 80\.0 \(weights 2\.0.*\)", caplog.messages[-1])
        log_memory_estimate(replace(estimate, weights=90 * 10**9), 80 * 10**9)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]
    assert "lora.quantize nf4" in caplog.messages[-1]
