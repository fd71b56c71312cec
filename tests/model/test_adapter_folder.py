"""A folder with a LoRA adapter opens as its base with the adapter merged; other adapters are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from prunetune.errors import ModelError
from prunetune.model.loading import load_meta_model, load_model_and_tokenizer
from support.evaluation import characters, speaker
from support.models import relative, tokens

ON_CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}


# PEFT reads a property that transformers deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:Setting `save_emb:UserWarning"
)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRUNETUNE_CACHE", str(tmp_path / "cache"))
    speaker().save_pretrained(tmp_path / "base")
    characters().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write_adapter(base: Path, folder: Path, config: Any, *, grow: int = 0) -> Any:
    """Write a random adapter as PEFT does; returns the model with the adapter beside its weights."""
    model = load_model_and_tokenizer(str(base), **ON_CPU).model
    if grow:
        model.resize_token_embeddings(model.config.vocab_size + grow)
    model.config.name_or_path = str(base)
    torch.manual_seed(1)
    adapted: Any = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize("grow", [0, 5])
def test_adapter_folder_opens_merged(grow: int, base: Path, tmp_path: Path) -> None:
    """Also with an embedding that was resized and saved beside the adapter."""
    saved = ["embed_tokens", "lm_head"] if grow else None
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", modules_to_save=saved)
    adapted = write_adapter(base, tmp_path / "adapter", config, grow=grow)
    with torch.no_grad():
        expected = adapted(tokens()).logits
        loaded = load_model_and_tokenizer(str(tmp_path / "adapter"), **ON_CPU)
        assert relative(loaded.model(tokens()).logits, expected) <= 1e-5
    assert loaded.model.config.vocab_size == load_meta_model(str(base)).config.vocab_size + grow
    assert load_meta_model(str(tmp_path / "adapter")).config.model_type == "llama"
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    assert len(list((tmp_path / "cache" / "adapters").iterdir())) == 1


def test_adapter_that_cannot_be_merged_is_refused_in_one_line(base: Path, tmp_path: Path) -> None:
    def refusal(name: str, **changes: Any) -> str:
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        with pytest.raises(ModelError) as refused:
            load_meta_model(str(tmp_path / name))
        assert "\n" not in str(refused.value)
        return str(refused.value)

    write_adapter(base, tmp_path / "ia3", IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    write_adapter(base, tmp_path / "lora", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert "an adapter of type IA3, and only LoRA is merged here: merge it first" in refusal("ia3")
    assert "an adapter that does not fit" in refusal("lora", r=8)
    assert "an adapter of ./gone, which is not here" in refusal("lora", base_model_name_or_path="./gone")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "lora: an adapter, and its base cannot be opened (" in refusal(
        "lora", base_model_name_or_path=str(tmp_path / "empty")
    )
    assert "names no base" in refusal("lora", base_model_name_or_path=None)
    assert "names no base" in refusal("lora", base_model_name_or_path=str(tmp_path / "lora"))
    (tmp_path / "lora" / "adapter_model.safetensors").rename(tmp_path / "lora" / "adapter_model.bin")
    assert "an adapter without adapter_model.safetensors; save it again" in refusal("lora")


def test_folder_above_an_adapter_is_refused_by_naming_the_adapter(base: Path, tmp_path: Path) -> None:
    """As Trainer leaves it: adapters in checkpoint-N, the model's folder named."""
    step = tmp_path / "out" / "checkpoint-5"
    write_adapter(base, step, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match=r"the folder has no config\.json; name one in it that has, .*checkpoint-5$"):
        load_meta_model(str(tmp_path / "out"))
