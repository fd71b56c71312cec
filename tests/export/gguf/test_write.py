"""GGUF export: llama.cpp generates the tokens of the model, or the export is refused and nothing is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from prunetune import Plan, export_run
from prunetune.errors import MissingPackage, ModelError, SelfCheckFailed
from prunetune.export.gguf import llamacpp, tensors
from prunetune.export.gguf.architectures import LLAMA, UNIFORM_ARCHITECTURES, select_architecture
from prunetune.export.gguf.tensors import build_tensors, rounded_as_stored
from prunetune.export.gguf.write import verify_tensors, write_gguf
from prunetune.export.result import ExportOptions
from prunetune.export.source import ExportSource
from prunetune.utils import optional
from support.data import subwords
from support.export import WIDE, greedy, plan_of, reference_here, run_folder
from support.models import random_plan, tiny

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# name -> family, layout, changes of its configuration, expected architecture
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("llama", "uniform", {}, "llama"),
    "llama with biases": ("llama", "uniform", {"attention_bias": True, "mlp_bias": True}, "llama"),
    "llama 3": ("llama", "uniform", {"rope_parameters": LLAMA3}, "llama"),
    "llama, linear": ("llama", "uniform", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "llama"),
    "qwen2, heads": ("qwen2", "uniform", {}, "seed_oss"),
    "qwen2, channels": ("qwen2", "uniform", {"keep": 2, "head_dim": 16}, "qwen2"),
    "qwen3": ("qwen3", "uniform", {}, "qwen3"),
    "qwen3, yarn": ("qwen3", "uniform", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "qwen3"),
    "gemma": ("gemma", "uniform", {"tie_word_embeddings": True}, "gemma"),
    "gemma 2": ("gemma2", "uniform", {"tie_word_embeddings": True, "query_pre_attn_scalar": 16}, "gemma2"),
    "gemma 3": ("gemma3_text", "uniform", {"query_pre_attn_scalar": 16}, "gemma3"),
    "phi 3": ("phi3", "uniform", {"keep": 2}, "phi3"),
    "smollm3": ("smollm3", "uniform", {"layers": 5}, "smollm3"),
    "granite": ("granite", "uniform", {"embedding_multiplier": 12, "residual_multiplier": 0.2}, "granite"),
    "llama, layers": ("llama", "per-layer", {}, "deci"),
    "llama 3, layers": ("llama", "per-layer", {"rope_parameters": LLAMA3}, "deci"),
    "mistral, layers": ("mistral", "per-layer", {"sliding_window": None}, "deci"),
    "qwen2, layers": ("qwen2", "per-layer", {}, "deci"),
    "qwen3, layers": ("qwen3", "per-layer", {"tie_word_embeddings": True}, "openelm"),
}


def case_run(case: str, folder: Path) -> tuple[Path, Any]:
    """The run's folder, and its model in memory."""
    family, layout, changes, _ = CASES[case]
    changes = {"rope_theta": 5e4, "original_max_position_embeddings": 32} | dict(changes)
    rope = changes.pop("rope_parameters", None)
    theta, context = changes.pop("rope_theta"), changes.pop("original_max_position_embeddings")
    if rope:
        changes["rope_parameters"] = {"rope_theta": theta, "original_max_position_embeddings": context, **rope}
    keep = changes.pop("keep", 1)
    plan = plan_of(tiny(family, **(WIDE | changes)), keep, 64) if layout == "uniform" else None
    return run_folder(folder, subwords(), family, layout=layout, plan=plan, **changes)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "reference_continuations", reference_here)


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_generates_the_tokens_of_the_model(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp", reason="pip install 'prunetune[llamacpp]'")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # its requests stay on this machine
    run, model = case_run(case, tmp_path / "run")
    source = ExportSource.open(run)
    assert select_architecture(source).name == CASES[case][3]
    for dtype in ("f32", "f16"):
        file = tmp_path / f"{dtype}.gguf"
        written, tokenizer_note = write_gguf(source, file, dtype)
        verify_tensors(source, file, written)
        assert "pre-tokenizer gpt-2" in tokenizer_note
        prompts = llamacpp.check_prompts(source)
        agreement = llamacpp.compare_tokens(
            file, source, prompts, [greedy(model, prompt) for prompt in prompts], threads=1
        )
        assert agreement.all_equal, str(agreement)
        assert agreement.texts == len(llamacpp.CHECK_TEXTS)


def test_gguf_file_has_names_shapes_and_values_of_the_model(tmp_path: Path) -> None:
    """gguf-py reads the file, so the test runs without llama.cpp, too."""
    run, model = run_folder(tmp_path / "run", subwords(), "qwen3", tie_word_embeddings=True)
    source, file = ExportSource.open(run), tmp_path / "model.gguf"
    write_gguf(source, file, "f32")
    reader = gguf.GGUFReader(file)
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    weights = model.state_dict()
    for layer, widths in enumerate(source.layer_widths):
        names = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for name in "qkv"]
        fused = stored[f"blk.{layer}.attn_qkv.weight"]
        assert torch.equal(fused, torch.cat([weights[name] for name in names]))
        assert len(fused) == (widths.query_heads + 2 * widths.kv_heads) * 16
    assert reader.fields["openelm.attention.head_count"].contents() == [
        widths.query_heads for widths in source.layer_widths
    ]
    assert reader.fields["openelm.feed_forward_length"].contents() == [
        widths.mlp_channels for widths in source.layer_widths
    ]
    assert "output.weight" not in stored


@pytest.mark.parametrize("heads", [1, 3])
def test_interleave_rope_rows_makes_rotary_pairs_adjacent(heads: int) -> None:
    rows = torch.arange(heads * 6 * 2).view(heads * 6, 2)
    swapped = tensors.interleave_rope_rows(rows, heads)
    for head in range(heads):
        for pair in range(3):
            first, second = swapped[head * 6 + 2 * pair], swapped[head * 6 + 2 * pair + 1]
            assert torch.equal(first, rows[head * 6 + pair])
            assert torch.equal(second, rows[head * 6 + pair + 3])
    assert torch.equal(tensors.interleave_rope_rows(rows[:, 0], heads), swapped[:, 0])


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_every_dtype_is_read_back_within_its_rounding(dtype: str, tmp_path: Path) -> None:
    run, model = run_folder(tmp_path / "run", subwords(), "mistral", layout="uniform", dtype=torch.bfloat16)
    source, file = ExportSource.open(run), tmp_path / "model.gguf"
    written, _ = write_gguf(source, file, dtype)
    verify_tensors(source, file, written)
    limit = {"f32": 0.0, "f16": 1e-3, "bf16": 0.0, "q8_0": 1 / 127}[dtype]
    weights = model.state_dict()
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name.endswith(("down.weight", "token_embd.weight", "norm.weight")):
            name = tensor.name.replace("blk.", "model.layers.").replace("ffn_down", "mlp.down_proj")
            name = name.replace("attn_norm", "input_layernorm").replace("ffn_norm", "post_attention_layernorm")
            name = name.replace("token_embd", "model.embed_tokens").replace("output_norm", "model.norm")
            values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            assert float((values - weights[name]).abs().max() / weights[name].abs().max()) <= limit


@pytest.mark.usefixtures("_quick")
def test_rows_that_do_not_divide_into_blocks_stay_float16_with_a_note(tmp_path: Path) -> None:
    plan = plan_of(tiny("llama", **WIDE), 2, 72)
    run, _ = run_folder(tmp_path / "run", subwords(), layout="uniform", plan=plan)
    result = export_run(run, "gguf", options=ExportOptions(dtype="q8_0"))
    assert (
        "3 tensors stay f16: their rows do not divide into blocks of q8_0 (budget.align 32 avoids it)" in result.notes
    )
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(result.path).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"


def test_export_run_writes_a_checked_gguf_file(tmp_path: Path) -> None:
    """A model with a layer without attention is written as deci."""
    plan = random_plan(tiny("llama", **WIDE))
    plan = Plan({**plan.kept, "model.layers.1.self_attn": ()}, plan.units)
    run, _ = run_folder(tmp_path / "run", subwords(), plan=plan)
    result = export_run(run, "gguf")
    assert result.path == run / "exports" / "gguf-f16.gguf"
    assert result.bytes == result.path.stat().st_size
    assert [check.ran for check in result.checks] == [True, bool(llamacpp.runtime_version())]
    names = {tensor.name for tensor in gguf.GGUFReader(result.path).tensors}
    assert not {"blk.1.attn_norm.weight", "blk.1.attn_q.weight"} & names


def test_result_says_that_llama_cpp_did_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = run_folder(tmp_path / "run", subwords(), layout="uniform")
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    result = export_run(run, "gguf")
    assert "not run in llama.cpp: not installed; run: pip install 'xllamacpp" in str(result)


@pytest.mark.usefixtures("_quick")
def test_gguf_file_that_differs_in_llama_cpp_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp", reason="pip install 'prunetune[llamacpp]'")
    run, _ = run_folder(tmp_path / "run", subwords(), layout="uniform")
    monkeypatch.setattr(tensors, "interleave_rope_rows", lambda rows, heads: rows)
    with pytest.raises(SelfCheckFailed, match="differs from transformers"):
        export_run(run, "gguf")
    assert not list(run.rglob("*.gguf*"))


def test_verify_tensors_finds_a_changed_byte(tmp_path: Path) -> None:
    run, _ = run_folder(tmp_path / "run", subwords(), layout="uniform")
    source, file = ExportSource.open(run), tmp_path / "model.gguf"
    written, _ = write_gguf(source, file, "f16")
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)
    with pytest.raises(SelfCheckFailed, match="is not what was written"):
        verify_tensors(source, file, written)


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "gemma, layers": ("gemma3_text", "per-layer", {}, "no architecture for gemma3_text in this layout"),
    "untied qwen3, layers": ("qwen3", "per-layer", {}, "its output head is the embedding, the model's is not"),
    "phi3, heads": ("phi3", "uniform", {}, "it needs heads of 64 rows in all, these have 32"),
    "gemma3 scale": ("gemma3_text", "uniform", {}, "it assumes another value of query_pre_attn_scalar"),
    "glm": ("glm", "uniform", {}, "no architecture for glm"),
    "activation": ("llama", "uniform", {"hidden_act": "relu"}, "its activation is silu, the model's relu"),
    "bias": ("qwen3", "uniform", {"attention_bias": True}, "it has no bias at o_proj"),
    "dynamic": ("llama", "uniform", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
                "it does not scale positions by dynamic"),
    "yarn's own": ("qwen3", "uniform", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 16
    }}, "it does not read the rotary option beta_fast"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_export_refuses_models_that_llama_cpp_cannot_hold(case: str, tmp_path: Path) -> None:
    family, layout, changes, match = REFUSED[case]
    run, _ = run_folder(tmp_path / "run", subwords(), family, layout=layout, **changes)
    with pytest.raises(ModelError, match=match) as refusal:
        export_run(run, "gguf")
    assert "export onnx" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (run / "exports").exists() or not list((run / "exports").iterdir())


@pytest.mark.parametrize(
    ("changes", "helps"),
    [
        ({"hidden_act": "relu"}, False),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, False),
        ({}, True),
    ],
)
def test_another_layout_is_advised_only_where_it_would_be_taken(
    changes: dict[str, Any], helps: bool, tmp_path: Path
) -> None:
    family = "qwen3" if helps else "llama"  # an untied qwen3 has a place in llama.cpp in layout uniform only
    run, _ = run_folder(tmp_path / "run", subwords(), family, **changes)
    with pytest.raises(ModelError) as refusal:
        export_run(run, "gguf")
    assert ("run again with --layout uniform" in str(refusal.value)) is helps


def test_head_of_its_own_is_exported_whatever_config_json_says(tmp_path: Path) -> None:
    run, _ = run_folder(tmp_path / "run", subwords(), layout="uniform")
    file = run / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    (run / "model" / "SHA256SUMS").unlink()
    source = ExportSource.open(run)
    assert "output.weight" in {tensor.name for tensor in build_tensors(source, LLAMA, "f32")}


def test_left_over_weight_files_are_not_exported(tmp_path: Path) -> None:
    run, _ = run_folder(tmp_path / "run", subwords(), layout="uniform")
    file = run / "model" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file.with_name("old.safetensors"))
    (run / "model" / "SHA256SUMS").unlink()
    assert set(ExportSource.open(run).tensor_files.values()) == {file}


@pytest.mark.usefixtures("_quick")
def test_export_refuses_values_beyond_float16(tmp_path: Path) -> None:
    run, _ = run_folder(tmp_path / "run", subwords(), layout="uniform")
    file = run / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] = 1e5
    save_file(weights, file, {"format": "pt"})
    (run / "model" / "SHA256SUMS").unlink()
    with pytest.raises(ModelError, match=r"blk.0.ffn_up.weight holds values beyond float16: export with --dtype bf16"):
        export_run(run, "gguf")
    assert not list(run.rglob("*.gguf*"))


@pytest.mark.parametrize("dtype", tensors.MIXES)
def test_mix_without_its_library_names_its_package(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = run_folder(tmp_path / "run", subwords(), layout="uniform")
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=rf"GGUF in {dtype} needs xllamacpp; run: pip install 'xllamacpp>="):
        export_run(run, "gguf", options=ExportOptions(dtype=dtype))
    assert not list(run.rglob("*.gguf*"))


def test_every_family_of_the_table_has_a_case() -> None:
    assert {family for family, *_ in CASES.values()} | {"seed_oss", "mistral"} == set(UNIFORM_ARCHITECTURES)


# Widths whose rows 256 divides, and layers enough for a mix to tell them apart.
DIVISIBLE = {**WIDE, "hidden_size": 256, "intermediate_size": 512, "layers": 8, "head_dim": 128}


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_mix_has_the_types_of_llama_cpp_and_the_values_of_the_model(layout: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="pip install 'prunetune[llamacpp]'")
    plan = plan_of(tiny("llama", **DIVISIBLE), 1, 256)
    run, _ = run_folder(tmp_path / "run", subwords(), layout=layout, plan=plan, **DIVISIBLE)
    result = export_run(run, "gguf", options=ExportOptions(dtype="q4_k_m"))
    exact = export_run(run, "gguf", options=ExportOptions(dtype="f32"))
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(result.path).tensors}
    for tensor in gguf.GGUFReader(exact.path).tensors:
        mixed = read[tensor.name]
        values = gguf.quants.dequantize(mixed.data, mixed.tensor_type)
        assert np.abs(values - tensor.data).mean() <= 0.1 * np.abs(tensor.data).mean(), tensor.name
    types = {name: tensor.tensor_type.name for name, tensor in read.items()}
    assert (types["output.weight"], types["output_norm.weight"], types["token_embd.weight"]) == ("Q6_K", "F32", "Q4_K")
    finer = [index for index in range(8) if types[f"blk.{index}.ffn_down.weight"] == "Q6_K"]
    assert finer == [0, 3, 6, 7]
    assert types["blk.3.attn_v.weight"] == "Q6_K"
    assert {types[f"blk.{index}.attn_q.weight"] for index in range(8)} == {"Q4_K"}
    assert any(note.startswith("types: 49 q4_k, 9 q6_k") and "256" not in note for note in result.notes)
    (check,) = [check for check in result.checks if "xllamacpp" in check.runtime]
    assert check.ran


@pytest.mark.parametrize(
    ("dtype", "width", "expected"),
    [("q4_k_m", 96, "Q5_0"), ("q5_k_m", 96, "Q5_1"), ("q6_k", 96, "Q8_0"), ("q4_k_m", 72, "F16"), ("q4_0", 96, "Q4_0")],
)
def test_rows_that_256_does_not_divide_take_the_next_larger_type(dtype: str, width: int, expected: str) -> None:
    shapes = {"token_embd.weight": (9, 256), "blk.0.ffn_up.weight": (512, width), "blk.0.ffn_norm.weight": (256,)}
    types = tensors.tensor_types(shapes, dtype)
    assert types == {"token_embd.weight": Type.Q6_K, "blk.0.ffn_up.weight": Type[expected]}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_before_llama_cpp_sees_them(value: float) -> None:
    with pytest.raises(ModelError, match=r"a\.weight holds values that are not finite"):
        tensors.quantize_block(np.full((1, 256), value, np.float32), Type.Q4_K, "a.weight")


def test_types_that_gguf_py_makes_too_are_equal_to_the_bit() -> None:
    pytest.importorskip("xllamacpp", reason="pip install 'prunetune[llamacpp]'")
    rows = torch.randn(3, 512).numpy()
    for type in (Type.Q4_0, Type.Q5_0, Type.Q5_1, Type.Q8_0):
        assert np.array_equal(tensors.quantize_block(rows, type, "a"), gguf.quants.quantize(rows, type))


def test_error_line_prefers_the_message_of_llama_cpp() -> None:
    output = "E error loading model: no merges\nE failed to load\nRuntimeError: Failed to init server"
    assert llamacpp._error_line(output) == "no merges"
    assert llamacpp._error_line("odd\nRuntimeError: worse") == "RuntimeError: worse"
    assert llamacpp._error_line("") == ""


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("dtype", ["q8_0", "q4_k_m"])
def test_model_rounded_in_memory_is_the_model_in_the_file(dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="pip install 'prunetune[llamacpp]'")
    sizes = {**DIVISIBLE, "num_hidden_layers": 12}  # more than ten, whose names do not sort by number
    run, model = run_folder(tmp_path / "run", subwords(), plan=plan_of(tiny("llama", **sizes), 1, 256), **sizes)
    path = export_run(run, "gguf", options=ExportOptions(dtype=dtype)).path
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    rounded, size = rounded_as_stored(model, dtype)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert size == sum(int(tensor.n_bytes) for tensor in stored.values())
    for file_name, name in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        *((f"blk.{layer}.ffn_down.weight", f"model.layers.{layer}.mlp.down_proj.weight") for layer in range(12)),
        *((f"blk.{layer}.attn_v.weight", f"model.layers.{layer}.self_attn.v_proj.weight") for layer in range(12)),
    ):
        tensor = stored[file_name]
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(rounded.get_parameter(name), values), file_name
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
