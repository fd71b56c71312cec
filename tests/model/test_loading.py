"""Loading models: names of folders, hub names, misspelt paths, and broken files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from prunetune import cut, find_sites
from prunetune.errors import ModelError
from prunetune.export.checkpoint import write_checkpoint
from prunetune.export.selfcheck import compute_logits
from prunetune.model.loading import (
    load_config,
    load_empty_model,
    load_meta_model,
    load_model_and_tokenizer,
    load_tokenizer,
    open_safetensors,
    resolve_model_path,
    weight_files,
)
from prunetune.model.provenance import ModelIdentity
from support.evaluation import characters, speaker
from support.models import random_plan, tokens
from support.suites import model_folder

ON_CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, and must be 1 or more"),
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
        ({"hidden_size": -4}, "hidden_size is -4, and must be 1 or more"),
        ({"hidden_act": "zzz"}, "KeyError: 'zzz'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, and must be 1 or more"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and must be 512 or less"),
        ({"intermediate_size": 10**7}, "intermediate_size is 10000000, and must be 262144 or less"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000, and must be 512 or less"),
        ({"vocab_size": None}, "Field 'vocab_size' expected int, got NoneType"),
        (
            {"vocab_size": 90},
            "has shape [259, 48] in the files, [90, 48] in config.json (vocab_size)",
        ),
        ({"pad_token_id": 5000}, "Padding_idx must be within num_embeddings"),
        ({"dtype": "auto"}, "dtype is 'auto', and must be one of float32, bfloat16, float16"),
        ({"dtype": "int8"}, "dtype is 'int8', and must be one of"),
        ({"dtype": ["float32"]}, "dtype is ['float32'], and must be one of"),
        ({"model_type": ["llama"]}, "model_type is ['llama'], and must be the name of an architecture"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "Missing required keys in `rope_parameters`"),
        ({"attn_implementation": "owner/kernel"}, "asks for attention code of the hub (owner/kernel)"),
        ({"text_config": 5}, "text_config is 5, and must be a configuration"),
        ({"text_config": {}}, "text_config does not belong to 'llama'"),
    ],
)
def test_invalid_configuration_is_refused_in_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError) as refused:
        load_meta_model(str(folder))
    assert message in str(refused.value)
    assert "config.json" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["null", "[]", "{", "[" * 10**5, '{"vocab_size": ' + "9" * 5000 + "}"])
def test_configuration_that_is_no_object_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"^model \S*: config\.json( cannot be read)?: [^\n]*$"):
        load_meta_model(str(folder))


def without_table(folder: Path, **changes: Any) -> str:
    """The folder's tokenizer.json with other values."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(folder)


NO_SUCH_TOKEN = {
    "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<q>", "type_id": 0}}], "pair": [],
    "special_tokens": {},
}  # fmt: skip
BAD_REGEX = {"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("changes", [{"pre_tokenizer": BAD_REGEX}, {"model": None}, {"post_processor": NO_SUCH_TOKEN}])
def test_broken_tokenizer_is_refused_in_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    """The last of them makes the tokenizer's library panic, which is no `Exception`."""
    folder = model_folder(tmp_path / "model")
    with pytest.raises(ModelError, match=r"^model \S*: no tokenizer found: [^\n]*; save tokenizer\.json"):
        load_tokenizer(without_table(folder, **changes))
    (folder / "tokenizer.json").write_text("[]")
    with pytest.raises(ModelError, match="no tokenizer found"):
        load_tokenizer(str(folder))


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2)}, folder / "pytorch_model.bin")
    for opens in (load_meta_model, lambda name: load_model_and_tokenizer(name, **ON_CPU)):
        with pytest.raises(ModelError, match=r"are pickles \(pytorch_model\.bin\), .* by save_pretrained\(FOLDER\)$"):
            opens(str(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [128, 300])
def test_sharded_checkpoint_of_16_bits_with_another_vocabulary_than_its_tokenizer_round_trips(
    rows: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """An embedding padded beyond the tokenizer's tokens, and one cut to fewer."""
    model = speaker()
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.to(dtype).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    characters().save_pretrained(tmp_path / "model")
    assert len(weight_files(str(tmp_path / "model"))) > 1
    sites = find_sites(load_meta_model(str(tmp_path / "model")))
    opened = load_model_and_tokenizer(str(tmp_path / "model"), **ON_CPU)
    assert opened.checkpoint_dtype == dtype
    plan = random_plan(opened.model)
    expected = compute_logits(cut(opened.model, plan, sites=sites), tokens(length=6))
    assert expected.shape[-1] == rows
    smaller = opened.model.to(dtype)
    write_checkpoint(smaller, opened.tokenizer, plan, sites, tmp_path / "result", layout="per-layer", card="")
    again = load_model_and_tokenizer(str(tmp_path / "result"), **ON_CPU)
    assert again.checkpoint_dtype == dtype
    torch.testing.assert_close(compute_logits(again.model, tokens(length=6)), expected)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes", ""])
def test_quantised_checkpoint_is_refused_before_it_is_opened(method: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quant_method": method} if method else {"load_in_4bit": True}
    for changes in (
        {"quantization_config": quantised},
        {"compression_config": quantised},
        {"text_config": {"quantization_config": quantised}},
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=f"quantised by {method or 'bitsandbytes'} .*: name the unquantised model"):
            load_meta_model(str(folder))


def test_quantised_weights_without_a_word_in_the_configuration_are_refused(tmp_path: Path) -> None:
    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    with pytest.raises(ModelError, match=r"quantised \(model\.layers\.0\.mlp\.up_proj\.weight is F8_E4M3\)"):
        load_meta_model(spoiled(tmp_path / "model", quantise))


def write_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Quantise a checkpoint in blocks of 32 by 32; returns what the weights are when dequantised."""
    tensors = load_file(model_folder(folder, hidden_size=64, intermediate_size=64, head_dim=16) / "model.safetensors")
    exact: dict[str, torch.Tensor] = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scales = torch.rand([size // 32 for size in tensors[name].shape], generator=torch.Generator().manual_seed(0))
        tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
        exact[name] = tensors[name].float() * scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": fp8}))
    return exact


def write_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Experts of 4-bit numbers with one scale for 32 of them; every number is 1.0, code 2, times its scale, 2**-3."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    tensors = load_file(model_folder(folder, family="gpt_oss", **sizes) / "model.safetensors")
    exact: dict[str, torch.Tensor] = {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors[name].shape
        exact[name] = torch.full(tensors.pop(name).shape, 2.0**-3)
        tensors[f"{name}_blocks"] = torch.full((experts, rows, columns // 32, 16), 0x22, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full((experts, rows, columns // 32), 127 - 3, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    return exact


@pytest.mark.parametrize("write", [write_fp8, write_mxfp4])
def test_quantised_checkpoint_that_transformers_dequantises_opens_as_a_plain_one(
    write: Callable[[Path], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """In the dtype that is asked for, whatever transformers dequantises to; its result is written unquantised."""
    exact = write(tmp_path / "model")
    folder = str(tmp_path / "model")
    sites = find_sites(load_meta_model(folder))
    loaded = load_model_and_tokenizer(folder, **ON_CPU, dequantize=True)
    assert loaded.checkpoint_dtype == torch.bfloat16
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}
    for name, weight in exact.items():
        torch.testing.assert_close(loaded.model.get_parameter(name).data, weight, rtol=1e-2, atol=1e-3)
    assert not open_safetensors(folder).files
    plan = random_plan(loaded.model)
    expected = compute_logits(cut(loaded.model, plan, sites=sites), tokens())
    write_checkpoint(loaded.model, loaded.tokenizer, plan, sites, tmp_path / "result", layout="per-layer", card="")
    assert "quantization_config" not in json.loads((tmp_path / "result" / "config.json").read_text())
    again = load_model_and_tokenizer(str(tmp_path / "result"), **ON_CPU).model
    torch.testing.assert_close(compute_logits(again, tokens()), expected)


TEXT = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
WRAPPERS: dict[str, dict[str, Any]] = {
    "llava": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION, "image_token_index": 96},
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
        "image_token_index": 96,
    },
    "gemma3": {
        "text_config": TEXT | {"query_pre_attn_scalar": 8, "sliding_window": 8},
        "vision_config": VISION | {"vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": 96,
    },
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_text_part_of_a_multimodal_model_opens_by_itself(wrapper: str, tmp_path: Path) -> None:
    """The script in the docs makes a model of the text part with the same logits."""
    source, target = tmp_path / "whole", tmp_path / "text"
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[wrapper](**WRAPPERS[wrapper])).eval()
    whole.save_pretrained(source)
    characters().save_pretrained(source)
    page = (Path(__file__).parents[2] / "docs" / "guides" / "models.md").read_text()
    script = page[page.index("from transformers import") : page.index("```\n\n## What is refused")]
    exec(script.replace("google/gemma-3-4b-it", str(source)).replace("gemma-3-4b-text", str(target)))
    text = load_model_and_tokenizer(str(target), **ON_CPU).model
    assert load_meta_model(str(target)).config.model_type == whole.config.get_text_config().model_type
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(text(ids).logits, whole(input_ids=ids).logits)


def test_other_kinds_of_models_are_refused_with_what_they_are(tmp_path: Path) -> None:
    small = {"num_layers": 1, "num_decoder_layers": 1, "d_model": 16, "d_kv": 8, "d_ff": 16, "vocab_size": 20}
    for model_type, values, message in (
        ("t5", small, "'t5' has an encoder"),
        ("vit", VISION, "'vit' is no causal language model"),
        ("aya_vision", {"text_config": {"model_type": "mamba"}}, "multimodal model, .* which cannot be pruned either"),
    ):
        CONFIG_MAPPING[model_type](**values).save_pretrained(tmp_path / model_type)
        with pytest.raises(ModelError, match=message):
            load_meta_model(str(tmp_path / model_type))


def test_folders_that_hold_no_model_say_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"the folder is a run; name its model, \S*run/model"):
        load_meta_model(str(tmp_path / "run"))


def test_left_over_weight_files_are_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = model_folder(tmp_path / "model")
    file = folder / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, folder / "old.safetensors")
    assert weight_files(str(folder)) == [file]
    load_meta_model(str(folder))
    assert "not read, nor by transformers: old.safetensors" in caplog.text
    name = "model.norm.weight"
    assert torch.equal(open_safetensors(str(folder)).tensor(name), load_file(file)[name])
    file.rename(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / "part.safetensors"), "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files(str(folder)) == [folder / "part.safetensors"]
    read = load_model_and_tokenizer(str(folder), **ON_CPU).model.model.norm.weight
    assert torch.equal(read, open_safetensors(str(folder)).tensor(name))


@pytest.mark.parametrize("own", [True, False])
def test_configuration_says_whether_the_head_is_tied_as_the_files_do(own: bool, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding + own
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for model in (
        load_meta_model(str(folder)),
        load_empty_model(str(folder)),
        load_model_and_tokenizer(str(folder), **ON_CPU).model,
    ):
        assert model.config.tie_word_embeddings is not own
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is not own


def spoiled(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """A tiny checkpoint whose tensors were changed."""
    file = model_folder(folder) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return str(folder)


def test_missing_and_nan_weights_are_refused(tmp_path: Path) -> None:
    def lose(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = math.nan

    how: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    with pytest.raises(ModelError, match=r"lack 1 of the weights .* model\.layers\.1\.mlp\.up_proj\.weight first"):
        load_model_and_tokenizer(spoiled(tmp_path / "a", lose), **how)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite values"):
        load_model_and_tokenizer(spoiled(tmp_path / "b", spoil), **how)


def test_layers_that_the_configuration_does_not_have_are_refused(tmp_path: Path) -> None:
    file = model_folder(tmp_path / "model") / "config.json"
    values = json.loads(file.read_text())
    layers = values["num_hidden_layers"] - 1
    file.write_text(json.dumps(values | {"num_hidden_layers": layers}))
    with pytest.raises(ModelError, match=rf"hold model\.layers\.{layers}\..*, config\.json {layers} layers; correct"):
        load_meta_model(str(tmp_path / "model"))


def test_truncated_file_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    file = model_folder(tmp_path / "model") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read: .*; fetch it again"):
        load_meta_model(str(tmp_path / "model"))


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, offline; the working folder has a folder of runs."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "runs" / "support").mkdir(parents=True)
    (tmp_path / "runs" / "support" / "config.yaml").touch()
    (tmp_path / "runs" / "summary.gguf").touch()
    monkeypatch.chdir(tmp_path)
    return cache


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("runs/suport", "did you mean runs/support?"),
        ("runs/sumary", "did you mean runs/summary.gguf?"),
        ("runs/other", "no such folder beside the runs in runs (a hub model opens after: hf download runs/other)"),
        ("runs/no name of a hub's", "no such folder beside the runs in runs"),
        ("./runs/suport", "did you mean runs/support?"),
        ("runs/support/modle", "not a model folder"),
    ],
)
@pytest.mark.usefixtures("offline")
def test_misspelt_path_is_refused_without_asking_the_hub(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name whose owner is a local folder of runs is not looked up on the hub."""
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError) as refused:
        load_config(name)
    assert meant in str(refused.value)
    assert "\n" not in str(refused.value)


def test_other_names_are_hub_names(offline: Path) -> None:
    """This holds even if a local folder of models has the owner's name."""
    (offline.parent / "owner" / "fetched-by-hand").mkdir(parents=True)
    assert [resolve_model_path(name) for name in ("owner/name", "gpt2")] == ["owner/name", "gpt2"]


def test_cached_hub_model_opens_beside_a_folder_of_its_owners_name(offline: Path) -> None:
    stored = offline / "models--runs--suport"
    model_folder(stored / "snapshots" / "0123")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0123", encoding="utf-8")
    assert load_config("runs/suport").model_type == "llama"
    shutil.rmtree(stored)
    with pytest.raises(ModelError, match="did you mean"):
        load_config("runs/suport")


def test_revision_of_a_hub_model_opens_as_that_commit(offline: Path) -> None:
    stored = offline / "models--owner--name"
    for commit, layers in (("a" * 40, 2), ("b" * 40, 3)):
        folder = model_folder(stored / "snapshots" / commit)
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": layers}))
        (folder / "model.safetensors").unlink()
    for ref, commit in (("main", "b" * 40), ("v1.0", "a" * 40), ("refs/pr/1", "a" * 40)):
        (stored / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (stored / "refs" / ref).write_text(commit, encoding="utf-8")
    for name, commit, layers in (("main", "b" * 40, 3), ("v1.0", "a" * 40, 2), ("refs/pr/1", "a" * 40, 2)):
        assert load_config(f"owner/name@{name}").num_hidden_layers == layers
        assert load_meta_model(f"owner/name@{name}").config.num_hidden_layers == layers
        assert ModelIdentity(f"owner/name@{name}").digests == {"commit": commit}


def test_absent_revision_is_refused_in_one_line_with_the_command_that_fetches_it(offline: Path) -> None:
    with pytest.raises(ModelError, match=r"model owner/other@v2: .*hf download owner/other --revision v2") as refused:
        load_config("owner/other@v2")
    assert "\n" not in str(refused.value)


def test_folder_with_an_at_sign_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "owner" / "name@v1")
    assert resolve_model_path("owner/name@v1") == "owner/name@v1"
