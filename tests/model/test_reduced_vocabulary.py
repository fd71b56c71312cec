"""The written folder of a model with fewer tokens: stock classes open it, with the tokens and logits it should have."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

from prunetune.errors import ModelError
from prunetune.model.loading import load_meta_model, load_tokenizer
from prunetune.model.reduced_vocabulary import choose_vocabulary, tokenizer_json, write_reduced_model
from support.models import tiny
from support.vocabularies import corpus, fast

TEXT = "the quick brown fox"
CLASSES = {  # each builds its own tokenizer on opening
    "LlamaTokenizer": "byte-fallback",
    "GemmaTokenizer": "byte-fallback",
    "Qwen2Tokenizer": "byte-level",
    "GPT2Tokenizer": "byte-level",
    "T5Tokenizer": "unigram",
}


def counts_of(tokenizer: object) -> Counter[int]:
    texts = [TEXT, *corpus(2, 40, scripts=("latin",))]
    return Counter(token for text in texts for token in tokenizer(text)["input_ids"])  # type: ignore[operator]


@pytest.mark.parametrize("name", CLASSES)
def test_tokenizer_reopens_with_its_own_class_and_the_mapped_ids(name: str, tmp_path: Path) -> None:
    tokenizer = fast(CLASSES[name])
    tiny(vocab_size=len(tokenizer) + 5).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
    dense = str(tmp_path / "dense")
    old = load_tokenizer(dense)
    kept = choose_vocabulary(dense, load_meta_model(dense), old, "640", counts_of(old))
    write_reduced_model(dense, kept, tmp_path / "base")
    new = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert type(new).__name__ == type(old).__name__ == name
    assert new(TEXT)["input_ids"] == [kept.new_ids[token] for token in old(TEXT)["input_ids"]]
    for text in corpus(3, 300):
        assert new.decode(new(text)["input_ids"]) == old.decode(old(text)["input_ids"])


def test_multimodal_model_keeps_its_image_tokens_and_logits(tmp_path: Path) -> None:
    """Its files name the embedding otherwise than its class, and its tokenizer has a token more than rows."""
    tokenizer = fast("byte-fallback")
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<image>"]})
    text = {
        "vocab_size": rows, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, image_token_index=rows - 1
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    dense, base = str(tmp_path / "dense"), tmp_path / "base"
    model.save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    kept = choose_vocabulary(dense, load_meta_model(dense), load_tokenizer(dense), "512", counts_of(tokenizer))
    write_reduced_model(dense, kept, base)
    reduced, new = AutoModelForImageTextToText.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    assert (kept.rows, new.convert_tokens_to_ids("<image>")) == (512, 512)
    assert reduced.config.image_token_id == kept.new_ids[rows - 1]
    assert reduced.config.text_config.vocab_size == 512
    with torch.inference_mode():
        expected = model(torch.tensor([tokenizer(TEXT)["input_ids"]])).logits[..., list(kept.kept[:512])]
        assert torch.equal(reduced(torch.tensor([new(TEXT)["input_ids"]])).logits, expected)


def test_tokenizer_with_code_of_its_own_is_refused() -> None:
    with pytest.raises(ModelError, match="the tokenizer of dense is object, which has code of its own"):
        tokenizer_json("dense", object())
