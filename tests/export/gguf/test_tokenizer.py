"""Tokenizer keys of a GGUF file: copied from the base file or from tokenizer.json; unknown patterns are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prunetune import export_run
from prunetune.errors import ModelError
from prunetune.export.gguf import llamacpp, tokenizer
from prunetune.export.gguf.write import write_gguf
from prunetune.export.result import ExportOptions
from prunetune.export.source import ExportSource
from support.data import CORPUS, SPECIAL, subwords
from support.export import reference_here, run_folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "reference_continuations", reference_here)


def byte_level(pattern: str | None, *, digits: bool = False, whole: bool = False, tokens: int = 320) -> Any:
    """A byte-level tokenizer that first splits texts by a pattern."""
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    backend = Tokenizer(models.BPE(ignore_merges=whole))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=tokens, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    ))  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def sentencepiece() -> Any:
    """A tokenizer converted from SentencePiece: ▁ for a space, bytes for what is not in the vocabulary."""
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    )
    values = json.loads(backend.to_str())
    values["added_tokens"] = values["added_tokens"][:3]  # bytes are plain entries of such a vocabulary
    backend = Tokenizer.from_str(json.dumps(values))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS: dict[str, tuple[Any, str]] = {
    "gpt-2": (lambda: byte_level(None), "gpt-2"),
    "digits": (lambda: byte_level(None, digits=True), "smollm"),
    "llama 3": (lambda: byte_level(tokenizer.CL100K % "{1,3}", whole=True), "llama-bpe"),
    "cl100k": (lambda: byte_level(tokenizer.CL100K % "{1,3}"), "dbrx"),
    "qwen": (lambda: byte_level(tokenizer.CL100K % ""), "qwen2"),
    "nemo": (lambda: byte_level(tokenizer.O200K % ("", "", ""), whole=True), "tekken"),
    "o200k": (lambda: byte_level(tokenizer.O200K % (tokenizer.SHORT, tokenizer.SHORT, "{1,3}")), "gpt-4o"),
    "sentencepiece": (sentencepiece, "default"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_has_the_same_tokens_for_every_kind_of_tokenizer(kind: str, tmp_path: Path) -> None:
    make, name = KINDS[kind]
    run, _ = run_folder(tmp_path / "run", make(), layout="uniform")
    source, file = ExportSource.open(run), tmp_path / "model.gguf"
    _, note = write_gguf(source, file, "f16")
    assert note.endswith(f"pre-tokenizer {name}")
    if llamacpp.runtime_version():
        assert llamacpp.compare_tokens(file, source, [[1]], [llamacpp.GreedyContinuation((1,), (0.0,))]).texts == len(
            llamacpp.CHECK_TEXTS
        )


def test_tokenizer_keys_are_copied_from_the_base_gguf(tmp_path: Path) -> None:
    run, _ = run_folder(tmp_path / "first", subwords(), layout="uniform")
    base = export_run(run, "gguf", out=tmp_path / "base.gguf").path
    again, _ = run_folder(tmp_path / "second", byte_level(None, digits=True), layout="uniform")
    (again / "config.yaml").write_text(f"model: {base}\n")
    result = export_run(again, "gguf")
    assert "tokenizer keys of base.gguf" in result.notes
    first, second = (gguf.GGUFReader(path).fields for path in (base, result.path))
    names = [name for name in first if name.startswith("tokenizer.")]
    assert len(names) > 6
    assert all(first[name].contents() == second[name].contents() for name in names)


def test_missing_base_gguf_falls_back_to_tokenizer_json(tmp_path: Path) -> None:
    run, _ = run_folder(tmp_path / "run", subwords(), layout="uniform")
    (run / "config.yaml").write_text(f"model: {tmp_path / 'gone.gguf'}\n")
    assert "tokenizer keys made from tokenizer.json, pre-tokenizer gpt-2" in export_run(run, "gguf").notes


def test_export_refuses_an_unknown_pre_tokenizer(tmp_path: Path) -> None:
    run, _ = run_folder(tmp_path / "run", byte_level(r"\d+|\w+"), layout="uniform")
    with pytest.raises(ModelError, match=r"splits texts by .* no name known here: start the run from the model's GGUF"):
        export_run(run, "gguf")
    (run / "model" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer.json is missing"):
        export_run(run, "gguf")


def test_export_refuses_a_tokenizer_without_merges_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = run_folder(tmp_path / "run", byte_level(None, tokens=len(SPECIAL) + 256), layout="uniform")
    monkeypatch.setattr(gguf.GGUFWriter, "open_output_file", lambda *_: pytest.fail("a file was begun"))
    with pytest.raises(ModelError, match=r"tokenizer\.json has no merges"):
        export_run(run, "gguf")


def test_export_refuses_a_vocabulary_larger_than_the_embedding(tmp_path: Path) -> None:
    run, _ = run_folder(tmp_path / "run", subwords(), layout="uniform", vocab_size=300)
    with pytest.raises(ModelError, match="the tokenizer has 320 tokens, the embedding 300 rows"):
        export_run(run, "gguf")
    other, _ = run_folder(tmp_path / "other", subwords(), layout="uniform")
    base = export_run(other, "gguf", out=tmp_path / "base.gguf").path
    (run / "config.yaml").write_text(f"model: {base}\n")
    with pytest.raises(ModelError, match="has 320 tokens and the model 300"):
        export_run(run, "gguf")


def test_added_token_without_a_row_is_left_out_with_a_note(tmp_path: Path) -> None:
    words = subwords()
    run, _ = run_folder(tmp_path / "run", words, layout="uniform", vocab_size=len(words))
    words.add_special_tokens({"pad_token": "[PAD]"})
    words.save_pretrained(run / "model")
    (run / "model" / "SHA256SUMS").unlink()
    result = export_run(run, "gguf", options=ExportOptions(dtype="f32"))
    assert "left out, as the embedding has no row for it: '[PAD]'" in " ".join(result.notes)
    fields = gguf.GGUFReader(result.path).fields
    assert len(fields["tokenizer.ggml.tokens"].data) == len(words) - 1
    assert fields["tokenizer.ggml.padding_token_id"].contents() < len(words) - 1


def test_unused_embedding_rows_get_padding_tokens(tmp_path: Path) -> None:
    run, _ = run_folder(tmp_path / "run", subwords(), layout="uniform", vocab_size=352)
    result = export_run(run, "gguf")
    fields = gguf.GGUFReader(result.path).fields
    assert fields["tokenizer.ggml.tokens"].contents()[320:] == [f"[PAD{index}]" for index in range(320, 352)]
    assert set(fields["tokenizer.ggml.token_type"].contents()[320:]) == {int(gguf.TokenType.UNUSED)}
