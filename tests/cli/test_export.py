"""The command `export`: what it prints, and its exit codes."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from prunetune.export import formats
from prunetune.export.gguf import llamacpp, tensors
from prunetune.export.gguf import write as gguf_write
from support.data import subwords
from support.export import reference_here, run_folder

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(say: Said, monkeypatch: pytest.MonkeyPatch) -> Said:
    """`prunetune export` with these arguments."""
    monkeypatch.setattr(llamacpp, "reference_continuations", reference_here)
    return lambda *arguments: say("export", *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("runs") / "support", subwords(), layout="uniform")[0]


def test_export_prints_what_it_wrote_and_where(say: Said, run: Path, tmp_path: Path) -> None:
    code, out, _ = say(str(run), "--to", "gguf", "--dtype", "q8_0", "--out", str(tmp_path / "a.gguf"))
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("GGUF, architecture llama, q8_0: 0.1 M parameters")
    assert lines[1].startswith("checked in gguf")
    assert "llama.cpp" in lines[2]
    assert lines[-1] == str(tmp_path / "a.gguf")


def test_export_as_json_has_path_size_and_checks(say: Said, run: Path, tmp_path: Path) -> None:
    code, out, _ = say(run, "--out", tmp_path / "again", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["path"] == str(tmp_path / "again")
    assert result["bytes"] > 0
    assert all(check["ran"] for check in result["checks"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "tar"), "tar"),
        (("--to", "gguf", "--dtype", "f8"), "takes no dtype 'f8'; use one of f16, f32, bf16, q8_0"),
        (("--to", "onnx", "--pad"), "onnx has no use for it: leave it out"),
        (("--to", "per-layer"), "a stock class opens it: export --to uniform"),
    ],
)
def test_impossible_export_exits_with_2_and_one_line(
    arguments: tuple[str, ...], message: str, say: Said, run: Path, tmp_path: Path
) -> None:
    code, out, err = say(str(run), *arguments, "--out", str(tmp_path / "x"))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("prunetune: ")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_failed_selfcheck_exits_with_1(say: Said, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_write, "verify_tensors", lambda *_: None)
    monkeypatch.setattr(tensors, "quantize_rows", lambda rows, *_: (0 * rows).numpy())
    code, out, err = say(str(run), "--to", "gguf", "--dtype", "f32", "--out", str(tmp_path / "x.gguf"))
    if not llamacpp.runtime_version():
        pytest.skip("needs llama.cpp")
    assert (code, out) == (1, "")
    assert "differs from transformers" in err
    assert not list(tmp_path.iterdir())


def test_full_disk_is_refused_before_writing(
    say: Said, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(1, 1, 10)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    code, _, err = say(str(run), "--to", "gguf", "--out", str(tmp_path / "x.gguf"))
    assert code == 2
    assert "GB free" in err


def test_existing_export_is_not_overwritten(say: Said, run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("mine")
    code, _, err = say(str(run), "--to", "gguf", "--out", str(tmp_path / "x.gguf"))
    assert (code, (tmp_path / "x.gguf").read_text()) == (2, "mine")
    assert "exists already" in err


def test_partial_folder_of_a_killed_export_is_removed(say: Said, run: Path, tmp_path: Path) -> None:
    """A killed export leaves such a folder."""
    (tmp_path / "x.gguf.partial").write_text("half")
    assert say(str(run), "--to", "gguf", "--out", str(tmp_path / "x.gguf"))[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.Modelfile", "x.gguf"]
    assert set(formats.EXPORT_FORMATS) >= {"gguf", "uniform", "per-layer"}
