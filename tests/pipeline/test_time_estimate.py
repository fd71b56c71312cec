"""What a dry run says of time and disk: FLOPs add up over cuts, sizes, trials and the dense model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from prunetune.cli.preview import render_dry_run
from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.model.loading import load_meta_model
from prunetune.pipeline.prepare import prepare
from prunetune.pipeline.time_estimate import tuning_flops
from prunetune.pruning.sites import lora_target_modules
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


def test_flops_are_near_those_counted_for_each_step(workspace: Path) -> None:
    """Two a weight and token forward, two for the gradients of inputs, and two for those of what is tuned."""
    changes: dict[str, Any] = {"search": {"cuts": 1, "init_batches": 1}, "budget": {"keep": 1.0}}
    context = prepare(config_of(workspace, **changes), resume=False, console=SilentConsole())
    model, rows = load_meta_model(context.config.model), context.encoded["train"].examples
    linears = [model.get_submodule(name).weight for name in lora_target_modules(model)]
    head, tokens = model.get_output_embeddings().weight.numel(), 4 * sum(len(row.token_ids) for row in rows) / len(rows)
    adapters = context.config.lora.rank * sum(sum(weight.shape) for weight in linears)
    weights = sum(weight.numel() for weight in linears)
    steps = 40 * tokens * (4 * weights + 6 * adapters + 4 * head)
    assert tuning_flops(context, model) == pytest.approx(steps + tokens * (4 * weights + 4 * head))


def test_every_part_of_a_run_adds_to_its_flops(workspace: Path) -> None:
    plain = flops_of(workspace)
    assert flops_of(workspace, train={"learning_rate": "auto"}) == pytest.approx(1.3 * plain)
    assert flops_of(workspace, budget={"keep": 0.5}) < plain < flops_of(workspace, budget={"keep": [0.6, 0.4]})
    tuned = flops_of(workspace, evaluate={"dense_tuned": True})
    assert plain < tuned < flops_of(workspace, distill={"teacher": "dense"}, evaluate={"dense_tuned": True})
    generator = {"search": {"method": "generator", "share": 0.1}}
    assert flops_of(workspace, **generator) < flops_of(workspace, search={**generator["search"], "share": 0.9})


def test_dry_run_estimates_time_and_disk_on_a_cpu(workspace: Path) -> None:
    lines = render_dry_run(config_of(workspace)).splitlines()
    (time,) = [line for line in lines if line.startswith("time: ")]
    (disk,) = [line for line in lines if line.startswith("disk: ")]
    assert re.match(r"time: about [0-9.]+ (min|hours) of tuning on cpu, scoring on top \(an estimate", time)
    assert "GB of checkpoints and" in disk
    assert not (workspace / "run").exists()
