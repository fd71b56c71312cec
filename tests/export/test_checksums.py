"""Laws: what was altered or lost since it was written is refused in one line; what cannot be written leaves nothing."""

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
from prunetune.export import checksums, convert
from prunetune.export.checkpoint import write_checkpoint
from prunetune.export.checksums import CHECKSUM_FILE, verify_checksums, write_checksums
from prunetune.export.result import ExportOptions
from prunetune.export.source import ExportSource
from prunetune.utils.failures import explain_failure
from prunetune.utils.files import atomic_folder
from support.data import subwords
from support.export import run_folder
from support.models import random_plan, tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of layout uniform."""
    return run_folder(tmp_path_factory.mktemp("made") / "run", subwords(), layout="uniform")[0]


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def test_every_file_but_the_card_is_sealed_as_sha256sum_reads_it(run: Path) -> None:
    lines = (run / "model" / CHECKSUM_FILE).read_text().splitlines()
    names = {file.name for file in (run / "model").iterdir()} - {CHECKSUM_FILE, "README.md"}
    assert {line.split("  ")[1] for line in lines} == names
    assert {"model.safetensors", "config.json", "plan.json", "tokenizer.json"} <= names
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--quiet", "-c", CHECKSUM_FILE], cwd=run / "model", check=True)
    assert verify_checksums(run / "model")
    assert len({file.stat().st_mode for file in (run / "model").iterdir() if file.name != "README.md"}) == 1


def flip(file: Path, place: int = -1) -> None:
    """One bit of one weight: nothing but a digest can tell."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation_config.json"])
def test_an_altered_file_is_refused(run: Path, name: str) -> None:
    flip(run / "model" / name)
    with pytest.raises(ModelError, match=rf"{name} is not what was written .* copy the folder again") as refused:
        export_run(run, "uniform")
    assert "\n" not in str(refused.value)
    assert not (run / "exports").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "plan.json"])
def test_a_missing_file_is_refused(run: Path, name: str) -> None:
    (run / "model" / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        ExportSource.open(run)


def test_a_missing_or_altered_shard_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    plan, sites = random_plan(model), find_sites(model)
    cut(model, plan)
    saved = type(model).save_pretrained
    monkeypatch.setattr(type(model), "save_pretrained", lambda *a, **k: saved(*a, **k, max_shard_size="30KB"))
    for name in ("missing", "altered"):
        write_checkpoint(model, subwords(), plan, sites, tmp_path / name, layout="per-layer", card="")
    shards = sorted(file.name for file in (tmp_path / "missing").glob("*.safetensors"))
    assert len(shards) > 1
    (tmp_path / "missing" / shards[1]).unlink()
    with pytest.raises(ModelError, match=f"{shards[1]} is missing"):
        ExportSource.open(tmp_path / "missing", trust_remote_code=True)
    flip(tmp_path / "altered" / shards[1])
    with pytest.raises(ModelError, match=f"{shards[1]} is not what was written"):
        ExportSource.open(tmp_path / "altered", trust_remote_code=True)


def test_a_plan_of_another_model_is_refused(run: Path) -> None:
    file = run / "model" / "plan.json"
    values = json.loads(file.read_text())
    values["sites"]["model.layers.0.mlp"]["kept"] = [0, 1]
    file.write_text(json.dumps(values))
    with pytest.raises(PlanError, match="the plan is of another model"):
        export_run(run, "uniform")
    with pytest.raises(PlanError):
        cut(tiny("llama"), random_plan(tiny("llama", intermediate_size=64)))


def test_the_card_is_free_and_older_folders_open(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "model" / "README.md").write_text("mine\n")
    ExportSource.open(run)
    (run / "model" / CHECKSUM_FILE).unlink()
    with caplog.at_level("INFO"):
        ExportSource.open(run)
    assert "taken as they are" in caplog.text


@pytest.mark.parametrize("content", ["no digests\n", "\xff\xfe"])
def test_odd_digests_are_refused(run: Path, content: str) -> None:
    (run / "model" / CHECKSUM_FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=f"{CHECKSUM_FILE} cannot be read"):
        ExportSource.open(run)


def test_what_is_exported_is_sealed_anew(run: Path) -> None:
    done = export_run(run, "uniform", options=ExportOptions(dtype="bf16"))
    assert verify_checksums(done.path)
    assert (done.path / CHECKSUM_FILE).read_text() != (run / "model" / CHECKSUM_FILE).read_text()


# -- what cannot be written -------------------------------------------------------------------------------------------

FULL = (OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device"))
FORBIDDEN = (PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EROFS, "Read-only file system"))


def failing(error: Exception) -> Callable[..., None]:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    return fails


@pytest.mark.parametrize(
    ("error", "match"), [*((e, "disk is full") for e in FULL), *((e, "no permission") for e in FORBIDDEN)]
)
def test_an_export_that_cannot_be_written_leaves_nothing(
    run: Path, error: Exception, match: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(run.rglob("*"))
    monkeypatch.setattr(convert, "save_file", failing(error))
    with pytest.raises(RunFolderError, match=f"{match}.* nothing was kept: .*--out"):
        export_run(run, "uniform", out=run / "there")
    assert sorted(run.rglob("*")) == before
    monkeypatch.setattr(sys, "argv", ["prunetune", "export", str(run), "--to", "uniform", "--out", str(run / "there")])
    assert app._run_app() == 2
    said = capsys.readouterr().err.strip()
    assert match in said
    assert "\n" not in said


@pytest.mark.parametrize("error", [*FULL, *FORBIDDEN])
def test_a_model_that_cannot_be_written_leaves_nothing(
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


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
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
    assert checksums._sums(tmp_path / "folder" / CHECKSUM_FILE).keys() == {"sub/file"}


@pytest.mark.parametrize(
    ("to", "layout", "match"),
    [
        ("uniform", "per-layer", "layers differ in width"),
        ("per-layer", "uniform", "its layers are equal"),
    ],
)
def test_a_format_that_the_layout_cannot_have_is_refused(to: str, layout: str, match: str, tmp_path: Path) -> None:
    run, _ = run_folder(tmp_path / "run", subwords(), layout=layout)
    with pytest.raises(ModelError, match=match):
        export_run(run, to)
    assert not (run / "exports").exists() or not list((run / "exports").iterdir())
