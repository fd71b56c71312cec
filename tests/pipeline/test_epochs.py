"""Laws of `train.epochs`: the steps follow from rows and batch size, are decided once, and kept in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prunetune.cli.preview import render_dry_run
from prunetune.compare.methods import read_variants
from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping, load_recipe, load_saved_recipe
from prunetune.errors import ConfigError, RunFolderError
from prunetune.pipeline.prepare import RunContext, prepare
from prunetune.runs.folder import create_run_folder
from prunetune.utils.console import SilentConsole
from support.data import pairs, write_lines
from support.evaluation import write_model_and_rows


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_rows(tmp_path_factory.mktemp("source"), 24)


def config_of(workspace: Path, out: Path, **changes: Any) -> RunConfig:
    values = {
        "model": str(workspace / "dense"),
        "out": str(out),
        "device": "cpu",
        "data": {"train": str(workspace / "rows.jsonl")},
        "budget": {"align": 8},
        "train": {"epochs": 3, "batch_size": 4},
    }
    return from_mapping(merge_mappings(values, changes))


def prepared(config: RunConfig, *, resume: bool = False) -> RunContext:
    return prepare(config, resume=resume, console=SilentConsole())


def test_steps_show_every_row_of_train_so_many_times(workspace: Path, tmp_path: Path) -> None:
    for epochs in (0.01, 1, 2.5, 3):
        context = prepared(config_of(workspace, tmp_path / "run", train={"epochs": epochs}))
        rows, steps = len(context.encoded["train"].examples), context.config.train.steps
        assert context.recipe.train.steps == steps == max(1, -(-epochs * rows // 4))
        assert context.config.train.epochs == context.recipe.train.epochs == 0


def test_weights_and_distill_texts_lengthen_an_epoch(workspace: Path, tmp_path: Path) -> None:
    config = config_of(workspace, tmp_path / "run", train={"epochs": 10})
    plain = prepared(config).config.train.steps
    doubled = config_of(workspace, tmp_path / "run", train={"epochs": 10}, data={"train": f"{workspace}/rows.jsonl*2"})
    assert prepared(doubled).config.train.steps == 2 * plain
    texts = write_lines(tmp_path / "texts.jsonl", *({"text": f"text {n}"} for n in range(9)))
    data = {"distill_texts": texts, "distill_texts_share": 0.5}
    with_texts = config_of(workspace, tmp_path / "run", train={"epochs": 10}, data=data)
    assert prepared(with_texts).config.train.steps == 2 * plain


def test_run_folder_keeps_the_steps_and_a_resumed_run_has_the_same(workspace: Path, tmp_path: Path) -> None:
    config = config_of(workspace, tmp_path / "run")
    context = prepared(config)
    create_run_folder(context.folder, context.recipe)
    saved = load_saved_recipe(tmp_path / "run" / "config.yaml")
    assert saved == context.recipe
    assert saved.train.steps == context.config.train.steps
    for again in (config, saved):
        assert prepared(again, resume=True).config == context.config
    with pytest.raises(RunFolderError, match=rf"train.steps was {saved.train.steps} and is now"):
        prepared(config_of(workspace, tmp_path / "run", train={"epochs": 4}), resume=True)


def test_dry_run_says_the_steps(workspace: Path, tmp_path: Path) -> None:
    config = config_of(workspace, tmp_path / "run")
    steps = prepared(config).config.train.steps
    assert f"{steps} steps of 4 examples" in render_dry_run(config)


def test_steps_and_epochs_exclude_each_other_and_a_flag_replaces_either(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.steps 5 and train.epochs 2 .*: leave one out"):
        from_mapping({"train": {"steps": 5, "epochs": 2}})
    recipe = tmp_path / "recipe.yaml"
    for given, flag in (("steps: 5", {"epochs": 2}), ("epochs: 2", {"steps": 5})):
        recipe.write_text(f"train: {{{given}}}")
        assert load_recipe(recipe, {"train": flag}) == from_mapping({"train": flag})


def test_variant_of_a_comparison_names_steps_only(tmp_path: Path) -> None:
    config = from_mapping({"train": {"epochs": 2}})
    (tmp_path / "variants.yaml").write_text("short: {train: {steps: 5}}\nslow: {train: {learning_rate: 1e-4}}")
    assert list(read_variants(tmp_path / "variants.yaml", config)) == ["short", "slow"]
    (tmp_path / "variants.yaml").write_text("long: {train: {epochs: 5}}")
    with pytest.raises(ConfigError, match=r"name train\.steps"):
        read_variants(tmp_path / "variants.yaml", config)


def test_best_validation_is_refused_where_valid_has_no_rows(workspace: Path, tmp_path: Path) -> None:
    long = write_lines(tmp_path / "long.jsonl", *pairs(3, prompt="long " * 400))
    for name, value in (("keep_best", True), ("patience", 2)):
        config = config_of(
            workspace, tmp_path / "run", train={name: value}, data={"valid": long, "max_length": 99, "too_long": "drop"}
        )
        with pytest.raises(Exception, match=f"train.{name} chooses on valid, and valid has no row"):
            prepared(config)
