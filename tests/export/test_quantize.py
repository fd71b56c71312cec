"""Quantised exports: stock transformers opens them, their error is reported, unfit widths are named before loading."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from prunetune import export_run
from prunetune.errors import ConfigError, MissingPackage, ModelError, SelfCheckFailed
from prunetune.export import quantize
from prunetune.export.quantize import SCHEMES, find_quantizable, rounded_as_quantized
from prunetune.export.result import ExportOptions
from prunetune.export.source import ExportSource
from prunetune.model.loading import load_model_and_tokenizer
from prunetune.utils import optional
from support.data import subwords
from support.export import plan_of, run_folder
from support.models import tiny

SIZES = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "layers": 2}


def skip_without_package(kind: str) -> None:
    package = SCHEMES[kind].package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'prunetune[quant]'")


def run_with(path: Path, channels: int, layout: str = "uniform") -> Path:
    plan = plan_of(tiny("llama", **SIZES), 2, channels)
    return run_folder(path, subwords(), layout=layout, plan=plan, **SIZES)[0]


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("kind", SCHEMES)
def test_quantized_folder_opens_in_stock_transformers_and_reports_its_error(
    kind: str, layout: str, tmp_path: Path
) -> None:
    skip_without_package(kind)
    result = export_run(run_with(tmp_path / "run", 128, layout), options=ExportOptions(quantize=kind))
    assert result.path == tmp_path / "run" / "exports" / f"{layout}-{kind}"
    assert "% root mean square error of logits" in result.checks[0].detail
    dense = (tmp_path / "run" / "model" / "model.safetensors").stat().st_size
    assert result.bytes < dense * (0.7 if kind == "int8" else 0.6)  # embeddings and head are a third of it
    assert not list(result.path.glob("*.bin"))
    config = json.loads((result.path / "config.json").read_text())
    assert ("per_layer_config" in config) == (layout == "per-layer")
    assert config["quantization_config"]


@pytest.mark.parametrize("kind", SCHEMES)
def test_model_rounded_in_memory_has_the_weights_of_the_export(kind: str, tmp_path: Path) -> None:
    skip_without_package(kind)
    source = ExportSource.open(run_with(tmp_path / "run", 96 if kind == "int8" else 128))
    rounded, size = rounded_as_quantized(source.load_model(), kind)
    result = export_run(tmp_path / "run", options=ExportOptions(quantize=kind))
    opened = load_model_and_tokenizer(str(result.path), device=torch.device("cpu"), dtype=torch.float32).model
    linears = dict(opened.named_modules())
    changed = 0
    for name, own in rounded.named_modules():
        if isinstance(own, torch.nn.Linear) and name != "lm_head":
            weight = linears[name].weight
            if kind == "int8":
                stored = weight.dequantize()
            else:
                from bitsandbytes.functional import dequantize_4bit

                stored = dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(own.weight, stored), name
            changed += 1
    assert changed == 14
    assert size == pytest.approx(result.bytes, rel=0.1), "but for names and shapes"


def test_linears_of_unfit_width_stay_unquantised_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_with(tmp_path / "run", 96)
    linears = find_quantizable(ExportSource.open(run), SCHEMES["int4"])
    assert set(linears.skipped) == {f"model.layers.{layer}.mlp.down_proj" for layer in range(2)}
    assert (
        "2 of 14 linears stay unquantised: their rows are no multiple of 64 (model.layers.0"
        in linears.explain_skipped(SCHEMES["int4"])
    )
    assert not find_quantizable(ExportSource.open(run), SCHEMES["int8"]).skipped
    skip_without_package("int4")
    result = export_run(run, options=ExportOptions(quantize="int4"))
    assert "stay unquantised" in result.notes[1]
    assert "stay unquantised" in caplog.text
    with safe_open(result.path / "model.safetensors", "pt") as stored:
        assert stored.get_slice("model.layers.0.mlp.down_proj.weight").get_shape() == [128, 96]


def test_quantize_refuses_unfit_models_and_missing_packages_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = SIZES | {"hidden_size": 48, "head_dim": 8}
    unfit, _ = run_folder(
        tmp_path / "unfit", subwords(), layout="uniform", plan=plan_of(tiny("llama", **sizes), 2, 96), **sizes
    )
    with pytest.raises(ModelError, match=r"no linear can be quantised to int4: 14 of 14 linears .* multiple of 64"):
        export_run(unfit, options=ExportOptions(quantize="int4"))
    run = run_with(tmp_path / "run", 128)
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    for kind in SCHEMES:
        with pytest.raises(MissingPackage, match="pip install 'bitsandbytes>="):
            export_run(run, options=ExportOptions(quantize=kind))
    assert not list((run / "exports").iterdir())


@pytest.mark.parametrize(
    ("to", "options", "match"),
    [
        ("", {"quantize": "int3"}, "'int3' is not known; known are int8, int4"),
        ("gguf", {"quantize": "int8"}, "gguf has quantised types of its own"),
        ("onnx", {"quantize": "int8"}, "keeps the layout"),
        ("per-layer", {"quantize": "int8"}, "keeps the layout"),
        ("", {"quantize": "int8", "dtype": "bf16"}, "types of its own"),
        ("", {"quantize": "int4", "pad": True}, "leave out --to, --dtype and --pad"),
    ],
)
def test_export_refuses_options_that_exclude_quantize(to: str, options: dict, match: str, tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", 128)
    with pytest.raises(ConfigError, match=match):
        export_run(run, to, options=ExportOptions(**options))
    assert not (run / "exports").exists()


@pytest.mark.parametrize("kind", SCHEMES)
def test_quantize_removes_a_model_with_a_large_error(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_package(kind)
    run = run_with(tmp_path / "run", 128)
    compute_logits = quantize.compute_logits
    monkeypatch.setattr(quantize, "compute_logits", lambda model, ids: -compute_logits(model, ids))
    with pytest.raises(SelfCheckFailed, match=r"root mean square error .* against the unquantised model"):
        export_run(run, options=ExportOptions(quantize=kind))
    assert not list((run / "exports").iterdir())
