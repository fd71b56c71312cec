"""Checksums: changed or missing files are refused in one line; a failed write leaves nothing."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from prunetune import cut, export_run, find_sites
from prunetune.cli import app
from prunetune.errors import ModelError, PlanError, RunFolderError
from prunetune.export import convert
from prunetune.export.checkpoint import write_checkpoint
from prunetune.export.result import ExportOptions
from prunetune.export.source import ExportSource
from prunetune.model.checksums import CHECKSUM_FILE, verify_checksums, write_checksums
from prunetune.utils.failures import explain_failure
from prunetune.utils.files import atomic_folder, sha256
from support.data import subwords
from support.export import run_folder
from support.models import random_plan, tiny


@pytest.fixture(scope="module")
def original_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of layout uniform."""
    return run_folder(tmp_path_factory.mktemp("original") / "run", subwords(), layout="uniform")[0]


@pytest.fixture
def run(original_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(original_run, tmp_path / "run")
    return tmp_path / "run"


def test_checksums_cover_every_file_but_the_card_in_sha256sum_format(run: Path) -> None:
    lines = (run / "model" / CHECKSUM_FILE).read_text().splitlines()
    names = {file.name for file in (run / "model").iterdir()} - {CHECKSUM_FILE, "README.md"}
    assert {line.split("  ")[1] for line in lines} == names
    assert {"model.safetensors", "config.json", "plan.json", "tokenizer.json"} <= names
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--quiet", "-c", CHECKSUM_FILE], cwd=run / "model", check=True)
    assert verify_checksums(run / "model")
    assert len({file.stat().st_mode for file in (run / "model").iterdir() if file.name != "README.md"}) == 1


def flip(file: Path) -> None:
    """Flip one bit of one weight, which only a digest can find."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation_config.json"])
def test_export_refuses_an_altered_file(run: Path, name: str) -> None:
    flip(run / "model" / name)
    with pytest.raises(ModelError, match=rf"{name} is not what was written .* copy the folder again") as refused:
        export_run(run, "uniform")
    assert "\n" not in str(refused.value)
    assert not (run / "exports").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "plan.json"])
def test_source_refuses_a_missing_file(run: Path, name: str) -> None:
    (run / "model" / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        ExportSource.open(run)


def test_source_refuses_a_missing_or_altered_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    plan, sites = random_plan(model), find_sites(model)
    cut(model, plan)
    save_pretrained = type(model).save_pretrained
    monkeypatch.setattr(type(model), "save_pretrained", lambda *a, **k: save_pretrained(*a, **k, max_shard_size="30KB"))
    for name in ("missing", "altered"):
        write_checkpoint(model, subwords(), plan, sites, tmp_path / name, layout="per-layer", card="")
    shards = sorted(file.name for file in (tmp_path / "missing").glob("*.safetensors"))
    assert len(shards) > 1
    (tmp_path / "missing" / shards[1]).unlink()
    with pytest.raises(ModelError, match=f"{shards[1]} is missing"):
        ExportSource.open(tmp_path / "missing")
    flip(tmp_path / "altered" / shards[1])
    with pytest.raises(ModelError, match=f"{shards[1]} is not what was written"):
        ExportSource.open(tmp_path / "altered")


def test_export_refuses_a_plan_of_another_model(run: Path) -> None:
    file = run / "model" / "plan.json"
    values = json.loads(file.read_text())
    values["sites"]["model.layers.0.mlp"]["kept"] = [0, 1]
    file.write_text(json.dumps(values))
    with pytest.raises(PlanError, match="the plan is of another model"):
        export_run(run, "uniform")
    with pytest.raises(PlanError):
        cut(tiny("llama"), random_plan(tiny("llama", intermediate_size=64)))


def test_source_opens_with_an_edited_card_or_without_checksums(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "model" / "README.md").write_text("mine\n")
    ExportSource.open(run)
    (run / "model" / CHECKSUM_FILE).unlink()
    with caplog.at_level("INFO"):
        ExportSource.open(run)
    assert "its files are not verified" in caplog.text


@pytest.mark.parametrize("content", ["no digests\n", "\xff\xfe"])
def test_source_refuses_unreadable_checksums(run: Path, content: str) -> None:
    (run / "model" / CHECKSUM_FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=f"{CHECKSUM_FILE} cannot be read"):
        ExportSource.open(run)


def test_export_has_checksums_of_its_own(run: Path) -> None:
    result = export_run(run, "uniform", options=ExportOptions(dtype="bf16"))
    assert verify_checksums(result.path)
    assert (result.path / CHECKSUM_FILE).read_text() != (run / "model" / CHECKSUM_FILE).read_text()


# -- failed writes --------------------------------------------------------------------------------------------------

FULL = (OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device"))
FORBIDDEN = (PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EROFS, "Read-only file system"))


def failing(error: Exception) -> Callable[..., None]:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    return fails


@pytest.mark.parametrize(
    ("error", "match"), [*((e, "disk is full") for e in FULL), *((e, "no permission") for e in FORBIDDEN)]
)
def test_export_leaves_nothing_after_a_write_error(
    run: Path, error: Exception, match: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(run.rglob("*"))
    monkeypatch.setattr(convert, "save_file", failing(error))
    with pytest.raises(RunFolderError, match=f"{match}.* nothing was kept: .*--out"):
        export_run(run, "uniform", out=run / "there")
    assert sorted(run.rglob("*")) == before
    monkeypatch.setattr(sys, "argv", ["prunetune", "export", str(run), "--to", "uniform", "--out", str(run / "there")])
    assert app._run_app() == 2
    message = capsys.readouterr().err.strip()
    assert match in message
    assert "\n" not in message


@pytest.mark.parametrize("error", [*FULL, *FORBIDDEN])
def test_write_checkpoint_leaves_nothing_after_a_write_error(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    plan, sites = random_plan(model), find_sites(model)
    cut(model, plan)
    monkeypatch.setattr("prunetune.export.checkpoint.write_checksums", failing(error))
    with pytest.raises(type(error)):
        write_checkpoint(model, subwords(), plan, sites, tmp_path / "model", layout="per-layer", card="")
    assert not list(tmp_path.iterdir())
    assert explain_failure(error) is not None


def test_atomic_folder_is_complete_or_absent(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        with atomic_folder(folder) as partial:
            (partial / "half").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "sub" / "file").write_text("a")
    write_checksums(tmp_path / "folder")
    assert (tmp_path / "folder" / CHECKSUM_FILE).read_text().split() == [
        sha256(tmp_path / "folder" / "sub" / "file"),
        "sub/file",
    ]


@pytest.mark.parametrize(
    ("to", "layout", "match"),
    [
        ("uniform", "per-layer", "layers differ in width"),
        ("per-layer", "uniform", "its layers are equal"),
    ],
)
def test_export_refuses_a_format_that_does_not_fit_the_layout(to: str, layout: str, match: str, tmp_path: Path) -> None:
    run, _ = run_folder(tmp_path / "run", subwords(), layout=layout)
    with pytest.raises(ModelError, match=match):
        export_run(run, to)
    assert not (run / "exports").exists() or not list((run / "exports").iterdir())
