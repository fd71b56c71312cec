"""Models of a comparison on disk: the winner is kept and opens, all are timed in turns, stopping loses nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunetune.compare.cell as cell_module
from prunetune import evaluate, export_run
from prunetune.bench.measure_models import measure_in_process
from prunetune.bench.options import BenchOptions
from prunetune.compare import kept_models
from prunetune.compare.run import compare
from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.data.splits import load_splits
from prunetune.errors import ConfigError, MissingPackage, ModelError
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.score_records import evaluate as evaluate_records
from prunetune.export.quantize import SCHEMES
from prunetune.model.loading import load_model_and_tokenizer
from prunetune.train.loop import tune_and_prune
from prunetune.utils import optional
from support.data import subwords, write_lines
from support.models import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "layers": 2,
    "max_position_embeddings": 256,
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "layout": "uniform",
    "data": {"test_share": 0.25, "valid_share": 0.2},
    "budget": {"keep": 0.6, "align": 64},
    "train": {"steps": 2, "batch_size": 4, "learning_rate": 1e-4, "validate_every": 2},
    "lora": {"rank": 4},
    "search": {"share": 0.5, "init_batches": 1, "batch_size": 4},
    "evaluate": {"limit": 5, "generate_limit": 1, "max_new_tokens": 2},
    "distill": {"teacher": "none"},
    "require": {"prompt": 8, "generate": 2, "runs": 2},
    "compare": {"methods": ["dense", "progressive"], "keep_best": True},
}
PROGRESSIVE, DENSE = "progressive-keep0.6-seed0-lr0.0001", "dense-keep1-seed0-lr0.0001"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows. It has learnt nothing, so all models made of it are as good as dense."""
    folder = tmp_path_factory.mktemp("workspace")
    tiny(**SIZES).save_pretrained(folder / "dense")
    subwords().save_pretrained(folder / "dense")
    choices = (
        {"prompt": f"Case {n}: ", "choices": ["yes", "no"], "answer": n % 2, "task": "choice"} for n in range(16)
    )
    write_lines(folder / "rows.jsonl", *choices, *({"prompt": f"Say {n}: ", "completion": f"{n}"} for n in range(16)))
    return folder


def config_of(workspace: Path, out: Path, **changes: Any) -> RunConfig:
    options = {"model": str(workspace / "dense"), "out": str(out), "data": {"train": [str(workspace / "rows.jsonl")]}}
    return from_mapping(merge_mappings(merge_mappings(RECIPE, options), changes))


def table_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "comparison.json").read_text())


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in table_of(folder)["rows"]}


def scores_of(model: Path, config: RunConfig) -> Evaluation:
    """The scores of a model on the test rows of a comparison."""
    if model.suffix == ".gguf":  # in float32: prunetune's own import rounds to bfloat16
        file = {"gguf_file": model.name}
        opened = AutoModelForCausalLM.from_pretrained(model.parent, **file, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(model.parent, **file)
    else:
        loaded = load_model_and_tokenizer(str(model), device=torch.device("cpu"), dtype=torch.float32)
        opened, tokenizer = loaded.model, loaded.tokenizer
    rows = load_splits(config.data, config.seed, config.report.redaction).test
    return evaluate_records(opened, tokenizer, rows, config.data, config.evaluate)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The budgets of all trainings, in order."""
    keeps: list[float] = []

    def recording(job: Any) -> Any:
        keeps.append(job.config.budget.keep)
        return tune_and_prune(job)

    monkeypatch.setattr(cell_module, "tune_and_prune", recording)
    return keeps


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are timed in turns in this process, which starts none for each."""
    monkeypatch.setattr(kept_models, "measure_models", measure_in_process)


@pytest.mark.parametrize("format", ["q8_0", "q4_k_m", *SCHEMES])
def test_scores_in_a_format_are_those_of_the_file_that_is_kept(format: str, workspace: Path, tmp_path: Path) -> None:
    package = SCHEMES[format].package if format in SCHEMES else "xllamacpp"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'prunetune[quant,llamacpp]'")
    config = config_of(workspace, tmp_path / "c", compare={"formats": [format]})
    folder = compare(config)
    row, best = rows_of(folder)[f"progressive+{format}"], table_of(folder)["best"]
    assert best["method"] == f"progressive+{format}", "the smallest"
    assert f"kept in {best['path']}" in (folder / "table.md").read_text()
    kept = scores_of(folder / best["path"], config)
    precision = 2e-3 if format == "int4" else 1e-4  # bitsandbytes multiplies coarsely on a CPU
    assert row["scores"]["nll"]["value"] == pytest.approx(kept.mean_nll(), rel=precision)
    as_tuned = rows_of(folder)["progressive"]["scores"]["nll"]["value"]
    assert row["scores"]["nll"]["value"] != pytest.approx(as_tuned, rel=1e-7), "rounding is seen"
    files = [folder / best["path"]] if format not in SCHEMES else (folder / best["path"]).glob("*.safetensors")
    stored = sum(file.stat().st_size for file in files)
    assert row["bytes"] <= stored < row["bytes"] + 50_000, "but for names, tokenizer and metadata"


def test_kept_run_folder_has_the_scores_of_its_cell_and_opens_everywhere(workspace: Path, tmp_path: Path) -> None:
    config = config_of(workspace, tmp_path / "c")
    folder = compare(config)
    best, cell = folder / "best", json.loads((folder / "cells" / f"{PROGRESSIVE}.json").read_text())
    assert table_of(folder)["best"] == {"method": "progressive", "seed": 0, "path": "best"}
    assert not (folder / "models").exists()
    model = AutoModelForCausalLM.from_pretrained(best / "model")
    assert sum(weight.nbytes for weight in model.parameters()) == cell["bytes"]
    for scores in (
        scores_of(best / "model", config),
        Evaluation.from_json((best / "evaluation/pruned.json").read_text()),
    ):
        assert scores.mean_nll() == pytest.approx(cell["headline"]["nll"], rel=1e-6)
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"tasks:\n  say: {{data: {workspace / 'rows.jsonl'}, scorer: nll}}\n")
    assert evaluate(str(best), str(suite)).tasks["say"].scores["nll"].value > 0
    assert export_run(best, "uniform", out=tmp_path / "again").params == export_run(best, "onnx").params


def test_dense_winner_is_opened_without_code_whatever_the_layout(workspace: Path, tmp_path: Path) -> None:
    options = {"methods": ["dense"]}
    folder = compare(config_of(workspace, tmp_path / "c", layout="per-layer", compare=options))
    AutoModelForCausalLM.from_pretrained(folder / "best" / "model", trust_remote_code=False)


def test_all_rows_are_timed_in_turns_or_say_why_not(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(**SIZES | {"layers": 1}).save_pretrained(tmp_path / "small")
    subwords().save_pretrained(tmp_path / "small")
    opened: list[list[str]] = []

    def recording(models: list[str], options: BenchOptions) -> Any:
        opened.append(models)
        return measure_in_process(models, options)

    monkeypatch.setattr(kept_models, "measure_models", recording)
    real = kept_models.write_export

    def write(run: Path, format: str) -> Path:
        if format and "keep0.8" in run.name:
            raise ModelError("no place for it")
        return real(run, format)

    monkeypatch.setattr(kept_models, "write_export", write)
    options = {"formats": ["q8_0"], "rivals": [str(tmp_path / "small")], "measure": True, "keeps": [0.8, 0.6]}
    folder = compare(config_of(workspace, tmp_path / "c", compare=options))
    assert [len(models) for models in opened] == [7], "dense ones once, though they are in the rows of both budgets"
    for row in table_of(folder)["rows"]:
        if (row["method"], row["keep"]) == ("progressive+q8_0", 0.8):
            assert row["speed"] == {"note": "no place for it"}
            continue
        assert row["speed"]["token_s"] > 0
        is_alike = "+" not in row["method"] and row["method"] != "dense"
        assert ("times_faster" in row["speed"]) == is_alike, "a ratio is to dense in the same runtime"
    assert "progressive+q8_0: no place for it" in (folder / "table.md").read_text()
    page = (folder / "comparison.html").read_text()
    assert page.count("<h3>Mean NLL by time a token in ") == 2, "transformers, llama.cpp"
    assert not (folder / "models").exists()


# -- stopping, resuming ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("where", ["evaluate_models", "measure_models"])
def test_comparison_stopped_while_models_are_kept_goes_on_without_training(
    where: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[float]
) -> None:
    config = config_of(workspace, tmp_path / "c", compare={"formats": ["q8_0"], "measure": True})

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(kept_models, where, stop)
        with pytest.raises(KeyboardInterrupt):
            compare(config)
    assert (tmp_path / "c" / "table.md").exists()
    trained.clear()
    folder = compare(config, resume=True)
    assert trained == []
    assert table_of(folder)["best"]["path"] == "best/exports/gguf-q8_0.gguf"
    assert all(row["speed"]["token_s"] for row in table_of(folder)["rows"])
    assert not (folder / "models").exists()
    before = {path: path.stat().st_mtime_ns for path in (folder / "best").rglob("*")}
    compare(config, resume=True)
    assert trained == []
    assert {path: path.stat().st_mtime_ns for path in (folder / "best").rglob("*")} == before


def test_winner_of_a_finished_comparison_is_trained_again_to_be_kept(
    workspace: Path, tmp_path: Path, trained: list[float]
) -> None:
    folder = compare(config_of(workspace, tmp_path / "c", compare={"keep_best": False}))
    assert not (folder / "best").exists()
    before = rows_of(folder)["progressive"]["scores"]
    trained.clear()
    compare(config_of(workspace, folder), resume=True)
    assert trained == [0.6]
    assert (folder / "best" / "model").exists()
    assert rows_of(folder)["progressive"]["scores"] == before
    trained.clear()
    compare(config_of(workspace, folder, compare={"keeps": [0.6, 0.4], "within": 0.5}), resume=True)
    assert trained == [0.4]
    assert json.loads((folder / "best" / "cell.json").read_text())["keep"] == 0.4, "the new one is smaller"


def test_what_is_within_decides_which_model_wins(workspace: Path, tmp_path: Path) -> None:
    folder = compare(config_of(workspace, tmp_path / "c"))
    table = table_of(folder)
    for row in table["rows"]:
        row["scores"]["nll"] = {"value": 1.0 if row["method"] == "dense" else 1.1, "dense_se": 0.01}
    assert kept_models.smallest_file(table)["method"] == "dense"
    assert kept_models.smallest_file(table | {"within": 0.1})["method"] == "progressive"


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_refused_before_anything_is_written(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"compare\.keep_best .* add dense to compare\.methods"):
        compare(config_of(workspace, tmp_path / "c", compare={"methods": ["progressive"]}))
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    for format in ("int8", "int4", "q4_k_m"):
        with pytest.raises(MissingPackage, match=rf"{format} needs \w+; run: pip install"):
            compare(config_of(workspace, tmp_path / "c", compare={"formats": [format]}))
    assert not (tmp_path / "c").exists()
