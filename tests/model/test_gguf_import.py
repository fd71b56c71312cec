"""The dequantised copy of a .gguf file: complete, and written once, even by two processes at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from prunetune.errors import ModelError
from prunetune.model import gguf_import
from support.data import subwords
from support.evaluation import characters, speaker


def quantised() -> Any:
    model = speaker()
    model.config.quantization_config = {"quant_method": "gguf"}
    return model


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRUNETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: quantised())
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: characters())
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path / "model.gguf"


def test_gguf_file_is_dequantised_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gguf_import.dequantize_gguf(file)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    assert gguf_import.dequantize_gguf(file) == folder


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no GGUF at all, but long enough for a header"])
def test_broken_gguf_file_is_refused(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNETUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "torn.gguf").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        gguf_import.dequantize_gguf(tmp_path / "torn.gguf")


def test_every_error_of_the_reader_is_one_line_and_lack_of_memory_stays_what_it_is(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> None:
        raise error

    for error in (OverflowError("too large"), AttributeError("none"), AssertionError()):
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, error=error, **__: fail(error))
        with pytest.raises(ModelError, match=f"cannot be read as GGUF: .*{type(error).__name__ if str(error) else ''}"):
            gguf_import.dequantize_gguf(file)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: fail(MemoryError()))
    with pytest.raises(MemoryError):
        gguf_import.dequantize_gguf(file)


def test_tokenizer_that_splits_words_into_letters_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.17 reads Gemma's tokenizer in this way."""
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: subwords())
    assert gguf_import.dequantize_gguf(file).is_dir()
    os.utime(file, ns=(1, 1))
    state = json.loads(subwords().backend_tokenizer.to_str())
    state["model"]["merges"] = []
    monkeypatch.setattr(
        AutoTokenizer,
        "from_pretrained",
        lambda *_, **__: PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state))),
    )
    with pytest.raises(ModelError, match="reads its tokenizer wrongly"):
        gguf_import.dequantize_gguf(file)


def test_two_processes_dequantise_the_same_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowTokenizer:
        """A tokenizer: while it is being written, another process begins and ends."""

        def __len__(self) -> int:
            return 0

        def save_pretrained(self, folder: Path) -> None:
            monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: characters())
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: 12345)
                gguf_import.dequantize_gguf(file)
            characters().save_pretrained(folder)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: SlowTokenizer())
    folder = gguf_import.dequantize_gguf(file)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
