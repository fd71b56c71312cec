"""Laws of a model's identity: any byte of weights, configuration, tokenizer or code changes it; the file is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunetune.model.provenance import ModelIdentity

FILES = ("model-1.safetensors", "config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "modeling_own.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*FILES, "README.md", "train.log"):
        (tmp_path / name).write_bytes(b"12345678")
    (tmp_path / "runs").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_identity_changes_with_any_byte_and_names_the_file(name: str, folder: Path) -> None:
    before = ModelIdentity(str(folder)).digests
    assert list(before) == sorted(FILES)
    (folder / name).write_bytes(b"12345679")  # of the same size
    assert ModelIdentity(str(folder)).changes_since(before) == f"{name} changed"
    (folder / name).unlink()
    if name != "config.json":
        assert ModelIdentity(str(folder)).changes_since(before) == f"{name} is missing"


def test_card_and_logs_are_no_part_of_the_identity(folder: Path) -> None:
    before = ModelIdentity(str(folder)).digests
    (folder / "README.md").write_text("edited")
    (folder / "train.log").unlink()
    assert ModelIdentity(str(folder)).changes_since(before) == ""


def test_many_changes_are_counted(folder: Path) -> None:
    before = ModelIdentity(str(folder)).digests
    for number in range(9):
        (folder / f"new-{number}.safetensors").write_bytes(b"1")
    changes = ModelIdentity(str(folder)).changes_since(before)
    assert changes.startswith("new-0.safetensors is new, ")
    assert changes.endswith("and 5 more")


def test_hub_model_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name whose revision moves is another model, though its files may be the same."""

    def move_to(commit: str) -> ModelIdentity:
        file = tmp_path / "snapshots" / commit / "config.json"
        file.parent.mkdir(parents=True)
        file.write_text("{}")
        monkeypatch.setattr("transformers.utils.cached_file", lambda *_: str(file))
        return ModelIdentity("owner/name")

    first = move_to("5f3a").digests
    assert first == {"commit": "5f3a"}
    assert move_to("77c0").changes_since(first) == "commit 5f3a is now 77c0"


def test_gguf_file_is_known_by_its_digest(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"1234")
    before = ModelIdentity(str(file)).digests
    file.write_bytes(b"1235")
    assert ModelIdentity(str(file)).changes_since(before) == "a.gguf changed"
