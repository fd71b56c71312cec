"""Evaluation of a .gguf file through llama.cpp: generated answers and likelihoods of choices."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from prunetune.data.records import Record
from prunetune.errors import MissingPackage, ModelError
from prunetune.evaluation.suites import LocalModel, evaluate_suite, parse_suite
from prunetune.evaluation.suites.cache import AnswerStore, CachedBackend
from prunetune.evaluation.suites.llamacpp import LlamaCpp
from prunetune.evaluation.suites.open_model import open_backend
from prunetune.evaluation.suites.options import EvalOptions
from prunetune.evaluation.suites.protocol import BackendError, GenerationSettings
from prunetune.export.gguf.write import write_gguf
from prunetune.export.source import ExportSource
from support.data import subwords, write_lines
from support.export import run_folder

RECORDS = [
    Record(kind="completion", prompt=prompt, completion=choices[0], choices=choices, answer=0)
    for prompt, choices in (
        ("The capital of France is", (" Paris", " London", " a small town in the north")),
        ("Two plus two is", (" four", " five", " blue")),
        ("Water is made of hydrogen and", (" oxygen", " iron", " nitrogen")),
    )
]


def test_missing_or_broken_file_is_a_one_line_error(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"llama\.cpp cannot open it"):
        LlamaCpp(tmp_path / "broken.gguf", "").run_requests("generate", RECORDS, GenerationSettings(), lambda _: None)


def test_missing_llama_cpp_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MissingPackage, match="pip install 'xllamacpp>="):
        LlamaCpp(tmp_path / "any.gguf", "").run_requests("loglikelihood", RECORDS, GenerationSettings(), lambda _: None)


def test_answers_of_a_gguf_belong_to_a_version_of_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    prints = set()
    for name in ("1.0", "1.0", "1.1"):
        monkeypatch.setattr("prunetune.evaluation.suites.open_model.version", lambda _, name=name: name)
        backend = open_backend(str(tmp_path / "a.gguf"), EvalOptions(device="cpu"), AnswerStore(tmp_path / "cache"))
        assert isinstance(backend, CachedBackend)
        prints.add(backend.fingerprint)
    assert len(prints) == 2


def test_texts_chats_and_lm_eval_are_refused(tmp_path: Path) -> None:
    model = LlamaCpp(tmp_path / "any.gguf", "")
    with pytest.raises(BackendError, match="no likelihood of texts"):
        model.run_requests("nll", [Record(kind="text", completion="a")], GenerationSettings(), lambda _: None)
    with pytest.raises(BackendError, match="no likelihood of texts and chats"):
        model.run_requests("loglikelihood", RECORDS, GenerationSettings(template="chat"), lambda _: None)
    with pytest.raises(BackendError, match="need the weights"):
        model.model_and_tokenizer()


def test_tiny_gguf_answers_as_its_weights_do_without_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("xllamacpp")
    run, dense = run_folder(tmp_path / "run", subwords())
    write_gguf(ExportSource.open(run), tmp_path / "a.gguf", "f32")
    model, local = LlamaCpp(tmp_path / "a.gguf", ""), LocalModel(dense, subwords())
    settings = GenerationSettings(max_new_tokens=4)
    capfd.readouterr()
    ours = model.run_requests("loglikelihood", RECORDS, settings, lambda _: None)
    nlls = model.run_requests("nll", RECORDS, settings, lambda _: None)
    texts = model.run_requests("generate", RECORDS, settings, lambda _: None)
    assert capfd.readouterr() == ("", "")
    for mine, other in zip(ours, local.run_requests("loglikelihood", RECORDS, settings, lambda _: None), strict=True):
        assert [tokens for _, tokens in mine] == [tokens for _, tokens in other]
        assert [value for value, _ in mine] == pytest.approx([value for value, _ in other], rel=0.001)
    for mine, other in zip(nlls, local.run_requests("nll", RECORDS, settings, lambda _: None), strict=True):
        assert mine == pytest.approx(other, rel=0.001)
    assert texts == local.run_requests("generate", RECORDS, settings, lambda _: None)


@pytest.mark.slow
def test_real_gguf_answers_as_its_weights_do(tmp_path: Path) -> None:
    """llama.cpp rounds the inputs of 4-bit weights, so likelihoods agree to some tenths of a nat."""
    pytest.importorskip("xllamacpp")
    from prunetune.model.loading import demo_file, load_model_and_tokenizer

    model = open_backend(str(demo_file()), EvalOptions(cache=False))
    dense = load_model_and_tokenizer("demo", device=torch.device("cpu"), dtype=torch.float32)
    local = LocalModel(dense.model, dense.tokenizer)
    ours = model.run_requests("loglikelihood", RECORDS, GenerationSettings(), lambda _: None)
    theirs = local.run_requests("loglikelihood", RECORDS, GenerationSettings(), lambda _: None)
    for mine, other in zip(ours, theirs, strict=True):
        assert [tokens for _, tokens in mine] == [tokens for _, tokens in other]
        assert [value for value, _ in mine] == pytest.approx([value for value, _ in other], abs=0.5, rel=0.05)
    assert model.run_requests("generate", RECORDS[:1], GenerationSettings(max_new_tokens=3), lambda _: None)[
        0
    ].startswith("Paris")
    nll = model.run_requests("nll", RECORDS[:1], GenerationSettings(), lambda _: None)[0]
    assert nll == pytest.approx([-ours[0][0][0], 1, 6], abs=0.01)


@pytest.mark.slow
def test_answers_of_a_gguf_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    from prunetune.model.loading import demo_file

    monkeypatch.setenv("PRUNETUNE_CACHE", str(tmp_path))
    write_lines(
        tmp_path / "a.jsonl", {"prompt": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}
    )
    suite = parse_suite({"tasks": {"t": {"data": "a.jsonl", "scorer": "accuracy"}}}, folder=tmp_path)
    misses = []
    for _ in range(2):
        model = open_backend(str(demo_file()), EvalOptions())
        assert isinstance(model, CachedBackend)
        assert evaluate_suite(model, suite).tasks["t"].scores["accuracy"].value == 1.0
        misses.append(model.cache_misses)
    assert misses == [1, 0]
