"""ONNX export: any layout has the same logits in onnxruntime, at any batch size and length, or is not kept."""

from __future__ import annotations

import copy
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache

from prunetune import Plan, export_run
from prunetune.bench.measure_models import measure_in_process
from prunetune.bench.options import BenchOptions
from prunetune.errors import ConfigError, MissingPackage, ModelError, SelfCheckFailed
from prunetune.evaluation.suites.open_model import open_backend
from prunetune.evaluation.suites.options import EvalOptions
from prunetune.evaluation.suites.run import evaluate_suite
from prunetune.export import onnx
from prunetune.export.result import ExportOptions, ExportResult
from prunetune.model.loading import load_meta_model, load_model_and_tokenizer
from prunetune.utils import optional
from support.data import subwords
from support.export import WIDE, run_folder
from support.models import random_plan, relative, tiny
from support.suites import ALL, suite_in

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in onnx.PACKAGES), reason="pip install 'prunetune[onnx]'"
)


CASES = {"llama": "per-layer", "gemma3_text": "uniform"}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportResult, Any]:
    """Two exports: bfloat16 weights and a layer without attention; sliding windows."""
    plan, dtype = None, torch.float32
    if request.param == "llama":
        plan, dtype = random_plan(tiny("llama", **WIDE)), torch.bfloat16
        plan = Plan({**plan.kept, "model.layers.1.self_attn": ()}, plan.units)
    folder, layout = tmp_path_factory.mktemp("runs") / "run", CASES[request.param]
    run, model = run_folder(folder, subwords(), request.param, layout=layout, plan=plan, dtype=dtype)
    return export_run(run, "onnx"), model


def onnxruntime_logits(path: Path, ids: Tensor, mask: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])


@needs_onnx
@pytest.mark.parametrize("shape", [(1, 2), (5, 9), (2, 64)])
def test_onnxruntime_has_the_same_logits_at_any_shape(case: tuple[ExportResult, Any], shape: tuple[int, int]) -> None:
    result, model = case
    ids, mask = onnx.padded_batch(*shape, 320)
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    ours = onnxruntime_logits(result.path, ids, mask)[mask.bool()]
    assert relative(ours, expected) <= 1e-3
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


@needs_onnx
def test_padding_does_not_change_logits_of_a_row(case: tuple[ExportResult, Any]) -> None:
    path, (ids, mask), zeros = case[0].path, onnx.padded_batch(1, 8, 320), torch.zeros(1, 5, dtype=torch.long)
    padded = onnxruntime_logits(path, torch.cat([zeros, ids], 1), torch.cat([zeros, mask], 1))
    assert relative(padded[:, 5:], onnxruntime_logits(path, ids, mask)) <= 1e-3


@needs_onnx
def test_onnx_folder_has_weights_tokenizer_and_configuration(
    case: tuple[ExportResult, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    result, model = case
    AutoTokenizer.from_pretrained(result.path)
    assert capsys.readouterr().out == ""  # no question whether to run code
    assert result.path.name == "onnx-f32"
    assert {"model.onnx", "model.onnx.data", "tokenizer.json", "config.json"} <= {f.name for f in result.path.iterdir()}
    assert result.params == sum(parameter.numel() for parameter in model.parameters())
    assert result.bytes >= 4 * result.params
    assert "most likely tokens equal" in result.checks[0].detail


@needs_onnx
def test_check_onnx_fails_for_another_model(case: tuple[ExportResult, Any]) -> None:
    result, model = case
    other = copy.deepcopy(model)
    other.get_output_embeddings().weight.data *= -1
    with pytest.raises(SelfCheckFailed, match="differs from the model"):
        onnx.check_onnx(other, result.path / "model.onnx")


def test_onnx_refuses_other_dtypes_and_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = run_folder(tmp_path / "run", subwords(), layout="uniform")
    with pytest.raises(ConfigError, match="onnx takes no dtype 'q8_0'; use one of f32"):
        export_run(run, "onnx", options=ExportOptions(dtype="q8_0"))
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install 'onnx>="):
        export_run(run, "onnx")
    assert not any((run / "exports").iterdir())


@needs_onnx
def test_untraceable_architecture_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing_export(*args: object, **kwargs: object) -> None:
        raise torch.onnx.errors.OnnxExporterError("line one\nline two")

    monkeypatch.setattr(torch.onnx, "export", failing_export)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be traced for ONNX \(line one\)") as refusal:
        onnx._trace(tiny("llama"), 97)
    assert "\n" not in str(refusal.value)


# -- as a model of eval, check and bench -----------------------------------------------------------------------------


@needs_onnx
def test_graph_has_the_scores_and_answers_of_the_folder_it_was_exported_from(
    case: tuple[ExportResult, Any], tmp_path: Path
) -> None:
    suite = suite_in(tmp_path, ALL)
    folder = case[0].path.parents[1] / "model"
    options = EvalOptions(device="cpu", dtype="float32", cache=False)
    graph, stored = (
        evaluate_suite(open_backend(str(name), options), suite, progress=lambda *_: None)  # type: ignore[arg-type]
        for name in (case[0].path, folder)
    )
    for task, result in stored.tasks.items():
        ours = graph.tasks[task]
        assert not result.error
        assert not ours.error
        for metric, score in result.scores.items():
            assert ours.scores[metric].value == pytest.approx(score.value, rel=1e-4, abs=1e-6), (task, metric)
        assert [item.got for item in ours.items] == [item.got for item in result.items]


@needs_onnx
def test_bench_times_a_graph_in_onnxruntime(case: tuple[ExportResult, Any]) -> None:
    options = BenchOptions(prompt=4, generate=3, batch="2", runs=1, device="cpu", dense=False)
    result = measure_in_process([str(case[0].path)], options).to_dict()
    (model,) = result["models"]
    facts = model["facts"]
    assert facts["runtime"].startswith("onnxruntime")
    assert facts["dtype"] == "float32"
    assert facts["parameters"] == pytest.approx(case[0].params, rel=0.1)
    assert facts["file_bytes"] == case[0].bytes


@needs_onnx
def test_decode_steps_of_a_graph_run_all_tokens_so_far(case: tuple[ExportResult, Any]) -> None:
    model = load_model_and_tokenizer(str(case[0].path), device=torch.device("cpu"), dtype=torch.bfloat16).model
    ids, cache = onnx.padded_batch(2, 9, 320)[0], DynamicCache()
    model(ids[:, :5], past_key_values=cache)
    steps = torch.cat([model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(5, 9)], dim=1)
    assert relative(steps, model(ids).logits[:, 5:]) <= 1e-5


@needs_onnx
def test_broken_graph_and_pruning_of_a_graph_are_refused(case: tuple[ExportResult, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a graph cannot be pruned or tuned"):
        load_meta_model(str(case[0].path))
    broken = shutil.copytree(case[0].path, tmp_path / "broken", ignore=shutil.ignore_patterns("SHA256SUMS"))
    (broken / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match=r"model.onnx cannot be opened: .*; export it again"):
        load_model_and_tokenizer(str(broken), device=torch.device("cpu"), dtype=torch.float32)
