"""What a dry run says of time and disk: FLOPs add up over cuts, sizes, trials and the dense model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune.cli.preview import render_dry_run
from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.cost.training_flops import step_flops
from prunetune.cost.training_memory import training_setup, training_shapes
from prunetune.model.loading import load_meta_model
from prunetune.pipeline.prepare import prepare
from prunetune.pipeline.time_estimate import product_flops_per_second, tuning_flops
from prunetune.utils.console import SilentConsole
from support.evaluation import write_model_and_rows


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_rows(tmp_path_factory.mktemp("source"), 24)


def config_of(workspace: Path, **changes: Any) -> RunConfig:
    values = {
        "model": str(workspace / "dense"),
        "out": str(workspace / "run"),
        "device": "cpu",
        "dtype": "float32",
        "data": {"train": str(workspace / "rows.jsonl")},
        "budget": {"align": 8},
        "train": {"steps": 40, "batch_size": 4, "weights": "adapters"},
        "distill": {"teacher": "none"},
        "evaluate": {"dense_tuned": False},
    }
    return from_mapping(merge_mappings(values, changes))


def flops_of(workspace: Path, **changes: Any) -> float:
    context = prepare(config_of(workspace, **changes), resume=False, console=SilentConsole())
    return tuning_flops(context, load_meta_model(context.config.model))


def test_flops_are_those_of_each_step_and_each_decision(workspace: Path) -> None:
    config = config_of(workspace, search={"cuts": 1, "init_batches": 3})
    context = prepare(config, resume=False, console=SilentConsole())
    meta_model, examples = load_meta_model(config.model), context.encoded["train"].examples
    setup, lengths = training_setup(config, torch.float32, longest=9), [len(example.token_ids) for example in examples]
    tokens = round(4 * sum(lengths) / len(lengths))
    length = round(sum(length**2 for length in lengths) / sum(lengths))
    shapes = training_shapes(meta_model, context.sites)
    step = step_flops(shapes, setup, phase="tune", tokens=tokens, length=length)
    score = step_flops(shapes, replace(setup, keep=1.0), phase="scores", tokens=tokens, length=length)
    assert tuning_flops(context, meta_model) == 40 * step + 3 * score


def test_every_part_of_a_run_adds_to_its_flops(workspace: Path) -> None:
    plain = flops_of(workspace)
    assert flops_of(workspace, train={"learning_rate": "auto"}) == pytest.approx(1.3 * plain)
    assert flops_of(workspace, budget={"keep": 0.5}) < plain < flops_of(workspace, budget={"keep": [0.6, 0.4]})
    tuned = flops_of(workspace, evaluate={"dense_tuned": True})
    assert plain < tuned < flops_of(workspace, distill={"teacher": "dense"}, evaluate={"dense_tuned": True})
    assert plain < flops_of(workspace, search={"method": "generator"})


def test_dry_run_estimates_time_and_disk_on_a_cpu(workspace: Path) -> None:
    lines = render_dry_run(config_of(workspace)).splitlines()
    (time,) = [line for line in lines if line.startswith("time: ")]
    (disk,) = [line for line in lines if line.startswith("disk: ")]
    assert "about 1 minutes" not in time
    assert " on cpu (an estimate" in time
    assert "GB of checkpoints and" in disk
    assert not (workspace / "run").exists()


def test_speed_of_a_product_is_positive_and_finite() -> None:
    assert 0 < product_flops_per_second(torch.device("cpu"), torch.float32, 64) < float("inf")
