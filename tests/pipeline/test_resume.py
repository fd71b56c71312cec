"""What a resumed run holds on to: its base model, its limits, its versions; and that it can always be resumed."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunetune.bench.latency import tables
from prunetune.bench.latency.measure import LatencyTableBuilder
from prunetune.compare import run as compare_module
from prunetune.compare.run import compare
from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.cost.latency_table import PHASES, TRACKS
from prunetune.errors import RunFolderError
from prunetune.pipeline import multi_size, recording
from prunetune.pipeline import run as run_module
from prunetune.pipeline.prepare import RunContext, prepare
from prunetune.pipeline.run import run
from prunetune.runs.folder import RunFolder
from prunetune.utils import environment
from prunetune.utils.console import SilentConsole
from support.evaluation import write_model_and_rows

RECIPE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "budget": {"keep": 0.6, "align": 8},
    "train": {"steps": 2, "batch_size": 2, "learning_rate": 1e-3},
    "search": {"init_batches": 1},
    "distill": {"teacher": "none"},
    "evaluate": {"drift": False, "limit": 2, "generate_limit": 0, "dense_tuned": False},
    "workload": {"prompt": 8, "generate": 4, "dtype": "float32"},
    "compare": {"methods": ["untuned"], "seeds": [0]},
}
SIZES = {"budget": {"keep": [0.8, 0.6]}}
COMMANDS = {"run": (run, {}), "sizes": (run, SIZES), "compare": (compare, {})}
every_command = pytest.mark.parametrize("command", COMMANDS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_rows(tmp_path_factory.mktemp("source"), 24)


@pytest.fixture
def workspace(source: Path, tmp_path: Path) -> Path:
    """A model and data that a test may change."""
    return Path(shutil.copytree(source, tmp_path / "place"))


def config_of(workspace: Path, **changes: Any) -> RunConfig:
    paths = {"model": str(workspace / "dense"), "data": {"train": [str(workspace / "rows.jsonl")]}}
    recipe = merge_mappings(RECIPE, paths | {"out": str(workspace / "run")})
    return from_mapping(merge_mappings(recipe, changes))


class Killed(Exception):
    """In place of a signal, which would end the tests as well."""


def interrupt(*_: Any, **__: Any) -> None:
    raise Killed


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Begin a job and interrupt it before its first step; with `again`, resume it so far."""
    monkeypatch.setattr(recording, "write_report", lambda _: None)
    monkeypatch.setattr(run_module, "train", interrupt)
    monkeypatch.setattr(multi_size.SizeTraining, "train", interrupt)
    monkeypatch.setattr(compare_module._Comparison, "run", interrupt)

    def begin(workspace: Path, command: str = "run", *, again: bool = False, **changes: Any) -> None:
        start, own = COMMANDS[command]
        with pytest.raises(Killed):
            start(config_of(workspace, **merge_mappings(own, changes)), resume=again)

    return begin


# -- the base model ----------------------------------------------------------------------------------------------------


def add_noise(dense: Path) -> str:
    weights = load_file(dense / "model.safetensors")
    first = min(weights)
    save_file(weights | {first: weights[first] + 1e-3}, dense / "model.safetensors", metadata={"format": "pt"})
    return "model.safetensors changed"


def change_tokenizer(dense: Path) -> str:
    values = json.loads((dense / "tokenizer.json").read_text())
    values["pre_tokenizer"]["add_prefix_space"] = True
    (dense / "tokenizer.json").write_text(json.dumps(values))
    return "tokenizer.json changed"


@every_command
def test_resume_on_a_changed_base_model_is_refused(
    command: str, source: Path, workspace: Path, interrupted: Callable[..., None]
) -> None:
    interrupted(workspace, command)
    before = {path: path.read_bytes() for path in (workspace / "run").rglob("*") if path.is_file()}
    start, changes = COMMANDS[command]
    for change in (add_noise, change_tokenizer):
        says = change(workspace / "dense")
        with pytest.raises(RunFolderError, match=rf"the run began with \({says}\).*--out") as refused:
            start(config_of(workspace, **changes), resume=True)
        assert "\n" not in str(refused.value)
        assert {path: path.read_bytes() for path in before} == before
        shutil.copytree(source / "dense", workspace / "dense", dirs_exist_ok=True)
    interrupted(workspace, command, again=True)  # unchanged, it goes on


def test_run_that_recorded_no_base_model_is_resumed_and_says_so(
    workspace: Path, interrupted: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(workspace)
    file = workspace / "run" / "manifest.json"
    values = json.loads(file.read_text())
    identity = values["model"].pop("identity")
    file.write_text(json.dumps(values))
    interrupted(workspace, again=True)
    assert caplog.text.count("cannot be checked") == 1
    assert json.loads(file.read_text())["model"]["identity"] == identity
    interrupted(workspace, again=True)
    assert caplog.text.count("cannot be checked") == 1


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A made-up device: {"speed": factor of its seconds}."""
    speed = {"speed": 1.0}

    def requests(models: Sequence[Any], *_: Any) -> list[dict[str, float]]:
        counts = [sum(weight.numel() for weight in model.parameters()) for model in models]
        return [dict.fromkeys(PHASES, speed["speed"] * 1e-6 * (1000 + count) ** speed["speed"]) for count in counts]

    def tracks(models: Sequence[Any], *_: Any) -> list[dict[str, float]]:
        zero = dict.fromkeys(TRACKS, 0.0)
        return [zero | {f"{phase}.device": seconds[phase] for phase in PHASES} for seconds in requests(models)]

    monkeypatch.setenv("PRUNETUNE_CACHE", str(tmp_path / "cache"))
    builder = functools.partial(LatencyTableBuilder, points=3, track_timer=tracks, request_timer=requests)
    monkeypatch.setattr(tables, "LatencyTableBuilder", builder)
    monkeypatch.setattr("prunetune.bench.latency.short_models.CPU_CACHE", 1)  # few layers
    return speed


def resumed_context(workspace: Path, **changes: Any) -> RunContext:
    return prepare(config_of(workspace, **changes), resume=True, console=SilentConsole())


def limits_of(context: RunContext) -> list[tuple[str, float]]:
    assert context.constraints.limits is not None
    return [(limit.kind, limit.limit) for limit in context.constraints.limits.limits]


@pytest.mark.parametrize("command", ["run", "compare"])
def test_resumed_run_keeps_its_latency_table_and_limits(
    command: str, machine: dict[str, float], workspace: Path, tmp_path: Path, interrupted: Callable[..., None]
) -> None:
    """Without its cache, and on a machine on which other times would be measured."""
    changes = {"budget": {"latency": 0.8, "flops": 0.9}}
    interrupted(workspace, command, **changes)
    first = resumed_context(workspace, **changes)
    shutil.rmtree(tmp_path / "cache")
    machine["speed"] = 1.3
    again = resumed_context(workspace, **changes)
    assert limits_of(again) == limits_of(first)
    assert again.config == first.config
    assert not (tmp_path / "cache").exists()
    (workspace / "run" / "latency.json").unlink()
    with pytest.raises(RunFolderError, match=r"latency\.json cannot be read.*put it back, or start anew"):
        resumed_context(workspace, **changes)
    RunFolder(workspace / "run").update_manifest(cost_limits={})  # as in a run of a version that kept neither
    assert limits_of(resumed_context(workspace, **changes)) != limits_of(first)


def test_limit_of_a_resumed_run_is_the_recorded_one(workspace: Path, interrupted: Callable[..., None]) -> None:
    """Though a later version may count otherwise."""
    changes = {"budget": {"memory": 0.8, "flops": 0.9}}
    interrupted(workspace, **changes)
    folder = RunFolder(workspace / "run")
    recorded = {**folder.read_manifest().cost_limits}
    assert list(recorded) == ["flops", "memory"]
    folder.update_manifest(cost_limits=recorded | {"flops": 0.93 * recorded["flops"]})  # type: ignore[operator]
    assert dict(limits_of(resumed_context(workspace, **changes))) == folder.read_manifest().cost_limits


def test_table_of_another_device_is_told_and_kept(
    machine: dict[str, float],
    workspace: Path,
    interrupted: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    interrupted(workspace, budget={"latency": 0.8})
    limits = limits_of(resumed_context(workspace, budget={"latency": 0.8}))
    monkeypatch.setattr(environment, "device_name", lambda _: "another")
    assert limits_of(resumed_context(workspace, budget={"latency": 0.8})) == limits
    assert "here it is 'another': the run keeps its limits" in caplog.text


def test_damaged_file_of_a_resumed_run_is_refused_in_one_line(
    machine: dict[str, float], workspace: Path, interrupted: Callable[..., None]
) -> None:
    interrupted(workspace, budget={"latency": 0.8})
    for name in ("latency.json", "manifest.json"):
        written = (workspace / "run" / name).read_text()
        for text in ("", "{", "null", "[" * 100_000):
            (workspace / "run" / name).write_text(text)
            with pytest.raises(
                RunFolderError, match=rf"{name}.*put it back, or start anew with another --out"
            ) as refused:
                resumed_context(workspace, budget={"latency": 0.8})
            assert "\n" not in str(refused.value)
        (workspace / "run" / name).write_text(written)


# -- versions ----------------------------------------------------------------------------------------------------------


def test_changed_versions_are_told_in_one_line_and_both_are_kept(
    workspace: Path,
    interrupted: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = RunFolder(workspace / "run")
    interrupted(workspace)
    interrupted(workspace, again=True)
    assert "other versions" not in caplog.text
    (first,) = folder.read_manifest().environments
    now = environment.package_versions() | {"torch": "9.9.9"}
    monkeypatch.setattr(environment, "package_versions", lambda: now)
    interrupted(workspace, again=True)
    (line,) = (message for message in caplog.messages if "other versions" in message)
    assert f"torch {torch.__version__} is now 9.9.9" in line
    assert "\n" not in line
    manifest = folder.read_manifest()
    assert [known.versions["torch"] for known in manifest.environments] == [torch.__version__, "9.9.9"]
    assert manifest.environments[0] == first
    assert manifest.versions == now


def test_environment_of_a_run_of_the_first_version_is_kept(workspace: Path, interrupted: Callable[..., None]) -> None:
    """Version 0.1.0 wrote one environment, without a list."""
    interrupted(workspace)
    file = workspace / "run" / "manifest.json"
    values = json.loads(file.read_text())
    del values["environments"]
    file.write_text(json.dumps(values | {"versions": {"prunetune": "0.1.0"}}))
    interrupted(workspace, again=True)
    environments = RunFolder(workspace / "run").read_manifest().environments
    assert [known.versions["prunetune"] for known in environments] == [
        "0.1.0",
        environment.package_versions()["prunetune"],
    ]


# -- half-made folders -------------------------------------------------------------------------------------------------


@every_command
def test_resume_begins_in_a_folder_that_holds_nothing_yet(
    command: str, workspace: Path, interrupted: Callable[..., None]
) -> None:
    for left in ((), ("cells",), ("checkpoints", "evaluation"), ("sizes/0.8",)):
        for name in left:
            (workspace / "run" / name).mkdir(parents=True)
        interrupted(workspace, command, again=True)
        assert (workspace / "run" / "manifest.json").is_file()
        shutil.rmtree(workspace / "run")


@every_command
def test_job_that_is_killed_at_any_write_can_be_resumed(
    command: str, workspace: Path, interrupted: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = ("prunetune.runs.folder", "prunetune.compare.run", "prunetune.pipeline.recording")
    write_text = recording.write_text
    for allowed in (0, 1):
        shutil.rmtree(workspace / "run", ignore_errors=True)
        written: list[Path] = []

        def write(path: Path, text: str, written: list[Path] = written, allowed: int = allowed) -> None:
            if len(written) == allowed:
                raise Killed
            write_text(path, text)
            written.append(path)

        with monkeypatch.context() as killed:
            for module in modules:
                killed.setattr(f"{module}.write_text", write)
            interrupted(workspace, command)
        interrupted(workspace, command, again=True)


def test_folder_of_somebody_else_is_not_resumed(workspace: Path) -> None:
    (workspace / "run" / "deep" / "er").mkdir(parents=True)
    (workspace / "run" / "deep" / "er" / "thesis.txt").touch()
    for resume, says in ((True, "no config.yaml"), (False, "exists already")):
        with pytest.raises(RunFolderError, match=says):
            run(config_of(workspace), resume=resume)
