"""A run with `budget.vocab`: the reduced dense model in the run folder, and all that reads it."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunetune import export_run
from prunetune.compare.run import compare
from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.errors import ConfigError, ModelError, RunFolderError
from prunetune.evaluation.suites.open_model import dense_model_of_run, reference_of_run
from prunetune.export.gguf import llamacpp
from prunetune.export.source import ExportSource
from prunetune.manifest import Manifest
from prunetune.model.reduced_vocabulary import read_vocabulary
from prunetune.pipeline import prepare as prepare_module
from prunetune.pipeline.run import run
from prunetune.pruning.vocabulary import KeptVocabulary
from support.data import write_lines
from support.models import tiny
from support.vocabularies import corpus, fast

RECIPE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "budget": {"keep": 0.7, "align": 8, "vocab": 0.6},
    "train": {"steps": 4, "batch_size": 2, "learning_rate": 1e-3},
    "search": {"init_batches": 1},
    "evaluate": {"drift": False, "limit": 4, "generate_limit": 1, "max_new_tokens": 4},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tokenizer = fast("byte-level")
    ids = {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": [2, 4]}
    model = tiny(vocab_size=len(tokenizer) + 20, tie_word_embeddings=True, max_position_embeddings=512, **ids)
    model.save_pretrained(folder / "dense", max_shard_size="100KB")
    tokenizer.save_pretrained(folder / "dense")
    texts = corpus(8, 60, scripts=("latin", "code"))
    rows = [{"prompt": text, "completion": f" {text[:20]}x", "task": "copy"} for text in texts[:30]]
    write_lines(folder / "rows.jsonl", *rows, *({"text": f"{text} end", "task": "prose"} for text in texts[30:]))
    return folder


def config_of(source: Path, out: Path, **changes: Any) -> RunConfig:
    paths = {"model": str(source / "dense"), "data": {"train": [str(source / "rows.jsonl")]}, "out": str(out)}
    return from_mapping(merge_mappings(merge_mappings(RECIPE, paths), changes))


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(config_of(source, tmp_path_factory.mktemp("finished") / "run"))


def kept_of(folder: Path) -> KeptVocabulary:
    return read_vocabulary(folder / "base")


def test_base_folder_holds_the_kept_rows_of_the_dense_model(source: Path, finished: Path) -> None:
    """All other weights are the same to the bit, and stock transformers opens it."""
    kept = kept_of(finished)
    dense = AutoModelForCausalLM.from_pretrained(source / "dense", dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(finished / "base", dtype="auto")
    before, after = dense.state_dict(), base.state_dict()
    assert kept.rows < kept.original_rows
    for name, tensor in after.items():
        whole = before[name]
        assert torch.equal(tensor, kept.gather(whole) if whole.shape[0] == kept.original_rows else whole)
    text = "the quick brown fox def f(x)"
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (source / "dense", finished / "base"))
    assert new(text)["input_ids"] == [kept.new_ids[token] for token in old(text)["input_ids"]]
    chat = [{"role": "user", "content": "naïve 😀"}]
    assert new.apply_chat_template(chat, tokenize=False) == old.apply_chat_template(chat, tokenize=False)
    assert base.generation_config.eos_token_id == [kept.new_ids[2], kept.new_ids[4]]
    with torch.inference_mode():
        logits = dense(torch.tensor([old(text)["input_ids"]])).logits[..., list(kept.kept)]
        assert torch.allclose(base(torch.tensor([new(text)["input_ids"]])).logits, logits, atol=1e-5)


def test_finished_model_opens_in_transformers_with_the_kept_tokens(finished: Path) -> None:
    kept = kept_of(finished)
    model = AutoModelForCausalLM.from_pretrained(finished / "model", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == kept.rows
    for text in corpus(9, 50):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert (finished / "evaluation" / "pruned.json").is_file()


def test_manifest_and_card_name_the_original_model_and_both_numbers_of_tokens(source: Path, finished: Path) -> None:
    facts = Manifest.from_json((finished / "manifest.json").read_text()).model
    kept = kept_of(finished)
    original = AutoModelForCausalLM.from_pretrained(source / "dense")
    assert facts.name == str(source / "dense")
    assert (facts.tokens, facts.kept_tokens) == (kept.original_rows, kept.rows)
    assert facts.params == sum(parameter.numel() for parameter in original.parameters())
    assert facts.params - facts.reduced_params == 48 * (kept.original_rows - kept.rows)
    card = (finished / "model" / "README.md").read_text()
    assert f"{kept.rows:,} of {kept.original_rows:,} tokens" in card
    history = json.loads((finished / "model" / "history.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(finished / "model", trust_remote_code=True)
    assert history[-1]["params"] == sum(parameter.numel() for parameter in model.parameters())


def test_reference_of_a_run_is_the_dense_model_with_the_kept_tokens(finished: Path) -> None:
    assert dense_model_of_run(str(finished)) == str(finished / "base")
    assert reference_of_run(str(finished))[0] == str(finished / "tuned" / "adapter")
    assert ExportSource.open(finished).base == str(finished / "base")


class Killed(Exception):
    """In place of a signal, which would end the tests as well."""


@pytest.mark.parametrize("where", ["before base", "while base is written", "after base"])
def test_killed_and_resumed_run_is_the_uninterrupted_one(
    where: str, source: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if where == "before base":
            patch.setattr(prepare_module, "write_reduced_model", interrupt)
        elif where == "while base is written":
            patch.setattr("prunetune.model.reduced_vocabulary.write_checksums", interrupt)
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a signal would leave the partial folder
        else:
            patch.setattr("prunetune.pipeline.run.train", interrupt)
        with pytest.raises(Killed):
            run(config_of(source, tmp_path / "run"))
    assert (tmp_path / "run" / "base").is_dir() is (where == "after base")
    assert run(config_of(source, tmp_path / "run"), resume=True) == tmp_path / "run"
    for folder in ("base", "model"):
        files = sorted((finished / folder).glob("*.safetensors"))
        assert files
        for file in files:
            expected, found = load_file(file), load_file(tmp_path / "run" / folder / file.name)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert kept_of(tmp_path / "run") == kept_of(finished)


def test_resume_with_a_changed_original_or_a_changed_base_is_refused(source: Path, tmp_path: Path) -> None:
    dense = Path(shutil.copytree(source, tmp_path / "source"))
    folder = run(config_of(dense, tmp_path / "run"))
    vocabulary = folder / "base" / "vocabulary.json"
    text = vocabulary.read_text()
    vocabulary.write_text(text.replace("[0, 1,", "[0, 2,"))
    shutil.rmtree(folder / "model")
    with pytest.raises(ModelError, match=r"vocabulary\.json is not what was written"):
        run(config_of(dense, folder), resume=True)
    vocabulary.write_text(text)
    (dense / "dense" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"tokenizer_config\.json changed"):
        run(config_of(dense, folder), resume=True)


def test_several_sizes_share_one_reduced_model(source: Path, tmp_path: Path) -> None:
    folder = run(config_of(source, tmp_path / "run", budget={"keep": [0.8, 0.6]}, evaluate={"dense_tuned": False}))
    kept = kept_of(folder)
    for size in ("0.8", "0.6"):
        assert not (folder / "sizes" / size / "base").exists()
        assert dense_model_of_run(str(folder / "sizes" / size)) == str(folder / "base")
        model = AutoModelForCausalLM.from_pretrained(folder / "sizes" / size / "model", trust_remote_code=True)
        assert model.config.vocab_size == kept.rows


def test_pruned_model_is_pruned_again_with_fewer_tokens(source: Path, finished: Path, tmp_path: Path) -> None:
    again = {"model": str(finished / "model"), "trust_remote_code": True, "budget": {"vocab": "384"}}
    folder = run(config_of(source, tmp_path / "run", **again))
    assert kept_of(folder).rows == 384
    history = json.loads((folder / "model" / "history.json").read_text())
    assert [entry["model"] for entry in history] == [str(source / "dense"), str(finished / "model")]


def test_comparison_with_a_pruned_vocabulary_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"budget\.vocab: all methods of a comparison"):
        compare(config_of(source, tmp_path / "run"))


def test_gguf_export_has_the_kept_tokens_and_opens_in_llama_cpp(finished: Path) -> None:
    """Where the run began with a .gguf file, its tokenizer is not the model's any more, and is not copied."""
    result = export_run(finished, "gguf")
    assert "tokenizer keys made from tokenizer.json, pre-tokenizer gpt-2" in result.notes
    assert [check.ran for check in result.checks] == [True, bool(llamacpp.runtime_version())]
    tokens = gguf.GGUFReader(result.path).fields["tokenizer.ggml.tokens"]
    assert len(tokens.data) == kept_of(finished).rows


def test_report_has_both_numbers_of_tokens_and_bits_per_byte_of_texts(finished: Path) -> None:
    kept, page = kept_of(finished), (finished / "report.html").read_text()
    assert f"{kept.original_rows:,} → {kept.rows:,}".replace(",", "") in page.replace(",", "").replace("\u202f", "")
    scores = json.loads((finished / "evaluation" / "pruned.json").read_text())["tasks"]["prose"]
    nats = sum(item["scores"]["nll"] * item["scores"]["tokens"] for item in scores["items"])
    size = sum(item["scores"]["bytes"] for item in scores["items"])
    assert scores["scores"]["bits_per_byte"]["value"] == pytest.approx(nats / size / math.log(2))
