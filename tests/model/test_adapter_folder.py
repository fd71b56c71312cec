"""A folder with a LoRA adapter opens as its base with the adapter merged; other adapters are refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from prunetune.errors import ModelError
from prunetune.model import adapter_folder
from prunetune.model.adapter_folder import write_adapter_folder
from prunetune.model.checksums import CHECKSUM_FILE
from prunetune.model.loading import load_meta_model, load_model_and_tokenizer
from prunetune.utils.failures import explain_failure
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


def edited(folder: Path, file: str, **changes: Any) -> str:
    """An adapter folder with changes of its configuration."""
    (folder / CHECKSUM_FILE).unlink(missing_ok=True)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


ENDLESS = "(a|a)*(.|.)*(.|.)*b"  # a pattern that takes forever on a module's name


def test_adapter_of_a_stranger_neither_hangs_nor_goes_in_circles(base: Path, tmp_path: Path) -> None:
    write_adapter(base, tmp_path / "own", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    expected = load_model_and_tokenizer(str(tmp_path / "own"), **ON_CPU).model(tokens()).logits

    def changed(name: str = "other", **changes: Any) -> str:
        shutil.copytree(tmp_path / "own", tmp_path / name, dirs_exist_ok=True)
        return edited(tmp_path / name, "adapter_config.json", **changes)

    for patterns in ({"target_modules": ENDLESS}, {"exclude_modules": ENDLESS}):
        loaded = load_model_and_tokenizer(changed(**patterns), **ON_CPU)
        assert relative(loaded.model(tokens()).logits, expected) < 1e-6
    refused = {
        "alpha_pattern": ({ENDLESS: 8}, r"it holds the pattern \(a"),
        "rank_pattern": (5, "not a mapping"),
        "layer_replication": ([[0, 3]] * 1000, "LORA with layer_replication, and only LoRA"),
        "base_model_name_or_path": ("a\0b", "embedded null byte"),
    }
    for key, (value, message) in refused.items():
        with pytest.raises(ModelError, match=message) as error:
            load_meta_model(changed(**{key: value}))
        assert "\n" not in str(error.value)
    changed("third", base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(ModelError, match="names no base"):
        load_meta_model(changed(base_model_name_or_path=str(tmp_path / "third")))


def test_adapter_of_a_run_is_verified(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapted = write_adapter(base, tmp_path / "peft", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    write_adapter_folder(adapted.base_model.model, folder, str(base))
    load_meta_model(str(folder))
    content = bytearray((folder / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 64
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"adapter_model.safetensors is not what was written"):
        load_meta_model(str(folder))


def test_adapter_is_merged_anew_into_another_commit_of_its_base(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub name is no folder whose files could be compared."""
    write_adapter(base, tmp_path / "own", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    folder, merged = edited(tmp_path / "own", "adapter_config.json", base_model_name_or_path="owner/name"), []
    monkeypatch.setattr(adapter_folder, "_merge", lambda *_: None)
    for commit in ("1", "1", "2"):
        monkeypatch.setattr(
            adapter_folder, "cached_hub_file", lambda *_, at=commit: Path(f"snapshots/{at}/config.json")
        )
        merged.append(adapter_folder.merge_adapter_folder(folder, Path(folder)))
    assert merged[0] == merged[1] != merged[2]


def test_cache_that_is_a_file_is_told_in_one_line(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(base, tmp_path / "own", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRUNETUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(NotADirectoryError) as error:
        load_meta_model(str(tmp_path / "own"))
    assert "leads through a file: name another path" in (explain_failure(error.value) or "")
