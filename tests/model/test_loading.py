"""Loading models: names of folders, hub names, misspelt paths, and broken files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from prunetune.errors import ModelError
from prunetune.model.loading import load_config, load_meta_model, load_model_and_tokenizer, resolve_model_path
from support.suites import model_folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be 1 or more"),
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
        ({"hidden_size": -4}, "negative dimension"),
        ({"hidden_act": "zzz"}, "KeyError: 'zzz'"),
    ],
)
def test_invalid_configuration_is_refused_in_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError) as refused:
        load_meta_model(str(folder))
    assert message in str(refused.value)
    assert "config.json" in str(refused.value)
    assert "\n" not in str(refused.value)


def spoiled(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """A tiny checkpoint whose tensors were changed."""
    file = model_folder(folder) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return str(folder)


def test_missing_and_nan_weights_are_refused(tmp_path: Path) -> None:
    def lose(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = math.nan

    how: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    with pytest.raises(ModelError, match=r"lack 1 of the weights .* model\.layers\.1\.mlp\.up_proj\.weight first"):
        load_model_and_tokenizer(spoiled(tmp_path / "a", lose), **how)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite values"):
        load_model_and_tokenizer(spoiled(tmp_path / "b", spoil), **how)


def test_truncated_file_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    file = model_folder(tmp_path / "model") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read: .*; fetch it again"):
        load_meta_model(str(tmp_path / "model"))


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, offline; the working folder has a folder of runs."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "runs" / "support").mkdir(parents=True)
    (tmp_path / "runs" / "support" / "config.yaml").touch()
    (tmp_path / "runs" / "summary.gguf").touch()
    monkeypatch.chdir(tmp_path)
    return cache


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("runs/suport", "did you mean runs/support?"),
        ("runs/sumary", "did you mean runs/summary.gguf?"),
        ("runs/other", "no such folder beside the runs in runs (a hub model opens after: hf download runs/other)"),
        ("runs/no name of a hub's", "no such folder beside the runs in runs"),
        ("./runs/suport", "did you mean runs/support?"),
        ("runs/support/modle", "not a model folder"),
    ],
)
@pytest.mark.usefixtures("offline")
def test_misspelt_path_is_refused_without_asking_the_hub(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name whose owner is a local folder of runs is not looked up on the hub."""
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError) as refused:
        load_config(name)
    assert meant in str(refused.value)
    assert "\n" not in str(refused.value)


def test_other_names_are_hub_names(offline: Path) -> None:
    """This holds even if a local folder of models has the owner's name."""
    (offline.parent / "owner" / "fetched-by-hand").mkdir(parents=True)
    assert [resolve_model_path(name) for name in ("owner/name", "gpt2")] == ["owner/name", "gpt2"]


def test_cached_hub_model_opens_beside_a_folder_of_its_owners_name(offline: Path) -> None:
    stored = offline / "models--runs--suport"
    model_folder(stored / "snapshots" / "0123")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0123", encoding="utf-8")
    assert load_config("runs/suport").model_type == "llama"
    shutil.rmtree(stored)
    with pytest.raises(ModelError, match="did you mean"):
        load_config("runs/suport")


@pytest.mark.timeout(60)
def test_more_layers_than_any_model_has_are_refused_before_one_is_built(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(ModelError, match="num_hidden_layers is 1000000000, and 512 are read"):
        load_meta_model(str(folder))
