"""A whole comparison: every cell runs once, resuming gives the same result, one failure does not stop the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

import prunetune.compare.cell as cell_module
import prunetune.compare.run
import prunetune.compare.scoring as scoring
from prunetune.baselines import BASELINES
from prunetune.compare.cell import CellRunner
from prunetune.compare.grid import Cell
from prunetune.compare.methods import built_in_methods
from prunetune.compare.run import compare
from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.errors import ConfigError, LimitBroken, PlanError, PrunetuneError, RunFolderError
from prunetune.runs.folder import RunFolder, run_lock
from prunetune.train.loop import tune_and_prune
from support.data import subwords, write_lines
from support.evaluation import write_model_and_rows
from support.models import tiny

RECIPE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "data": {"test_share": 0.25, "valid_share": 0.2},
    "budget": {"keep": 0.6, "align": 8},
    "train": {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "validate_every": 3},
    "lora": {"rank": 4},
    "search": {"share": 0.4, "settle": 0.25, "init_batches": 1, "batch_size": 4},
    "evaluate": {"limit": 5, "generate_limit": 1, "max_new_tokens": 2},
    "distill": {"teacher": "dense"},
    "compare": {"methods": ["dense", "progressive"], "seeds": [0, 1]},
}
TAUGHT, PLAIN = "dense teacher, all weights, muon", "no teacher, rank 32, adamw"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data."""
    prose = ({"text": f"the quick fox {n} jumps", "task": "prose"} for n in range(20))
    return write_model_and_rows(tmp_path_factory.mktemp("workspace"), 20, *prose)


def config_of(workspace: Path, out: Path, **changes: Any) -> RunConfig:
    options = {"model": str(workspace / "dense"), "out": str(out), "data": {"train": [str(workspace / "rows.jsonl")]}}
    return from_mapping(merge_mappings(merge_mappings(RECIPE, options), changes))


@pytest.fixture(scope="module")
def done(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole comparison: two methods, two seeds."""
    return compare(config_of(workspace, tmp_path_factory.mktemp("runs") / "compare"), command="prunetune compare")


@pytest.fixture
def trained_seeds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The seeds of all trainings, in order."""
    seeds: list[int] = []

    def recording(job: Any) -> Any:
        seeds.append(job.config.seed)
        return tune_and_prune(job)

    monkeypatch.setattr(cell_module, "tune_and_prune", recording)
    return seeds


def cells(folder: Path) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text()) for file in sorted((folder / "cells").iterdir())}


def comparison_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "comparison.json").read_text())


def row_of(folder: Path, method: str, keep: float = 0.6) -> dict[str, Any]:
    rows = comparison_of(folder)["rows"]
    return next(row for row in rows if (row["method"], row["keep"]) == (method, keep))


# -- files of a comparison ------------------------------------------------------------------------------------------


def test_comparison_writes_a_file_for_every_cell(done: Path) -> None:
    assert {path.name for path in done.iterdir()} == {
        "cells", "comparison.html", "comparison.json", "config.yaml", "manifest.json", "table.md",
    }  # fmt: skip
    assert list(cells(done)) == [
        "dense-keep1-seed0-lr0.01", "dense-keep1-seed1-lr0.01",
        "progressive-keep0.6-seed0-lr0.01", "progressive-keep0.6-seed1-lr0.01",
    ]  # fmt: skip
    for name, cell in cells(done).items():
        assert cell["cell"] == name
        assert set(cell["items"]) == set(cell["scores"]) == {"choice", "open", "prose"}
        assert cell["kept"] == 1 if cell["method"] == "dense" else cell["kept"] <= 0.6
        assert cell["curve"][-1]["step"] == 3
        assert "valid_nll" not in cell


def test_models_are_scored_as_a_gguf_file_would_hold_them(workspace: Path, tmp_path: Path) -> None:
    methods = ["dense", "random", "progressive"]
    folder = compare(
        config_of(workspace, tmp_path / "c", compare={"methods": methods, "seeds": [0], "formats": ["q8_0"]})
    )
    rows = {row["method"]: row for row in comparison_of(folder)["rows"]}
    assert list(rows) == ["dense", "dense+q8_0", "random", "progressive", "progressive+q8_0"]
    assert rows["progressive+q8_0"]["bytes"] < rows["progressive"]["bytes"] < rows["dense"]["bytes"]
    difference = rows["dense+q8_0"]["scores"]["nll"]["value"] - rows["dense"]["scores"]["nll"]["value"]
    assert 0 < abs(difference) < 0.01
    assert "The smallest weights" in (folder / "table.md").read_text()


def test_rival_is_tuned_on_the_same_rows_and_its_losses_are_in_the_models_tokens(
    workspace: Path, done: Path, tmp_path: Path
) -> None:
    """The model under another name has the scores of the dense one; one of other tokens keeps its total losses."""
    twin, other = tmp_path / "twin", tmp_path / "other"
    shutil.copytree(workspace / "dense", twin)
    tiny(seed=3, vocab_size=320).save_pretrained(other)
    subwords().save_pretrained(other)
    options = {"methods": ["dense"], "seeds": [0], "rivals": [str(twin), str(other)], "formats": ["q8_0"]}
    folder = compare(config_of(workspace, tmp_path / "c", compare=options))
    rows = {row["method"]: row for row in comparison_of(folder)["rows"]}
    assert list(rows) == [name + format for name in ("dense", "rival-twin", "rival-other") for format in ("", "+q8_0")]
    assert rows["rival-twin"]["scores"]["nll"]["value"] == pytest.approx(
        rows["dense"]["scores"]["nll"]["value"], abs=1e-4
    )
    assert rows["rival-other"]["kind"] == "dense"
    stored = cells(folder)
    (rival,) = (cell for cell in stored.values() if cell["method"] == "rival-other")
    (dense,) = (cell for cell in stored.values() if cell["method"] == "dense")
    columns, tokens = rival["items"]["choice"], dense["items"]["choice"]["tokens"]
    assert columns["tokens"] != tokens
    totals = [nll * count for nll, count in zip(columns["nll"], columns["tokens"], strict=True)]
    mean = sum(total / count for total, count in zip(totals, tokens, strict=True)) / len(tokens)
    assert rows["rival-other"]["scores"]["nll choice"]["value"] == pytest.approx(mean, abs=1e-4)
    stored_loss = rows["rival-other+q8_0"]["scores"]["nll choice"]["value"]
    assert stored_loss == pytest.approx(mean, rel=0.05), "in the same tokens, rounded"
    assert not (folder / "rival-other").exists()


def test_teacher_is_tuned_once_for_each_seed_and_its_seconds_are_reported(
    workspace: Path, tmp_path: Path, trained_seeds: list[int], done: Path
) -> None:
    folder = compare(config_of(workspace, tmp_path / "run"))
    assert sorted(trained_seeds) == [0, 0, 1, 1]
    student = cells(folder)["progressive-keep0.6-seed1-lr0.01"]
    assert student["teacher_seconds"] == cells(folder)["dense-keep1-seed1-lr0.01"]["train_seconds"] > 0
    for name, cell in cells(folder).items():  # a second comparison has the same results
        assert (cell["items"], cell["widths"]) == (cells(done)[name]["items"], cells(done)[name]["widths"])


def test_comparison_writes_the_table(done: Path) -> None:
    table = (done / "table.md").read_text()
    assert f", {date.today().isoformat()}, prunetune " in table.splitlines()[0]
    assert "\nKeep 0.6, split test" in table
    assert [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")] == [
        "method", "dense", "progressive", "method", "chance", "majority", "longest", "dense", "progressive",
    ]  # fmt: skip
    assert comparison_of(done)["floors"]["choice"]["chance"] == 0.5
    assert row_of(done, "progressive")["seeds"] == [0, 1]
    assert row_of(done, "dense")["gap"] == 0


def test_variant_distils_from_its_own_texts(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("shared", "own"):
        write_lines(tmp_path / f"{name}.jsonl", *({"text": f"{name} text {n}"} for n in range(4)))
    (tmp_path / "v.yaml").write_text(f"own: {{data: {{distill_texts: [{tmp_path / 'own.jsonl'}]}}}}")
    streams: dict[str, set[str]] = {}

    def recording(job: Any) -> Any:
        examples = [*job.train_stream.examples, *job.search_stream.examples] if job.teacher else []
        streams[job.config.data.distill_texts[0]] = {
            Path(example.id).name.partition(".")[0]
            for example in examples
            if example.answer_start == len(example.token_ids)
        }
        return tune_and_prune(job)

    monkeypatch.setattr(cell_module, "tune_and_prune", recording)
    options = {"methods": ["progressive", "own"], "seeds": [0], "variants": str(tmp_path / "v.yaml")}
    compare(
        config_of(
            workspace, tmp_path / "run", compare=options, data={"distill_texts": [str(tmp_path / "shared.jsonl")]}
        )
    )
    assert streams == {str(tmp_path / f"{name}.jsonl"): {name} for name in ("shared", "own")}


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_resume_runs_only_missing_cells(workspace: Path, tmp_path: Path, trained_seeds: list[int]) -> None:
    folder = compare(config_of(workspace, tmp_path / "run"))
    before = comparison_of(folder)
    trained_seeds.clear()
    compare(config_of(workspace, folder), resume=True)
    assert trained_seeds == []
    assert comparison_of(folder) == before
    lost = folder / "cells" / "progressive-keep0.6-seed1-lr0.01.json"
    before_loss = json.loads(lost.read_text())
    lost.unlink()
    compare(config_of(workspace, folder), resume=True)
    assert trained_seeds == [1, 1]  # the teacher, too, as it is no longer in memory
    again = json.loads(lost.read_text())
    for result in (before_loss, again):
        for key in ("train_seconds", "teacher_seconds", "eval_seconds"):
            result.pop(key)
    assert again == before_loss


def test_resume_adds_methods_and_seeds(workspace: Path, tmp_path: Path, trained_seeds: list[int]) -> None:
    small = {"methods": ["random"], "seeds": [0], "help": "as-published"}  # no teacher is trained
    folder = compare(config_of(workspace, tmp_path / "run", compare=small))
    more = small | {"methods": ["random", "magnitude"], "seeds": [0, 2]}
    compare(config_of(workspace, folder, compare=more), resume=True)
    assert trained_seeds == [0, 0, 2, 2]
    assert row_of(folder, "magnitude")["seeds"] == [0, 2]


def test_second_process_on_one_comparison_is_refused(workspace: Path, done: Path) -> None:
    with run_lock(RunFolder(done)), pytest.raises(RunFolderError, match="another process works on this run"):
        compare(config_of(workspace, done), resume=True)


def test_cells_of_another_teacher_run_again(workspace: Path, tmp_path: Path) -> None:
    """More learning rates may choose another dense teacher: cells that used the first one run again."""
    variants = tmp_path / "variants.yaml"
    variants.write_text("mine: {train: {learning_rate: 0.01}}\n")
    grid = {"methods": ["dense", "mine"], "learning_rates": [1e-5], "variants": str(variants), "seeds": [0]}
    folder = compare(config_of(workspace, tmp_path / "run", compare=grid))
    assert cells(folder)["mine-keep0.6-seed0-lr0.01"]["teacher_rate"] == 1e-5
    grid |= {"learning_rates": [1e-5, 1e-2], "seeds": [0, 1]}
    compare(config_of(workspace, folder, compare=grid), resume=True)
    best = row_of(folder, "dense")["learning_rate"]
    assert {cell["teacher_rate"] for cell in cells(folder).values() if cell["method"] == "mine"} == {best}
    assert best == 1e-2


def test_resume_refuses_a_changed_recipe_or_split(workspace: Path, done: Path) -> None:
    before = {str(path): path.read_bytes() for path in done.rglob("*.json")}
    with pytest.raises(RunFolderError, match=r"train\.steps was 3 and is now 4"):
        compare(config_of(workspace, done, train={"steps": 4}), resume=True)
    with pytest.raises(RunFolderError, match=r"compare\.split was 'test' and is now 'valid'"):
        compare(config_of(workspace, done, compare={"split": "valid"}), resume=True)
    with pytest.raises(RunFolderError, match="--resume"):
        compare(config_of(workspace, done))
    assert {str(path): path.read_bytes() for path in done.rglob("*.json")} == before


def test_resume_refuses_a_changed_variant_of_the_same_name(workspace: Path, tmp_path: Path) -> None:
    variants = tmp_path / "variants.yaml"
    variants.write_text("mine: {two-stage: random, lora: {rank: 2}}")
    options = {"methods": ["mine"], "seeds": [0], "variants": str(variants)}
    folder = compare(config_of(workspace, tmp_path / "run", compare=options))
    variants.write_text("mine: {two-stage: random, lora: {rank: 3}}")
    with pytest.raises(RunFolderError, match="another variant of the same name"):
        compare(config_of(workspace, folder, compare=options), resume=True)


def test_concurrent_cells_have_the_same_results(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"methods": ["dense", "taylor", "progressive"], "seeds": [0, 1], "keeps": [0.8, 0.6]}
    serial = compare(config_of(workspace, tmp_path / "one", compare=options))
    monkeypatch.setattr(prunetune.compare.run, "concurrent_jobs", lambda _: 3)
    concurrent = compare(config_of(workspace, tmp_path / "three", compare=options))
    assert list(cells(concurrent)) == list(cells(serial))
    for name, cell in cells(concurrent).items():
        for key in ("items", "widths", "curve"):
            assert cell[key] == cells(serial)[name][key]
        assert cell["crowded"]


@pytest.mark.parametrize("where", ["recipe", "variant"])
def test_concurrent_cells_with_dropout_are_refused(
    where: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "variants.yaml").write_text("mine: {two-stage: random, lora: {dropout: 0.1}}")
    changes: dict[str, Any] = {
        "recipe": {"compare": {"methods": ["random"]}, "lora": {"dropout": 0.1}},
        "variant": {"compare": {"methods": ["random", "mine"], "variants": str(tmp_path / "variants.yaml")}},
    }
    monkeypatch.setattr(prunetune.compare.run, "concurrent_jobs", lambda _: 2)
    with pytest.raises(ConfigError, match=r"compare\.jobs 2 with lora\.dropout .* set compare\.jobs 1"):
        compare(config_of(workspace, tmp_path / "run", **changes[where]))
    assert not (tmp_path / "run").exists()


def raising(error: BaseException) -> Any:
    """A baseline that raises."""

    def fail(_: Any) -> Any:
        raise error

    return fail


# -- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [PlanError("no such plan"), RuntimeError("a bug\nin lines")])
def test_failing_cell_is_reported_and_the_others_run(
    error: Exception, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(workspace, tmp_path / "run", compare={"methods": ["random", "magnitude"], "seeds": [0]})
    with monkeypatch.context() as broken:
        broken.setitem(BASELINES, "random", raising(error))
        folder = compare(config)
    assert str(error).split("\n")[0] in cells(folder)["random-keep0.6-seed0-lr0.01"]["error"]
    assert (row_of(folder, "random")["failed"], row_of(folder, "magnitude")["failed"]) == (1, 0)
    for name in ("table.md", "comparison.html"):
        assert "random-keep0.6-seed0-lr0.01" in (folder / name).read_text()
    compare(config, resume=True)  # a failed cell runs again
    assert row_of(folder, "random")["failed"] == 0
    assert comparison_of(folder)["errors"] == []


def test_cell_out_of_memory_among_others_runs_again_alone(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []
    run_cell = CellRunner.run_cell

    def run_out_of_memory(runner: CellRunner, cell: Any, **options: Any) -> Any:
        calls.append(cell.name)
        if cell.method.name == "random" and len(calls) <= 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_cell(runner, cell, **options)

    monkeypatch.setattr(CellRunner, "run_cell", run_out_of_memory)
    monkeypatch.setattr(prunetune.compare.run, "concurrent_jobs", lambda _: 2)
    options = {"methods": ["random", "magnitude"], "seeds": [0]}
    folder = compare(config_of(workspace, tmp_path / "run", compare=options))
    assert comparison_of(folder)["errors"] == []
    assert "random-keep0.6-seed0-lr0.01: out of memory among concurrent cells" in caplog.text
    assert len(calls) == 3
    cells = [json.loads(file.read_text()) for file in sorted((folder / "cells").iterdir())]
    assert [(cell["method"], cell["crowded"]) for cell in cells] == [("magnitude", True), ("random", False)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_gpu_fault_ends_the_comparison_without_failing_a_cell(
    jobs: int, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(
        workspace, tmp_path / "run", compare={"methods": ["magnitude", "random", "fisher"], "seeds": [0]}
    )
    monkeypatch.setattr(prunetune.compare.run, "concurrent_jobs", lambda _: jobs)
    with monkeypatch.context() as broken:
        broken.setitem(BASELINES, "random", raising(torch.AcceleratorError("CUDA error: unspecified launch failure")))
        with pytest.raises(torch.AcceleratorError):
            compare(config)
    assert not [cell for cell in cells(tmp_path / "run").values() if "error" in cell]
    done = len(cells(tmp_path / "run"))
    folder = compare(config, resume=True)
    assert comparison_of(folder)["errors"] == []
    assert len(cells(folder)) == 3 > done


def test_comparison_raises_if_every_cell_failed(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BASELINES, "random", raising(PlanError("no such plan")))
    with pytest.raises(LimitBroken, match="no such plan"):
        compare(config_of(workspace, tmp_path / "run", compare={"methods": ["random"], "seeds": [0]}))


def test_interruption_keeps_finished_cells(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained_seeds: list[int]
) -> None:
    options = {"methods": ["magnitude", "random"], "seeds": [0], "help": "as-published"}
    config = config_of(workspace, tmp_path / "run", compare=options)
    with monkeypatch.context() as broken:
        broken.setitem(BASELINES, "random", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            compare(config)
    assert list(cells(tmp_path / "run")) == ["magnitude-keep0.6-seed0-lr0.01"]
    compare(config, resume=True)
    assert len(trained_seeds) == 2


def test_interruption_stops_concurrent_cells(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained_seeds: list[int]
) -> None:
    monkeypatch.setattr(prunetune.compare.run, "concurrent_jobs", lambda _: 2)
    monkeypatch.setitem(BASELINES, "random", raising(KeyboardInterrupt()))
    options = {"methods": ["random", "magnitude"], "seeds": [0, 1, 2], "help": "as-published"}
    with pytest.raises(KeyboardInterrupt):
        compare(config_of(workspace, tmp_path / "run", compare=options, train={"steps": 500}))
    assert cells(tmp_path / "run") == {}
    assert len(trained_seeds) <= 2


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"compare": {"methods": ["fihser"]}}, ConfigError, "unknown method 'fihser'; did you mean fisher?"),
        ({"compare": {"methods": []}}, ConfigError, "compare.methods is empty"),
        ({"compare": {"keeps": [0.6, 0.001]}}, PlanError, "0.001 is below what is feasible"),
        ({"compare": {"variants": "absent.yaml"}}, ConfigError, "absent.yaml: cannot read"),
    ],
)
def test_invalid_comparison_is_refused_before_anything_is_written(
    changes: dict[str, Any], error: type[PrunetuneError], line: str, workspace: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=line.replace("?", r"\?")) as refused:
        compare(config_of(workspace, tmp_path / "run", **changes))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


# -- methods and learning rates --------------------------------------------------------------------------------------


def test_all_methods_and_variants_have_rows(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text(
        "taught: {two-stage: magnitude}\nsteep: {train: {learning_rate: 0.03}}\nwide: {dense: true, lora: {rank: 8}}\n"
        "alone: {distill: {teacher: none}}\nbase: {distill: {teacher: base}}\n"
    )
    names = ["untuned", "dense", "dense-equal-help", *BASELINES, "progressive"]
    options = {"methods": names, "seeds": [3], "keeps": [0.8, 0.6], "variants": str(tmp_path / "v.yaml")}
    folder = compare(config_of(workspace, tmp_path / "run", compare=options))
    rows = {(row["method"], row["keep"]): row for row in comparison_of(folder)["rows"]}
    assert comparison_of(folder)["errors"] == []
    assert {name for name, _ in rows} == {*names, "taught", "steep", "wide", "alone", "base"}
    assert len(rows) == 2 * len({name for name, _ in rows})
    assert rows["steep", 0.8]["learning_rate"] == 0.03
    taught = [*names[2:], "taught", "steep"]
    assert all(rows[name, 0.6]["teacher_seconds"] > 0 for name in taught)
    assert not any(rows[name, 0.6]["teacher_seconds"] for name in ("untuned", "dense", "wide", "alone", "base"))
    assert rows["untuned", 0.6] == {**rows["untuned", 0.8], "keep": 0.6, "scores": rows["untuned", 0.6]["scores"]}


def test_baselines_get_the_recipes_help_unless_it_is_as_published(
    workspace: Path, tmp_path: Path, trained_seeds: list[int]
) -> None:
    """The record of every cell says what it had; resumed with other help, baselines alone run again."""
    names = ["untuned", "dense", "dense-equal-help", "magnitude", "progressive"]
    options = {"methods": names, "seeds": [0], "learning_rates": [1e-2]}
    folder = compare(config_of(workspace, tmp_path / "run", compare=options))
    had = {cell["method"]: cell["help"] for cell in cells(folder).values()}
    assert had == {"untuned": None, "dense": PLAIN, **dict.fromkeys(names[2:], TAUGHT)}
    before = cells(folder)
    trained_seeds.clear()
    compare(config_of(workspace, folder, compare=options | {"help": "as-published"}), resume=True)
    assert len(trained_seeds) == 1
    changed = {name for name, cell in cells(folder).items() if cell != before[name]}
    assert changed == {"magnitude-keep0.6-seed0-lr0.01"}
    assert cells(folder)[changed.pop()]["help"] == PLAIN
    assert row_of(folder, "magnitude")["teacher_seconds"] == 0


def test_texts_are_part_of_equal_help(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "texts.jsonl", *({"text": f"shared text {n}"} for n in range(4)))
    seen: dict[str, set[str]] = {}
    real = cell_module.build_passes

    def recording(model: Any, sites: Any, pad_id: int, config: RunConfig, teacher: Any) -> Any:
        passes = real(model, sites, pad_id, config, teacher)
        gate_gradients = passes.gate_gradients

        def watched(examples: Any, gates: Any) -> Any:
            seen[config.compare.help] = seen.get(config.compare.help, set()) | {
                "text" if example.answer_start == len(example.token_ids) else "row" for example in examples
            }
            return gate_gradients(examples, gates)

        passes.gate_gradients = watched
        return passes

    monkeypatch.setattr(cell_module, "build_passes", recording)
    for help in ("equal", "as-published"):
        options = {"methods": ["gate-gradients"], "seeds": [0], "help": help}
        texts = {"distill_texts": [str(tmp_path / "texts.jsonl")], "distill_texts_share": 0.5}
        search = {"init_batches": 4}
        folder = compare(config_of(workspace, tmp_path / help, compare=options, data=texts, search=search))
        (cell,) = cells(folder).values()
        assert cell["help"] == ("dense teacher, texts, all weights, muon" if help == "equal" else PLAIN)
    assert seen == {"equal": {"row", "text"}, "as-published": {"row"}}


def test_rates_of_all_weights_mean_the_same_for_all_methods(workspace: Path, tmp_path: Path) -> None:
    """Of the rates that are tried each gives a two-stage method what it gives to the recipe's own."""
    options = {"learning_rates": [5e-3, 1e-2, 2e-2]}
    config = config_of(workspace, tmp_path / "run", compare=options, train={"weights_rate": 4e-3})
    methods = built_in_methods()
    for rate, weights_rate in ((5e-3, 2e-3), (1e-2, 4e-3), (2e-2, 8e-3)):
        rates = {
            name: Cell(methods[name], 0.6, 0, rate).config(config).train
            for name in ("progressive", "fisher", "dense-equal-help")
        }
        assert rates["fisher"] == rates["dense-equal-help"] == rates["progressive"]
        assert (rates["fisher"].learning_rate, rates["fisher"].weights_rate) == pytest.approx((rate, weights_rate))


def test_old_name_of_the_recipes_method_is_read_with_one_line(
    workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = compare(config_of(workspace, tmp_path / "run", compare={"methods": ["dense", "one-stage"], "seeds": [0]}))
    assert caplog.text.count("one-stage is now progressive") == 1
    assert "one-stage-keep0.6-seed0-lr0.01" in cells(folder)
    assert comparison_of(folder)["reference"] == "one-stage"


def test_dense_variant_is_tuned_with_its_own_options(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: dict[str, RunConfig] = {}
    cell_context = CellRunner.cell_context

    def recording(self: CellRunner, cell: Cell) -> Any:
        context = cell_context(self, cell)
        configs[cell.method.name] = context.config
        return context

    monkeypatch.setattr(CellRunner, "cell_context", recording)
    (tmp_path / "v.yaml").write_text(
        "all: {dense: true, lora: {rank: 8}, train: {weights: all}}\nplain: {dense: true}\n"
    )
    options = {"methods": ["all", "plain"], "variants": str(tmp_path / "v.yaml")}
    folder = compare(
        config_of(workspace, tmp_path / "run", compare=options, lora={"rank": 16, "dense_rank": 4, "alpha": 8})
    )
    assert comparison_of(folder)["errors"] == []
    assert (configs["all"].lora.rank, configs["all"].train.weights) == (8, "all")
    plain = configs["plain"]
    assert (plain.lora.rank, plain.lora.alpha, plain.train.weights) == (4, 2, "adapters")


def test_learning_rate_is_chosen_on_valid_alone(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores on test are the opposite of those on valid, and do not change the choice."""
    real_evaluate = scoring.evaluate

    def evaluate(model: Any, tokenizer: Any, records: Any, *rest: Any, **general: Any) -> Any:
        scored.append(records)
        return real_evaluate(model, tokenizer, records, *rest, **general)

    scored: list[Any] = []
    monkeypatch.setattr(scoring, "evaluate", evaluate)
    scores = {1e-2: 3.0, 1e-3: 1.0, 1e-4: 2.0}
    monkeypatch.setattr(scoring, "validation_nll", lambda _: scores[rates.pop(0)])
    rates = list(scores)
    options = {"methods": ["random"], "seeds": [0, 1], "keeps": [0.8, 0.6], "learning_rates": list(scores)}
    folder = compare(config_of(workspace, tmp_path / "run", compare=options))
    assert rates == []
    assert {
        cell["learning_rate"]: cell.get("valid_nll") for cell in cells(folder).values() if "valid_nll" in cell
    } == scores
    assert [row["chosen"] for row in comparison_of(folder)["rates"]] == [False, True, False]
    assert {(row["learning_rate"], tuple(row["seeds"])) for row in comparison_of(folder)["rows"]} == {(1e-3, (0, 1))}
    assert len(cells(folder)) == 3 + 3  # three trials at the first cell, and the chosen rate at the other three
    # Each trial was scored on both splits, on valid without texts; the other cells on test alone.
    assert [len({record.kind for record in records}) for records in scored] == [2, 1, 2, 1, 2, 1, 2, 2, 2]
    splits = [frozenset(record.id for record in records) for records in scored]
    assert splits[0].isdisjoint(splits[1])
    assert len(set(splits)) == 2


def test_valid_nll_is_that_of_answers(workspace: Path, tmp_path: Path) -> None:
    options = {"methods": ["random"], "seeds": [0], "learning_rates": [1e-2, 1e-3], "split": "valid"}
    folder = compare(config_of(workspace, tmp_path / "run", compare=options))
    for cell in cells(folder).values():
        assert cell["valid_nll"] == cell["headline"]["nll"]
