"""Structure of `run`: few frames from the command to the training loop, and the order of stages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import prunetune
from prunetune.config.recipe import from_mapping
from prunetune.errors import ConfigError
from prunetune.pipeline import run as run_module
from prunetune.pipeline import stages
from prunetune.pipeline.prepare import prepare
from prunetune.utils.console import SilentConsole
from support.evaluation import write_model_and_rows

PACKAGE = Path(prunetune.__file__).parent
MAX_FRAMES = 5  # from the command to the loop, both counted


def recipe_values(folder: Path) -> dict[str, Any]:
    """Recipe of a run of two steps without a teacher."""
    workspace = write_model_and_rows(folder, 24)
    return {
        "model": str(workspace / "dense"),
        "out": str(folder / "run"),
        "device": "cpu",
        "data": {"train": [str(workspace / "rows.jsonl")]},
        "budget": {"align": 8},
        "train": {"steps": 2, "batch_size": 2},
        "search": {"init_batches": 1},
        "distill": {"teacher": "none"},
        "evaluate": {"dense_tuned": False},
    }


def frames_of_the_package() -> list[str]:
    """`file:function` of every frame of prunetune on the stack, the innermost first."""
    frame, frames = sys._getframe(), []
    while frame.f_back is not None:
        frame = frame.f_back
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            frames.append(f"{file.relative_to(PACKAGE)}:{frame.f_code.co_name}")
    return frames


def test_command_reaches_the_loop_in_few_frames(
    tmp_path: Path, say: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames: list[str] = []

    def tune_and_prune(_: Any) -> None:
        frames.extend(frames_of_the_package())
        raise ConfigError("the loop is reached")

    monkeypatch.setattr(stages, "tune_and_prune", tune_and_prune)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(tmp_path)))
    code, _, stderr = say("run", recipe)
    assert (code, "the loop is reached" in stderr) == (2, True)
    between = frames[: frames.index("cli/app.py:run") + 1]
    assert len(between) + 1 <= MAX_FRAMES, between  # and the loop's own


def test_prepare_resolves_auto_options(tmp_path: Path) -> None:
    config = from_mapping(recipe_values(tmp_path) | {"distill": {"teacher": "auto"}})
    context = prepare(config, resume=False, console=SilentConsole())
    assert context.recipe == context.reported_config == config
    assert (config.distill.teacher, config.distill.share) == ("auto", 0)
    assert config.train.weights == "auto"
    decided = context.config
    assert (decided.distill.teacher, decided.distill.share) == ("dense", 1)
    assert decided.train.weights == "all"


def test_reported_config_has_the_decided_budget_and_the_rest_as_asked(tmp_path: Path) -> None:
    config = from_mapping(recipe_values(tmp_path) | {"budget": {"align": 8, "flops": 0.8}})
    context = prepare(config, resume=False, console=SilentConsole())
    assert (context.recipe, context.recipe.budget.keep) == (config, 1)
    assert context.constraints.limits is not None
    assert context.reported_config.budget.keep == context.constraints.limits.feasible_keep < 1
    assert context.reported_config.train.weights == "auto"


def test_run_executes_stages_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("prepare", "train", "finish", "evaluate_all", "evaluate_drift", "measure", "raise_if_limits_broken")
    called = []

    def noting(name: str) -> Callable[..., Any]:
        stage = getattr(run_module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            called.append(name)
            return stage(*arguments, **options)

        return call

    for name in names:
        monkeypatch.setattr(run_module, name, noting(name))
    folder = prunetune.run(from_mapping(recipe_values(tmp_path)))
    assert called == list(names)
    assert (folder / "model" / "model.safetensors").is_file()
    assert (folder / "report.html").is_file()
