"""Laws of ONNX: any layout says in onnxruntime what it says in memory, at any batch and length, or it is not kept."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from prunetune import Plan, export_run
from prunetune.errors import ConfigError, MissingPackage, ModelError, SelfCheckFailed
from prunetune.export import onnx
from prunetune.export.result import ExportOptions, ExportResult
from support.data import subwords
from support.export import WIDE, run_folder
from support.models import random_plan, relative, tiny

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in onnx.PACKAGES), reason="pip install 'prunetune[onnx]'"
)


CASES = {"llama": "per-layer", "gemma3_text": "uniform"}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportResult, Any]:
    """One export of each: stored in bfloat16 and with a layer that does not attend; with sliding windows."""
    plan, dtype = None, torch.float32
    if request.param == "llama":
        plan, dtype = random_plan(tiny("llama", **WIDE)), torch.bfloat16
        plan = Plan({**plan.kept, "model.layers.1.self_attn": ()}, plan.units)
    place, layout = tmp_path_factory.mktemp("runs") / "run", CASES[request.param]
    run, model = run_folder(place, subwords(), request.param, layout=layout, plan=plan, dtype=dtype)
    return export_run(run, "onnx"), model


def said(path: Path, ids: Tensor, mask: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])


@needs_onnx
@pytest.mark.parametrize("shape", [(1, 2), (5, 9), (2, 64)])
def test_onnxruntime_says_the_same(case: tuple[ExportResult, Any], shape: tuple[int, int]) -> None:
    done, model = case
    ids, mask = onnx.padded_batch(*shape, 320)
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    ours = said(done.path, ids, mask)[mask.bool()]
    assert relative(ours, expected) <= 1e-3
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


@needs_onnx
def test_a_row_says_the_same_whether_it_is_padded_or_not(case: tuple[ExportResult, Any]) -> None:
    path, (ids, mask), nothing = case[0].path, onnx.padded_batch(1, 8, 320), torch.zeros(1, 5, dtype=torch.long)
    wide = said(path, torch.cat([nothing, ids], 1), torch.cat([nothing, mask], 1))
    assert relative(wide[:, 5:], said(path, ids, mask)) <= 1e-3


@needs_onnx
def test_what_stands_beside_the_graph(case: tuple[ExportResult, Any], capsys: pytest.CaptureFixture[str]) -> None:
    done, model = case
    AutoTokenizer.from_pretrained(done.path)
    assert capsys.readouterr().out == ""  # it does not ask whether to run code
    assert done.path.name == "onnx-f32"
    assert {"model.onnx", "model.onnx.data", "tokenizer.json", "config.json"} <= {f.name for f in done.path.iterdir()}
    assert done.params == sum(parameter.numel() for parameter in model.parameters())
    assert done.bytes >= 4 * done.params
    assert "most likely tokens equal" in done.checks[0].detail


@needs_onnx
def test_a_graph_of_another_model_fails_its_check(case: tuple[ExportResult, Any]) -> None:
    done, model = case
    other = copy.deepcopy(model)
    other.get_output_embeddings().weight.data *= -1
    with pytest.raises(SelfCheckFailed, match="differs from the model"):
        onnx.check_onnx(other, done.path / "model.onnx")


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = run_folder(tmp_path / "run", subwords(), layout="uniform")
    with pytest.raises(ConfigError, match="onnx takes no dtype 'q8_0'; use one of f32"):
        export_run(run, "onnx", options=ExportOptions(dtype="q8_0"))
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"pip install 'prunetune\[onnx\]'"):
        export_run(run, "onnx")
    assert not any((run / "exports").iterdir())


@needs_onnx
def test_what_the_exporter_cannot_follow_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise torch.onnx.errors.OnnxExporterError("line one\nline two")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be traced for ONNX \(line one\)") as refusal:
        onnx._traced(tiny("llama"), 97)
    assert "\n" not in str(refusal.value)
