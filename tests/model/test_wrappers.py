"""Multimodal models: the text model is pruned inside its wrapper, and the written folder opens as the wrapper."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from prunetune import cut, find_sites, masked
from prunetune.errors import ConfigError
from prunetune.export import selfcheck
from prunetune.export.checkpoint import kv_groups_validator, write_checkpoint
from prunetune.export.formats import ExportOptions, export_run
from prunetune.model.loading import load_meta_model, load_model_and_tokenizer
from prunetune.pipeline.prepare import prepare
from prunetune.pipeline.run import run
from prunetune.pruning.sites import lora_target_modules
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.select import select
from prunetune.utils.console import SilentConsole
from support.again import ReaderHere, recipe
from support.evaluation import characters, write_model_and_rows
from support.models import relative, with_lora

ON_CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
IN_TEXT_MODEL = re.compile(r"\b(language|text)_model\.(model\.)?layers\.")
IMAGE = 96  # the token that stands for a piece of an image
TEXT = {
    "vocab_size": 259, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "max_position_embeddings": 128,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 14, "out_hidden_size": 48,
    "window_size": 28, "fullatt_block_indexes": [0],
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
WRAPPERS: dict[str, dict[str, Any]] = {
    "llava": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION, "image_token_index": IMAGE},
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8, "image_size": 56},
        "image_token_index": IMAGE,
    },
    "gemma3": {
        "text_config": TEXT | {"query_pre_attn_scalar": 8, "sliding_window": 8, "tie_word_embeddings": True},
        "vision_config": VISION | {"vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
    },
    "smolvlm": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION,
        "image_token_id": IMAGE,
        "scale_factor": 1,
    },
    "qwen2_vl": {
        "text_config": TEXT | MROPE | {"hidden_size": 64},
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "patch_size": 14},
        "image_token_id": IMAGE,
    },
    "qwen3_vl": {
        "text_config": TEXT | MROPE,
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 14,
            "out_hidden_size": 48,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        "image_token_id": IMAGE,
    },
    "llama4": {
        "text_config": TEXT | {"intermediate_size_mlp": 64, "num_local_experts": 2},
        "vision_config": VISION
        | {
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "pixel_shuffle_ratio": 1.0,
            "intermediate_size": 32,
        },
        "image_token_index": IMAGE,
    },
    "qwen2_5_vl": {
        "text_config": TEXT | MROPE | {"hidden_size": 64},
        "vision_config": QWEN_VISION | {"out_hidden_size": 64},
        "image_token_id": IMAGE,
        "vision_start_token_id": 94,
        "vision_end_token_id": 95,
    },
}


def wrapper(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[kind](**WRAPPERS[kind])).eval()
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and "vision" not in name and "visual" not in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def with_image(kind: str, seed: int = 0) -> dict[str, Any]:
    """Tokens with an image among them, as the processor of a kind gives them."""
    generator = torch.Generator().manual_seed(seed)
    pixels, pieces = torch.randn(1, 3, 28, 28, generator=generator), 4
    inputs: dict[str, Any] = {"pixel_values": pixels}
    if kind == "mistral3":
        pixels = torch.randn(1, 3, 56, 56, generator=generator)
        inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[56, 56]])}
    if kind == "smolvlm":
        inputs = {"pixel_values": pixels[None]}
    if kind.startswith("qwen"):
        pixels, pieces = torch.randn(4, 3 * 2 * 14 * 14, generator=generator), 1
        inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2, 2]])}
    ids = torch.tensor([[1, 5, *[IMAGE] * pieces, 9, 10, 11, 12]])
    if kind in ("qwen2_vl", "qwen3_vl"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.inference_mode()
def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("kind", WRAPPERS)
def test_text_model_is_pruned_inside_its_wrapper(kind: str, tmp_path: Path) -> None:
    dense = wrapper(kind)
    dense.save_pretrained(tmp_path / "dense")
    characters().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "preprocessor_config.json").write_text("{}")
    sites = find_sites(load_meta_model(str(tmp_path / "dense")))
    assert {site.layer for site in sites} == {0, 1, 2}
    assert {str(site.kind) for site in sites} == ({"attention"} if kind == "llama4" else {"attention", "mlp"})
    assert all(IN_TEXT_MODEL.search(name) for name in lora_target_modules(dense))
    generator = torch.Generator().manual_seed(1)
    scores = {site.name: torch.rand(site.units, generator=generator) for site in sites}
    constraints = PlanConstraints("uniform", align=8, allows_groups=kv_groups_validator(dense.config))
    plan = select(scores, sites, 0.55, constraints)
    loaded = load_model_and_tokenizer(str(tmp_path / "dense"), **ON_CPU)
    model = with_lora(loaded.model)
    inputs, whole = with_image(kind), {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    assert relative(logits(dense, inputs), logits(dense, with_image(kind, seed=1))) > 1e-3, "the image must matter"
    with masked(model, plan, sites=sites):
        expected = logits(model, inputs)
    cut(model, plan, sites=sites)
    assert relative(logits(model, inputs), expected) <= 1e-5
    written = write_checkpoint(model, loaded.tokenizer, plan, sites, tmp_path / "result", layout="uniform", card="")
    assert written.architecture == type(dense).__name__
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "result").eval()
    assert type(opened) is type(dense)
    assert opened.num_parameters() < dense.num_parameters()
    assert relative(logits(opened, inputs), expected) <= 1e-5
    for name, tensor in opened.state_dict().items():
        if not IN_TEXT_MODEL.search(name):
            assert torch.equal(tensor, whole[name]), name


def test_run_of_a_multimodal_model_writes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layout uniform, with the processor's files and a card that opens it; other formats are refused in one line."""
    write_model_and_rows(tmp_path, 6)
    wrapper("gemma3").save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "preprocessor_config.json").write_text("{}")
    run(recipe(tmp_path, tmp_path / "dense", "run", layout="uniform"))
    result = tmp_path / "run" / "model"
    assert (result / "preprocessor_config.json").is_file()
    assert "AutoModelForImageTextToText.from_pretrained" in (result / "README.md").read_text()
    config = json.loads((result / "config.json").read_text())
    assert config["text_config"]["intermediate_size"] < TEXT["intermediate_size"]
    assert config["architectures"] == ["Gemma3ForConditionalGeneration"]
    monkeypatch.setattr(selfcheck, "FreshReader", ReaderHere)  # the run has had its check in a fresh one
    exported = export_run(tmp_path / "run", to="uniform", options=ExportOptions(dtype="bf16"))
    assert json.loads((exported.path / "config.json").read_text())["text_config"] == config["text_config"]
    with pytest.raises(ConfigError, match=r"^gguf of a multimodal model \(gemma3\) is not written: use --to uniform"):
        export_run(tmp_path / "run", to="gguf")
    with pytest.raises(
        ConfigError, match=r"layout per-layer is not written inside a multimodal model .*set layout unif"
    ):
        prepare(recipe(tmp_path, tmp_path / "dense", "other"), resume=False, console=SilentConsole())
