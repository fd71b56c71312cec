"""Runs on a 4-bit base: the written model equals the tuned one, the error is recorded, and the run resumes."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune.compare.methods import read_variants, resolve_methods
from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.errors import ConfigError, MissingPackage, SelfCheckFailed
from prunetune.pipeline import finish, recording, stages
from prunetune.pipeline.run import run
from prunetune.pruning.nf4 import has_nf4_linears, quantize_linears_to_nf4
from prunetune.pruning.sites import find_sites, lora_target_modules
from prunetune.train.loop import tune_and_prune
from prunetune.utils import optional
from support.data import write_lines
from support.evaluation import characters, speaker
from support.loop import config_of as loop_config
from support.loop import job_of
from support.models import tiny
from support.streamed import tensors_of

RECIPE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "budget": {"keep": 0.6, "align": 8},
    "train": {
        "steps": 6, "batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 2, "validate_every": 3,
        "weights": "adapters",
    },
    "lora": {"rank": 4, "quantize": "nf4"},
    "search": {"share": 0.4, "settle": 0.2, "init_batches": 1, "batch_size": 4},
    "distill": {"teacher": "none"},
    "evaluate": {"drift": False, "limit": 4, "generate_limit": 0, "dense_tuned": False},
}  # fmt: skip
needs_nf4 = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install 'prunetune[quant]'",
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    speaker().save_pretrained(folder / "dense")
    characters().save_pretrained(folder / "dense")
    rows = [{"prompt": f"Case {n}: ", "choices": ["yes", "no"], "answer": n % 2, "task": "choice"} for n in range(40)]
    write_lines(folder / "rows.jsonl", *rows)
    return folder


def config_of(workspace: Path, out: Path, **changes: Any) -> RunConfig:
    paths = {"model": str(workspace / "dense"), "out": str(out), "data": {"train": [str(workspace / "rows.jsonl")]}}
    return from_mapping(merge_mappings(merge_mappings(RECIPE, paths), changes))


def manifest(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return values


@pytest.fixture(scope="module")
def whole(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in float32."""
    return run(config_of(workspace, tmp_path_factory.mktemp("runs") / "whole"))


@needs_nf4
def test_written_model_equals_the_tuned_one(whole: Path) -> None:
    values = manifest(whole)
    assert values["selfcheck"]["ok"]
    assert values["quantised"]["scheme"] == "nf4"
    assert values["quantised"]["error"] < 1e-5  # in float32 nothing but the order of sums differs
    assert values["quantised"]["same"] == 1
    assert "nf4; merged differs from it by" in (whole / "report.html").read_text()


@needs_nf4
def test_teacher_is_in_4_bits_too_and_the_error_in_16_bits_is_recorded(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized: list[bool] = []
    genuine = tune_and_prune

    def record_job(job: Any) -> Any:
        quantized.append(has_nf4_linears(job.model) and (job.teacher is None or has_nf4_linears(job.teacher.model)))
        return genuine(job)

    monkeypatch.setattr(stages, "tune_and_prune", record_job)
    changes = {
        "distill": {"teacher": "dense"},
        "evaluate": {"drift": False, "dense_tuned": True},
        "train": {"steps": 4},
    }
    folder = run(config_of(workspace, tmp_path / "run", layout="uniform", dtype="bfloat16", **changes))
    assert quantized == [True] * 3  # the teacher, its pupil, and the teacher again to be scored
    assert 0 < manifest(folder)["quantised"]["error"] < 0.05


@needs_nf4
def test_resumed_run_ends_with_the_same_bytes(
    whole: Path, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = config_of(workspace, tmp_path / "stopped")
    with monkeypatch.context() as patched:
        genuine = recording.RunRecorder.step

        def step(self: Any, record: dict[str, Any]) -> None:
            if record["step"] > 4:  # cut by then
                raise KeyboardInterrupt
            genuine(self, record)

        patched.setattr(recording.RunRecorder, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run(stopped)
    folder = run(stopped, resume=True)
    for name in ("plan.json", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


@needs_nf4
def test_cut_model_with_all_weights_tuned_is_not_in_4_bits() -> None:
    model = tiny()
    sites = find_sites(model)
    quantize_linears_to_nf4(model, sites, dtype=torch.float32, device=torch.device("cpu"))
    config = loop_config({"train": {"weights": "all"}, "lora": {"quantize": "nf4"}})
    job = job_of(config, model=tiny())
    tune_and_prune(replace(job, model=model.requires_grad_(False)))
    assert not has_nf4_linears(model)
    assert all(weight.dtype == torch.float32 and weight.requires_grad for weight in weights_of_linears(model))


def weights_of_linears(model: Any) -> list[Any]:
    return [model.get_parameter(f"{name}.weight") for name in lora_target_modules(model)]


@needs_nf4
def test_merged_model_that_differs_is_refused(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "round_to_nf4", lambda _, weight, **__: weight)  # merged into weights never tuned on
    monkeypatch.setattr(finish, "MAX_LOGIT_ERROR", 1e-4)
    with pytest.raises(SelfCheckFailed, match="not the one that was tuned in 4 bits"):
        run(config_of(workspace, tmp_path / "run"))
    assert not (tmp_path / "run" / "model").exists()


def test_impossible_combinations_are_refused_in_one_line(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optional, "find_spec", lambda _: None)
    with pytest.raises(MissingPackage, match="bitsandbytes"):
        run(config_of(workspace, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"lora.quantize must be one of off, nf4"):
        config_of(workspace, tmp_path / "run", lora={"quantize": "int3"})
    with pytest.raises(ConfigError, match=r"compare: .*leave lora.quantize out"):
        resolve_methods(config_of(workspace, tmp_path / "run"))
    file = tmp_path / "variants.yaml"
    file.write_text("small: {lora: {quantize: nf4}}")
    with pytest.raises(ConfigError, match=r"small: .*leave lora.quantize out"):
        read_variants(file, config_of(workspace, tmp_path / "run", lora={"quantize": "off"}))


@pytest.mark.parametrize(
    ("quantize", "dtype"),
    [
        ("off", "float32"),
        pytest.param("nf4", "float32", marks=needs_nf4),
        pytest.param("nf4", "bfloat16", marks=needs_nf4),
    ],
)
def test_layer_by_layer_cut_equals_the_cut_in_memory(
    quantize: str, dtype: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"dtype": dtype, "lora": {"quantize": quantize}}
    once = run(config_of(workspace, tmp_path / "once", **changes))
    monkeypatch.setattr(finish, "LARGE_MODEL_PARAMS", 0)
    monkeypatch.setattr(finish, "cut", None)  # of whole models
    streamed = run(config_of(workspace, tmp_path / "layers", **changes))
    expected, written = tensors_of(once / "model"), tensors_of(streamed / "model")
    assert expected.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in expected.items())
    assert manifest(streamed).get("quantised") == manifest(once).get("quantised")
