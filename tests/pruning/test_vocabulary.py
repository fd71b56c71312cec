"""A pruned vocabulary: any text round-trips as before, and text of kept tokens has the mapped ids and dense logits."""

import json
import random
from collections import Counter
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from prunetune.errors import ConfigError, ModelError
from prunetune.model.loading import demo_file
from prunetune.pruning import vocabulary as vocabulary_module
from prunetune.pruning.vocabulary import (
    BYTE_PIECES,
    KeptVocabulary,
    choose_tokens,
    prune_config,
    prune_model,
    prune_tokenizer,
    token_ids_in,
    vocabulary_tensors,
)
from support.models import tiny
from support.vocabularies import KINDS, SPECIAL, backend, corpus

every_kind = pytest.mark.parametrize("kind", KINDS)
DOMAIN = ("latin", "greek", "code")  # scripts that the data is written in


def reduced(kind: str, size: str = "auto", *, named: tuple[int, ...] = ()) -> tuple[Any, Any, KeptVocabulary]:
    """The original tokenizer, the pruned one and what was kept, by counts of texts of the domain."""
    original = Tokenizer.from_str(backend(kind))
    ids = [token for text in corpus(2, 40, scripts=DOMAIN) for token in original.encode(text).ids]
    values, rows = json.loads(original.to_str()), original.get_vocab_size()
    kept = choose_tokens(values, size, counts=Counter(ids), named_ids=set(named), rows=rows, params=rows)
    return original, Tokenizer.from_str(json.dumps(prune_tokenizer(values, kept))), kept


@pytest.fixture(autouse=True)
def _general_share_of_a_small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_module, "GENERAL_TOKENS", 0)


# -- tokenizers --------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("size", ["auto", "640"])
def test_any_text_decodes_as_with_the_original_tokenizer(kind: str, size: str) -> None:
    original, pruned, kept = reduced(kind, size)
    assert kept.rows < kept.original_rows
    assert pruned.get_vocab_size() == kept.rows
    for text in corpus(3, 2000):
        before, after = original.encode(text), pruned.encode(text)
        assert pruned.decode(after.ids) == original.decode(before.ids)
        assert max(after.ids) < kept.rows
        if kind in ("byte-level", "ignore-merges"):
            assert pruned.decode(after.ids) == text


@every_kind
@pytest.mark.parametrize("size", ["auto", "640"])
def test_text_of_kept_tokens_gets_the_mapped_ids(kind: str, size: str) -> None:
    """Also texts that are made of kept tokens in random order, which no corpus has."""
    original, pruned, kept = reduced(kind, size)
    rng = random.Random(4)
    texts = corpus(5, 1000) + corpus(6, 500, scripts=DOMAIN)
    texts += [original.decode(rng.choices(kept.kept, k=rng.randint(1, 8))) for _ in range(3000)]
    written_in_kept = 0
    for text in texts:
        ids = original.encode(text).ids
        if set(ids) <= kept.new_ids.keys():
            written_in_kept += 1
            assert pruned.encode(text).ids == [kept.new_ids[token] for token in ids]
    assert written_in_kept > 1000


@every_kind
def test_special_tokens_and_template_are_kept_under_their_new_ids(kind: str) -> None:
    original, pruned, kept = reduced(kind, "640", named=(700, 701))
    for token in SPECIAL:
        assert pruned.token_to_id(token) == kept.new_ids[original.token_to_id(token)]
    added = [pruned.token_to_id(token) for token in SPECIAL]
    chat = "<|im_start|>user\nthe fox<|im_end|></s>"
    assert pruned.encode(chat).tokens[:2] == ["<s>", "<|im_start|>"]
    assert [token for token in pruned.encode("the", "fox").tokens if token in SPECIAL] == ["<s>", "</s>"]
    assert [token for token in pruned.encode("the", "fox").ids if token in added] == [added[1], added[2]]
    assert {700, 701} <= kept.new_ids.keys()


@every_kind
def test_number_of_rows_is_a_multiple_of_64_and_all_data_is_written_in_kept_tokens(kind: str) -> None:
    original, _, kept = reduced(kind)
    assert kept.rows % 64 == 0
    ids = {token for text in corpus(2, 40, scripts=DOMAIN) for token in original.encode(text).ids}
    assert ids <= kept.new_ids.keys()
    assert reduced(kind, "0.8")[2].rows == -(-round(0.8 * kept.original_rows) // 64) * 64


@every_kind
def test_size_too_small_for_what_has_to_stay_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"budget\.vocab 5: \d+ tokens have to stay .* set \d+ or more"):
        reduced(kind, "5")


def test_bpe_token_is_kept_with_what_the_tokenizer_makes_on_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rank: b and c are merged first, so abc needs bc, and not ab."""
    monkeypatch.setattr(vocabulary_module, "ROWS_MULTIPLE", 1)
    vocab = {text: token for token, text in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    values = json.loads(Tokenizer(models.BPE(vocab=vocab, merges=merges)).to_str())
    kept = choose_tokens(values, "5", counts={vocab["abc"]: 1}, named_ids=(), rows=6, params=1)
    assert [token for token in vocab if vocab[token] in kept.new_ids] == ["a", "b", "c", "bc", "abc"]
    pruned = prune_tokenizer(values, kept)["model"]
    assert (pruned["vocab"], pruned["merges"]) == (
        {"a": 0, "b": 1, "c": 2, "bc": 3, "abc": 4}, [["b", "c"], ["a", "bc"]]
    )  # fmt: skip


def test_unigram_text_of_kept_pieces_does_not_become_unknown_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown letter costs 10 more than the least likely piece: without x, <unk> and bcd would beat ab and cd."""
    monkeypatch.setattr(vocabulary_module, "ROWS_MULTIPLE", 1)
    pieces = [("x", -40.0), ("a", -39.0), ("ab", -15.0), ("cd", -15.0), ("bcd", -1.0)]
    pieces += [*((piece, 0.0) for piece in BYTE_PIECES), ("<unk>", 0.0)]
    original = Tokenizer(models.Unigram(pieces, unk_id=len(pieces) - 1, byte_fallback=True))
    counts, rows = {2: 9, 3: 9, 4: 9}, len(pieces)
    values = json.loads(original.to_str())
    kept = choose_tokens(values, str(rows - 1), counts=counts, named_ids=(), rows=rows, params=1)
    pruned = Tokenizer.from_str(json.dumps(prune_tokenizer(values, kept)))
    assert pruned.token_to_id("a") is None
    assert pruned.encode("abcd").tokens == original.encode("abcd").tokens == ["ab", "cd"]
    assert pruned.encode("aé").tokens == ["<0x61>", "<0xC3>", "<0xA9>"]


@pytest.mark.parametrize("kind", ["WordPiece", "WordLevel"])
def test_tokenizer_whose_words_would_be_unknown_is_refused(kind: str) -> None:
    values = {"model": {"type": kind, "vocab": {"a": 0}}}
    with pytest.raises(ModelError, match=f"a {kind} tokenizer cannot be pruned"):
        choose_tokens(values, "auto", counts={}, named_ids=(), rows=1, params=1)


def test_token_that_only_the_tokenizer_has_keeps_its_place_after_the_rows() -> None:
    """Gemma 3 has an added token for images, and its text models have no row for it."""
    values = json.loads(backend("byte-level"))
    rows = len(values["model"]["vocab"])
    values["added_tokens"].append(values["added_tokens"][-1] | {"id": rows, "content": "<image>"})
    kept = choose_tokens(values, "400", counts={}, named_ids=(), rows=rows, params=1)
    assert (kept.rows, len(kept.kept), kept.new_ids[rows]) == (448, 449, 448)
    assert Tokenizer.from_str(json.dumps(prune_tokenizer(values, kept))).token_to_id("<image>") == 448


def test_smollm2_keeps_its_tokens_on_texts_of_kept_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real tokenizer, with 49,152 tokens."""
    file = demo_file()
    original = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer
    ids = [token for text in corpus(2, 40, scripts=DOMAIN) for token in original.encode(text).ids]
    values = json.loads(original.to_str())
    kept = choose_tokens(values, "auto", counts=Counter(ids), named_ids=(0, 1, 2), rows=49152, params=1)
    assert 12288 < kept.rows < 13000
    monkeypatch.undo()
    at_least = choose_tokens(values, "auto", counts=Counter(ids), named_ids=(0, 1, 2), rows=49152, params=1)
    assert 32768 < at_least.rows < 33500
    pruned = Tokenizer.from_str(json.dumps(prune_tokenizer(values, kept)))
    texts = corpus(3, 1000) + corpus(4, 1000, scripts=DOMAIN)
    rewritten = [text for text in texts if not set(original.encode(text).ids) <= kept.new_ids.keys()]
    assert len(rewritten) < 1500
    for text in texts:
        assert pruned.decode(pruned.encode(text).ids) == original.decode(original.encode(text).ids) == text
        if text not in rewritten:
            assert pruned.encode(text).ids == [kept.new_ids[token] for token in original.encode(text).ids]


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_logits_are_the_dense_ones_of_the_kept_tokens(family: str, tied: bool) -> None:
    original, pruned, kept = reduced("byte-level", "640")
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [2, 4]}
    model = tiny(family, vocab_size=kept.original_rows, tie_word_embeddings=tied, **ids)
    texts = [text for text in corpus(7, 60, scripts=DOMAIN) if set(original.encode(text).ids) <= kept.new_ids.keys()]
    tokens = [original.encode(text).ids[:24] for text in texts]
    with torch.inference_mode():
        dense = [model(torch.tensor([row])).logits[..., list(kept.kept)] for row in tokens]
        prune_model(model, kept)
        logits = [model(torch.tensor([pruned.encode(text).ids[:24]])).logits for text in texts]
    for expected, found in zip(dense, logits, strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) is tied
    assert model.config.vocab_size == head.out_features == embedding.num_embeddings == kept.rows
    assert model.config.eos_token_id == [kept.new_ids[2], kept.new_ids[4]]


def test_configuration_has_new_ids_wherever_it_names_tokens() -> None:
    kept = KeptVocabulary((0, 2, 5, 9), rows=4, original_rows=10, original_params=1)
    values = {
        "vocab_size": 10, "hidden_size": 9, "eos_token_id": [2, 9], "pad_token_id": None, "bos_token_id": -1,
        "suppress_tokens": [5], "bad_words_ids": [[2, 5], [9]],
        "text_config": {"vocab_size": 10, "image_token_index": 5, "num_hidden_layers": 2},
    }  # fmt: skip
    assert token_ids_in(values) == {2, 5, 9}
    assert prune_config(values, kept) == {
        "vocab_size": 4, "hidden_size": 9, "eos_token_id": [1, 3], "pad_token_id": None, "bos_token_id": -1,
        "suppress_tokens": [2], "bad_words_ids": [[1, 2], [3]],
        "text_config": {"vocab_size": 4, "image_token_index": 2, "num_hidden_layers": 2},
    }  # fmt: skip


def test_model_with_embeddings_in_every_layer_is_refused() -> None:
    model = tiny()
    model.config.vocab_size_per_layer_input = 97
    with pytest.raises(ModelError, match="embeddings of tokens in every layer"):
        vocabulary_tensors(model)
