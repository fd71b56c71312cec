"""The importance matrix of GGUF exports: from rows that the run was tuned on, or none, with the reason."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from gguf import GGMLQuantizationType as Type
from torch import nn

from prunetune import export_run
from prunetune.config.recipe import from_mapping
from prunetune.data.encoding import encode
from prunetune.data.splits import load_splits
from prunetune.errors import ConfigError, ModelError
from prunetune.export.checkpoint import write_checkpoint
from prunetune.export.gguf import importance, llamacpp, tensors
from prunetune.export.gguf.importance import measure_importance
from prunetune.export.gguf.tensors import quantize_block, rounded_as_stored
from prunetune.export.gguf.write import write_gguf
from prunetune.export.result import ExportOptions
from prunetune.export.source import ExportSource
from prunetune.pruning.sites import find_sites
from support.data import pairs, subwords, write_lines
from support.export import plan_of, reference_here, run_folder
from support.models import tiny

# 256 divides most rows; those of the down projection take another type.
SIZES = {"vocab_size": 320, "hidden_size": 256, "intermediate_size": 96, "layers": 3, "head_dim": 128}
LIMIT = 16_384


def make_run(folder: Path, layout: str = "uniform", **data: Any) -> tuple[Path, Any]:
    """A run folder whose recipe names rows, and the model in it, whose norms let some columns through much more."""
    rows = write_lines(folder / "rows.jsonl", *pairs(60))
    run, _ = run_folder(folder / "run", subwords(), layout=layout, plan=plan_of(tiny(**SIZES), 1, 64), **SIZES)
    model = ExportSource.open(run).load_model()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))).exp())
    plan = ExportSource.open(run).plan
    shutil.rmtree(run / "model")
    write_checkpoint(model, subwords(), plan, find_sites(tiny(**SIZES)), run / "model", layout=layout, card="")
    (run / "config.yaml").write_text(yaml.safe_dump({"model": "somewhere", "data": {"train": [rows], **data}}))
    return run, model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that no test changes."""
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp", reason="pip install 'prunetune[llamacpp]'")
    monkeypatch.setattr(llamacpp, "reference_continuations", reference_here)


def test_importance_is_the_mean_squared_input_of_every_linear_but_the_head(made: tuple[Path, Any]) -> None:
    run, model = made
    matrix = measure_importance(ExportSource.open(run), LIMIT)
    config = from_mapping(yaml.safe_load((run / "config.yaml").read_text()))
    train = load_splits(config.data, config.seed).train
    examples = encode(train, subwords(), config.data, 128).examples
    inputs = [
        model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor(e.token_ids))) for e in examples
    ]
    expected = torch.cat(inputs).double().square().mean(0)
    for name in "qkv":
        columns = torch.from_numpy(matrix.columns[f"model.layers.0.self_attn.{name}_proj"]).double()
        assert torch.allclose(columns, expected, rtol=1e-5)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(matrix.columns) == linears - {"lm_head"}
    tokens = sum(len(example.token_ids) for example in examples)
    assert matrix.note == f"importance matrix from {tokens:,} tokens of {len(train)} rows of the run"


@pytest.mark.parametrize("limit", [1, 100, 1000])
def test_tokens_are_at_most_those_asked_for_and_from_rows_that_were_tuned_on(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that the run split off as valid and test have no say; texts for distillation have their share."""
    texts = write_lines(tmp_path / "texts.jsonl", *({"text": f"the patient number {n} has a cough"} for n in range(40)))
    run, _ = make_run(tmp_path, distill_texts=[texts], distill_texts_share=0.5)
    seen: list[Any] = []
    original = importance.input_mean_squares
    monkeypatch.setattr(importance, "input_mean_squares", lambda *given: seen.extend(given[2]) or original(*given))
    measure_importance(ExportSource.open(run), limit)
    config = from_mapping(yaml.safe_load((run / "config.yaml").read_text()))
    splits = load_splits(config.data, config.seed)
    used = [(row, length) for batch in seen for row, length in zip(batch.example_ids, batch.lengths, strict=True)]
    assert {row for row, _ in used} <= {record.source for record in (*splits.train, *splits.texts)}
    of_texts = sum(length for row, length in used if "texts" in row)
    assert sum(length for _, length in used) <= limit
    if limit > 1:
        assert (of_texts, sum(length for _, length in used)) == (min(limit, 1000) // 2, limit)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_weighted_error_of_a_quantised_model_is_below_that_without_importance(layout: str, tmp_path: Path) -> None:
    run, model = make_run(tmp_path, layout)
    source = ExportSource.open(run)
    matrix = measure_importance(source, LIMIT)
    for dtype in tensors.MIXES:
        plain, with_matrix = rounded_as_stored(model, dtype)[0], rounded_as_stored(model, dtype, matrix)[0]
        better = 0
        for name, columns in matrix.columns.items():
            weight = model.get_submodule(name).weight
            errors = [
                float(((rounded.get_submodule(name).weight - weight).square() * torch.from_numpy(columns)).sum())
                for rounded in (plain, with_matrix)
            ]
            assert errors[1] <= errors[0] * (1 + 1e-6), (dtype, name)
            better += errors[1] < errors[0]
        assert better >= len(matrix.columns) // 2, dtype
        assert torch.equal(plain.lm_head.weight, with_matrix.lm_head.weight), "the head has none"


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("dtype", ["q4_k_m", "q4_0"])
def test_export_uses_the_matrix_says_so_and_is_the_same_each_time(
    dtype: str, made: tuple[Path, Any], tmp_path: Path
) -> None:
    run, model = made
    options = ExportOptions(dtype=dtype)
    first, again = (export_run(run, "gguf", out=tmp_path / f"{n}.gguf", options=options) for n in (1, 2))
    assert first.path.read_bytes() == again.path.read_bytes()
    plain = export_run(run, "gguf", out=tmp_path / "p.gguf", options=ExportOptions(dtype=dtype, imatrix_tokens=0))
    matrix = measure_importance(ExportSource.open(run), LIMIT)
    assert (matrix.note in first.notes, "no importance matrix" in plain.notes) == (True, True)
    fields = gguf.GGUFReader(first.path).fields
    assert fields["quantize.imatrix.dataset"].contents() == matrix.note
    assert fields["quantize.imatrix.entries_count"].contents() == len(matrix.columns) == 21
    assert not any("imatrix" in name for name in gguf.GGUFReader(plain.path).fields)
    # The model rounded in memory is the one in the file.
    rounded, _ = rounded_as_stored(model, dtype, matrix)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(first.path).tensors}
    for layer in range(3):
        for file_name, name in (
            ("ffn_down", "mlp.down_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("ffn_up", "mlp.up_proj"),
        ):
            tensor = stored[f"blk.{layer}.{file_name}.weight"]
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            assert torch.equal(rounded.get_submodule(f"model.layers.{layer}.{name}").weight, values), file_name


def test_types_without_scales_to_choose_read_no_data(made: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "load_splits", lambda *_: pytest.fail("data was read"))
    write_gguf(ExportSource.open(made[0]), made[0].parent / "plain.gguf", "q8_0")


REASONS = {
    "model folder": "is no run folder, which would know its data",
    "no recipe for data": "the run's data cannot be read: data.train names no source",
    "moved": "the run's data cannot be read: .*no such file",
    "changed": "the rows of train changed since the run",
    "not finite": r"inputs of model\.layers\.0\.self_attn\.q_proj are not finite on the run's data",
    "damaged manifest": "the run's data cannot be read",
    "damaged recipe": "unknown key modell",
}


@pytest.mark.parametrize("case", REASONS)
def test_without_usable_data_the_reason_is_said_and_columns_are_alike(
    case: str, made: tuple[Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(made[0], tmp_path / "run")
    if case == "moved":
        (run / "config.yaml").write_text(yaml.safe_dump({"model": "m", "data": {"train": ["gone.jsonl"]}}))
    elif case == "no recipe for data":
        (run / "config.yaml").write_text("model: somewhere\n")
    elif case == "changed":
        (run / "manifest.json").write_text(json.dumps({"data": {"hashes": {"train": "0" * 64}}}))
    elif case == "damaged manifest":
        (run / "manifest.json").write_text("[")
    elif case == "damaged recipe":
        (run / "config.yaml").write_text("modell: somewhere\n")
    source = ExportSource.open(run / "model" if case == "model folder" else run)
    if case == "not finite":
        model = source.load_model()
        model.model.embed_tokens.weight.fill_(float("nan"))
        source.__dict__["load_model"] = lambda *_: model
    matrix = measure_importance(source, LIMIT)
    assert not matrix.columns
    assert matrix.note.startswith("no importance matrix: ")
    assert "\n" not in matrix.note
    assert re.search(REASONS[case], matrix.note)
    assert matrix.note in caplog.text


def test_columns_that_were_zero_keep_a_weight_and_linears_that_were_have_none(
    made: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"a": torch.tensor([0.0, 4.0]).double(), "b": torch.zeros(2).double()}
    monkeypatch.setattr(importance, "input_mean_squares", lambda *_: values)
    matrix = measure_importance(ExportSource.open(made[0]), LIMIT)
    assert matrix.columns["a"].tolist() == pytest.approx([2e-6, 4.0])
    assert set(matrix.columns) == {"a"}


@pytest.mark.usefixtures("_quick")
def test_blocks_of_tiny_importance_are_rounded_as_well_as_without() -> None:
    rows = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).numpy()
    columns = np.full(512, 1e-6, np.float32)
    columns[:256] = 1.0
    for type in tensors.WEIGHTED_TYPES:
        plain, weighted = (
            gguf.quants.dequantize(quantize_block(rows, type, "a", own), type)[:, 256:] for own in (None, columns)
        )
        errors = [np.square(values - rows[:, 256:]).mean() for values in (plain, weighted)]
        assert errors[1] <= 1.1 * errors[0], type


@pytest.mark.parametrize(
    "columns", [np.ones(255), np.ones((256, 1)), np.zeros(256), np.full(256, np.nan), -np.ones(256)]
)
def test_importance_of_wrong_shape_or_values_is_refused_before_llama_cpp_reads_it(columns: Any) -> None:
    with pytest.raises(ModelError, match=r"a\.weight has 256 columns.*--imatrix-tokens 0"):
        quantize_block(np.ones((2, 256), np.float32), Type.Q4_K, "a.weight", columns.astype(np.float32))


@pytest.mark.parametrize(
    ("to", "options", "match"),
    [
        ("gguf", {"dtype": "q4_k_m", "imatrix_tokens": -1}, "use 0 for no importance matrix"),
        ("gguf", {"dtype": "q8_0", "imatrix_tokens": 99}, "is for gguf in q4_0, "),
        ("uniform", {"imatrix_tokens": 99}, "is for gguf in q4_0, "),
    ],
)
def test_number_of_tokens_is_refused_where_it_has_no_meaning(
    to: str, options: dict[str, Any], match: str, made: tuple[Path, Any]
) -> None:
    with pytest.raises(ConfigError, match=match):
        export_run(made[0], to, options=ExportOptions(**options))
