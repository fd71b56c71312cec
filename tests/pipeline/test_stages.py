"""Whole runs: every file is written, a run repeats to the byte, and a kill at any moment costs only time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunetune.cli.preview import render_dry_run
from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping, load_saved_recipe
from prunetune.errors import ConfigError, DataError, ModelError, RunFolderError
from prunetune.evaluation.results import Evaluation
from prunetune.model.loading import load_model_and_tokenizer
from prunetune.pipeline import prepare, stages
from prunetune.pipeline.run import run
from prunetune.plan import Plan
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import kept_params
from prunetune.runs.folder import RunFolder, run_lock
from prunetune.train.loop import tune_and_prune
from prunetune.utils.console import SilentConsole
from support.data import subwords, write_lines
from support.evaluation import characters, speaker

STEPS = 8  # 3 of search, 2 of settling, 3 of tuning
RECIPE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "budget": {"keep": 0.6, "align": 8},
    "train": {"steps": STEPS, "batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 2, "validate_every": 4},
    "lora": {"rank": 4, "dropout": 0.1},
    "search": {"share": 0.4, "settle": 0.25, "init_batches": 1, "batch_size": 4},
    "evaluate": {"drift": False, "limit": 4, "generate_limit": 1, "max_new_tokens": 4, "dense_tuned": True},
}
LAYOUTS = ("per-layer", "uniform")
NONE = {"teacher": "none"}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data."""
    folder = tmp_path_factory.mktemp("place")
    save_model(folder / "dense")
    rows = [{"prompt": f"Case {n}: ", "choices": ["yes", "no"], "answer": n % 2, "task": "choice"} for n in range(24)]
    rows += [{"prompt": f"Repeat {n}: ", "completion": f"{n} {n}", "task": "open"} for n in range(24)]
    write_lines(folder / "rows.jsonl", *rows)
    return folder


def save_model(folder: Path) -> None:
    model = speaker()
    model.save_pretrained(folder)
    characters().save_pretrained(folder)


def values_of(workspace: Path, out: Path, layout: str = "per-layer", **changes: Any) -> dict[str, Any]:
    paths = {
        "model": str(workspace / "dense"),
        "out": str(out),
        "layout": layout,
        "data": {"train": [str(workspace / "rows.jsonl")]},
        "distill": {"teacher": "dense" if layout == "per-layer" else "none"},
    }
    return merge_mappings(merge_mappings(RECIPE, paths), changes)


def config_of(workspace: Path, out: Path, layout: str = "per-layer", **changes: Any) -> RunConfig:
    return from_mapping(values_of(workspace, out, layout, **changes))


@pytest.fixture(scope="module")
def done(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One uninterrupted run of each layout."""
    folder = tmp_path_factory.mktemp("runs")
    return {layout: run(config_of(workspace, folder / layout, layout), command="prunetune run") for layout in LAYOUTS}


def results(folder: Path) -> dict[str, bytes]:
    """Files of a run that have to be equal to the byte, by name."""
    return {name: (folder / name).read_bytes() for name in ("plan.json", "model/model.safetensors", "model/plan.json")}


def steps_in(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("family", "layout"),
    [("phi3", "per-layer"), ("phi3", "uniform"), ("glm4", "per-layer"), ("gpt_neox", "uniform"), ("opt", "per-layer"),
     ("falcon", "uniform"), ("mixtral", "per-layer"), ("gemma2", "per-layer"), ("bloom", "per-layer")],
)  # fmt: skip
def test_run_of_other_families_ends_on_budget(family: str, layout: str, workspace: Path, tmp_path: Path) -> None:
    model = speaker(family)
    model.save_pretrained(tmp_path / "dense")
    characters().save_pretrained(tmp_path / "dense")
    changes = {"model": str(tmp_path / "dense"), "train": {"steps": 4}, "distill": {"teacher": "base"}}
    folder = run(config_of(workspace, tmp_path / "run", layout, **changes))
    plan = Plan.load(folder / "plan.json")
    assert kept_params(find_sites(model), plan) <= 0.6 * sum(site.params for site in find_sites(model))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["selfcheck"]["ok"]
    dense, pruned = manifest["model"], manifest["pruned"]
    assert dense["decoder_params"] - pruned["decoder_params"] == dense["params"] - pruned["params"]
    blocks = {"gpt_neox": "MLP", "mixtral": "attention", "phi3": "attention and MLP"}
    assert f"% of the {blocks.get(family, '')}" in (folder / "model" / "README.md").read_text()
    if family in ("gpt_neox", "mixtral"):  # what stays whole is of the decoder, too
        layers = model.get_decoder().layers
        assert dense["decoder_params"] == sum(weight.numel() for weight in layers.parameters())


@pytest.mark.parametrize(
    ("family", "layout", "units"),
    [
        ("mixtral", "per-layer", ["kv-groups", "experts", "expert-channels"]),
        ("llama", "uniform", ["layers", "kv-groups", "query-heads", "mlp-channels"]),
        ("qwen3", "per-layer", ["layers", "attention-blocks", "mlp-blocks", "query-heads", "mlp-channels"]),
    ],
)
def test_run_prunes_other_units(family: str, layout: str, units: list[str], workspace: Path, tmp_path: Path) -> None:
    model = speaker(family, layers=4)
    model.save_pretrained(tmp_path / "dense")
    characters().save_pretrained(tmp_path / "dense")
    changes = {"model": str(tmp_path / "dense"), "train": {"steps": 6}, "distill": {"teacher": "base"}}
    changes |= {
        "evaluate": {"drift": False, "dense_tuned": False},
        "budget": {"units": units, "protect": "2" if len(units) > 3 else ""},
    }
    folder = run(config_of(workspace, tmp_path / "run", layout, **changes))
    plan, sites = Plan.load(folder / "plan.json"), find_sites(model, units)
    assert kept_params(sites, plan) <= 0.6 * sum(site.params for site in sites)
    assert plan.kept.get("model.layers.2:layers", (0,)) == (0,)
    manifest = json.loads((folder / "manifest.json").read_text())
    dense, pruned = manifest["model"], manifest["pruned"]
    assert dense["decoder_params"] - pruned["decoder_params"] == dense["params"] - pruned["params"]
    assert manifest["selfcheck"]["max_relative"] <= 1e-5
    page = (folder / "report.html").read_text()
    assert all(
        kind.replace("-", " ").capitalize() in page for kind in units if kind not in ("kv-groups", "mlp-channels")
    )


# -- what a run leaves -----------------------------------------------------------------------------------------------


@layouts
def test_run_leaves_every_file(layout: str, done: dict[str, Path]) -> None:
    folder = done[layout]
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    expected = {"config.yaml", "plan.json", "metrics.jsonl", "validation.jsonl", "manifest.json", "report.html"}
    expected |= {f"evaluation/{name}.json" for name in ("dense", "tuned", "pruned")}
    expected |= {f"model/{name}" for name in ("config.json", "model.safetensors", "plan.json", "README.md")}
    expected |= {"model/tokenizer.json", "model/tokenizer_config.json"}
    assert expected <= files
    assert not [name for name in files if ".partial" in name or ".unchecked" in name or ".old" in name]
    assert steps_in(folder / "metrics.jsonl") == list(range(1, STEPS + 1))
    assert steps_in(folder / "validation.jsonl") == [4, 8]
    for name in ("dense", "tuned", "pruned"):
        evaluation = Evaluation.from_json((folder / "evaluation" / f"{name}.json").read_text())
        assert set(evaluation.tasks) <= {"choice", "open"}
        assert evaluation.tasks


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_dense_tuned_model_is_kept_as_an_adapter_folder(
    workspace: Path, done: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNETUNE_CACHE", str(tmp_path))
    folder, ids = done["per-layer"], torch.arange(3, 15)[None]
    on_cpu: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    merged = load_model_and_tokenizer(str(folder / "tuned" / "adapter"), **on_cpu).model
    dense = AutoModelForCausalLM.from_pretrained(workspace / "dense").eval()
    with torch.no_grad():
        untuned = dense(ids).logits
        by_peft = PeftModel.from_pretrained(dense, folder / "tuned" / "adapter")(ids).logits
        torch.testing.assert_close(merged(ids).logits, by_peft)
    assert not torch.allclose(by_peft, untuned, atol=0.01)
    context = prepare.prepare(load_saved_recipe(folder / "config.yaml"), resume=True, console=SilentConsole())
    again, scored = (
        stages.score_model(context, merged),
        Evaluation.from_json((folder / "evaluation" / "tuned.json").read_text()),
    )
    for name, task in scored.tasks.items():
        for metric, score in task.scores.items():
            assert again.tasks[name].scores[metric].value == pytest.approx(score.value, nan_ok=True)


@layouts
def test_manifest_counts_data_and_parameters(layout: str, done: dict[str, Path]) -> None:
    folder = done[layout]
    manifest = json.loads((folder / "manifest.json").read_text())
    sites = find_sites(speaker())
    plan = Plan.load(folder / "plan.json")
    assert manifest["pruned"]["decoder_params"] == kept_params(sites, plan)
    assert manifest["pruned"]["decoder_params"] <= 0.6 * manifest["model"]["decoder_params"]
    assert manifest["selfcheck"]["ok"]
    assert manifest["selfcheck"]["max_relative"] <= 1e-5
    assert set(manifest["gain"]["speed"]) == {"throughput", "prefill", "decode"}, "measured in turns"
    assert sum(manifest["data"]["counts"].values()) == 48


@layouts
def test_checkpoint_opens_with_the_widths_of_the_plan(layout: str, done: dict[str, Path]) -> None:
    folder = done[layout]
    plan = Plan.load(folder / "plan.json")
    own_code = layout == "per-layer"
    model = AutoModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=own_code, dtype="auto")
    dense = speaker()
    sites = find_sites(dense)
    gone = sum(site.params for site in sites) - kept_params(sites, plan)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(parameter.numel() for parameter in dense.parameters()) - gone
    assert sum(tensor.numel() for tensor in load_file(folder / "model" / "model.safetensors").values()) == count
    if layout == "uniform":
        assert type(model).__module__.startswith("transformers.")
        assert not list((folder / "model").glob("*.py"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=own_code)
    answer = model.generate(**tokenizer("Case 1: ", return_tensors="pt"), max_new_tokens=2, do_sample=False)
    assert answer.shape[0] == 1


@layouts
def test_same_recipe_gives_the_same_bytes(layout: str, workspace: Path, done: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(1234)
    config = config_of(workspace, tmp_path / "again", layout, evaluate={"dense_tuned": False})
    assert results(run(config)) == results(done[layout])
    assert not (tmp_path / "again" / "evaluation" / "tuned.json").exists()


# -- kills -----------------------------------------------------------------------------------------------------------

RUNNER = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
values, moment = json.loads(sys.argv[1]), sys.argv[2]
import prunetune.pipeline.finish, prunetune.pipeline.run, prunetune.pipeline.stages
import prunetune.runs.folder, prunetune.utils.files, transformers
from prunetune.config.recipe import from_mapping

def after(owner, name, when):
    plain = getattr(owner, name)
    def deadly(*args, **kwargs):
        result = plain(*args, **kwargs)
        if when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, deadly)

if moment.startswith("step "):
    step = int(moment[5:])
    wanted = ("metrics.jsonl", step)
    after(prunetune.runs.folder.RunFolder, "append_record", lambda _, name, record: (name, record["step"]) == wanted)
elif moment == "checkpoint":
    after(prunetune.utils.files, "_sync", lambda path: "step-" in str(path) and path.suffix == ".safetensors")
elif moment == "weights":
    after(transformers.PreTrainedModel, "save_pretrained", lambda *_: True)
elif moment == "renaming":
    after(prunetune.utils.files, "_sync", lambda path: path.name == "model.unchecked.partial")
elif moment == "checked":
    after(prunetune.pipeline.finish, "check_checkpoint", lambda *_: True)
elif moment == "evaluated":
    after(prunetune.pipeline.stages, "evaluate", lambda *_: True)
prunetune.pipeline.run.run(from_mapping(values), resume=True)
"""


def killed(values: dict[str, Any], moment: str) -> None:
    """Run in a process that is killed at a moment of the run; fails if the moment never comes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(values), moment],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]


def assert_nothing_half_written(folder: Path) -> None:
    """Every file with its final name is complete."""
    if (folder / "model").exists():
        plan = Plan.load(folder / "model" / "plan.json")
        stored = sum(tensor.numel() for tensor in load_file(folder / "model" / "model.safetensors").values())
        sites = find_sites(speaker())
        dense = sum(parameter.numel() for parameter in speaker().parameters())
        assert stored == dense - sum(site.params for site in sites) + kept_params(sites, plan)
    for file in folder.rglob("*.json"):
        if not any(".partial" in name for name in file.parts):
            json.loads(file.read_text())


@pytest.mark.parametrize(
    ("layout", "moments"),
    [
        ("per-layer", ("step 3", "step 4", "step 7", "weights")),  # search, settle, tune, and the end
        ("uniform", ("checkpoint", "renaming", "evaluated")),
    ],
)
def test_run_killed_several_times_ends_with_the_same_bytes(
    layout: str, moments: tuple[str, ...], workspace: Path, done: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    values = values_of(workspace, out, layout, evaluate={"dense_tuned": False})
    for moment in moments:
        killed(values, moment)
        assert_nothing_half_written(out)
        assert (out / "model").exists() == (moment == "evaluated")
    assert results(run(from_mapping(values), resume=True)) == results(done[layout])
    assert steps_in(out / "metrics.jsonl") == list(range(1, STEPS + 1))
    assert steps_in(out / "validation.jsonl") == [4, 8]
    left = [path.name for path in out.iterdir() if ".partial" in path.name or ".unchecked" in path.name]
    assert left == []


def test_finished_run_resumes_to_itself(workspace: Path, done: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(done["uniform"], out)
    (out / "report.html").unlink()
    before = results(out)
    run(config_of(workspace, out, "uniform"), resume=True)
    assert results(out) == before
    assert (out / "report.html").exists()


# -- refusals --------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", [run, render_dry_run])
def test_resume_refuses_changed_data(command: Callable[..., Any], done: dict[str, Path], workspace: Path) -> None:
    file, before = workspace / "rows.jsonl", files_of(done["uniform"])
    rows = file.read_text()
    try:
        file.write_text(rows.replace("Case 3", "Case three"))
        with pytest.raises(RunFolderError, match=r"the data of .+ changed since the run began: put the old rows back"):
            command(config_of(workspace, done["uniform"], "uniform"), resume=True)
    finally:
        file.write_text(rows)
    assert files_of(done["uniform"]) == before


def test_resume_refuses_a_changed_recipe(workspace: Path, done: dict[str, Path]) -> None:
    before = files_of(done["uniform"])
    other = config_of(workspace, done["uniform"], "uniform", budget={"keep": 0.7}, seed=3)
    with pytest.raises(RunFolderError, match=r"budget\.keep was 0\.6 and is now 0\.7") as refused:
        run(other, resume=True)
    assert "seed was 0 and is now 3" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert files_of(done["uniform"]) == before


def test_existing_folder_is_not_overwritten(workspace: Path, done: dict[str, Path], tmp_path: Path) -> None:
    before = files_of(done["uniform"])
    with pytest.raises(RunFolderError, match="--resume"):
        run(config_of(workspace, done["uniform"], "uniform"))
    assert files_of(done["uniform"]) == before
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(RunFolderError, match="--out"):
            run(config_of(workspace, tmp_path), resume=resume)
    assert files_of(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(RunFolderError, match="is a file"):
        run(config_of(workspace, tmp_path / "notes.txt"))


def test_second_process_on_a_run_is_refused(workspace: Path, done: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(done["uniform"], out)
    with run_lock(RunFolder(out)), pytest.raises(RunFolderError, match="another process works on this run") as refused:
        run(config_of(workspace, out, "uniform"), resume=True)
    assert "\n" not in str(refused.value)
    assert results(run(config_of(workspace, out, "uniform"), resume=True)) == results(done["uniform"])


def test_run_killed_while_its_folder_is_made_can_be_resumed(
    workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rum").mkdir()
    (tmp_path / "rum" / "config.yaml").touch()
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml.partial").write_text("mod")
    run(config_of(workspace, out, evaluate={"dense_tuned": False}, train={"steps": 1}), resume=True)
    assert (out / "report.html").exists()
    assert f"{out} holds no run to resume (similar names: {tmp_path / 'rum'}): a new run starts" in caplog.text


@pytest.mark.parametrize("how", ["cut short", "no file", "not safetensors"])
def test_broken_weights_raise_one_line(how: str, workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "dense", tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    data = file.read_bytes()
    file.unlink()
    if how != "no file":
        file.write_bytes(data[: len(data) // 2] if how == "cut short" else b"not weights")
    with pytest.raises(ModelError, match="dense") as refused:
        run(config_of(workspace, tmp_path / "run", model=str(tmp_path / "dense")))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "model").exists()


def test_full_disk_is_refused_before_anything_is_written(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(RunFolderError, match="free some space") as refused:
        run(config_of(workspace, tmp_path / "deep" / "run"))
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("command", [run, render_dry_run])
def test_split_without_a_fitting_row_is_refused(
    command: Callable[..., Any], split: str, workspace: Path, tmp_path: Path
) -> None:
    write_lines(tmp_path / "long.jsonl", *({"text": f"{n} is far too long. " * 9} for n in range(20)))
    data = {split: [str(tmp_path / "long.jsonl")], "max_length": 60, "too_long": "drop"}
    with pytest.raises(DataError, match=rf"no example of {split} fits the limit .* raise data\.max_length"):
        command(config_of(workspace, tmp_path / "run", data=data))
    assert not (tmp_path / "run").exists()


def test_token_without_an_embedding_row_is_refused(workspace: Path, tmp_path: Path) -> None:
    """A token that is used for padding only is accepted; one that rows contain is refused."""
    folder = tmp_path / "dense"
    shutil.copytree(workspace / "dense", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    config = config_of(workspace, tmp_path / "run", model=str(folder), evaluate={"dense_tuned": False}, distill=NONE)
    assert (run(config) / "model").is_dir()
    tokenizer.add_tokens(["Case"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ModelError, match=r"gives token \d+ \(\w+\), and its embedding has \d+ rows; resize it"
    ) as refused:
        run(config_of(workspace, tmp_path / "other", model=str(folder)))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "other").exists()


def test_weights_are_written_in_the_dtype_they_were_stored_in(workspace: Path, tmp_path: Path) -> None:
    """This holds even if the configuration names no dtype."""
    folder = tmp_path / "dense"
    shutil.copytree(workspace / "dense", folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    config_values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({key: config_values[key] for key in config_values if "dtype" not in key})
    )
    done = run(config_of(workspace, tmp_path / "run", model=str(folder), evaluate={"dense_tuned": False}, distill=NONE))
    assert {tensor.dtype for tensor in load_file(done / "model" / "model.safetensors").values()} == {torch.bfloat16}


def test_distance_to_the_teacher_is_recorded(workspace: Path, tmp_path: Path) -> None:
    values = values_of(workspace, tmp_path / "run", distill={"teacher": "base"}, evaluate={"dense_tuned": False})
    folder = run(from_mapping(values))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(record["distance"] >= 0 for record in records)
    assert records[-1]["distance"] > 0


@pytest.mark.parametrize("template", ["auto", "raw"])
def test_model_tuned_on_chats_stops_at_the_end_of_a_turn(template: str, tmp_path: Path) -> None:
    tokenizer, model = subwords(), speaker(vocab_size=len(subwords()))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "dense")
    chats = [[{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}"}] for n in range(24)]
    rows = write_lines(tmp_path / "rows.jsonl", *({"messages": messages} for messages in chats))
    changes = {
        "distill": NONE,
        "evaluate": {"drift": False, "dense_tuned": False},
        "data": {"train": [rows], "template": template},
    }
    done = run(config_of(tmp_path, tmp_path / "run", **changes))
    eos_token_id = json.loads((done / "model" / "generation_config.json").read_text())["eos_token_id"]
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<|end|>"])
    assert eos_token_id == (ends[0] if template == "raw" else ends)


def test_large_model_gets_base_teacher_and_adapters(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explicit = {"distill": {"teacher": "base", "share": 0.5}, "train": {"weights": "adapters"}}
    expected = run(config_of(workspace, tmp_path / "told", **explicit))
    monkeypatch.setattr(prepare, "LARGE_MODEL_PARAMS", 1)
    decided = run(config_of(workspace, tmp_path / "large", distill={"teacher": "auto"}))
    assert results(decided) == results(expected)


def test_distill_texts_are_used_with_a_teacher_only_and_the_dense_model_is_tuned_once(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "texts.jsonl", *({"text": f"Some text, number {n}."} for n in range(5)))
    jobs: list[Any] = []
    monkeypatch.setattr(stages, "tune_and_prune", lambda job: (jobs.append(job), tune_and_prune(job))[1])
    run(
        config_of(
            workspace,
            tmp_path / "run",
            data={"distill_texts": [str(tmp_path / "texts.jsonl")], "distill_texts_share": 0.5},
        )
    )
    dense, pruned, again = jobs
    assert [job.teacher is None for job in jobs] == [True, False, True]
    assert again.checkpoints.latest().step == STEPS, "the third has nothing left to do"
    assert dense.config.lora.rank == pruned.config.lora.dense_rank != pruned.config.lora.rank
    unlabelled = [
        example
        for step in range(50)
        for example in pruned.train_stream.batch_at(step)
        if example.answer_start == len(example.token_ids)
    ]
    assert 0.4 < len(unlabelled) / (50 * pruned.config.train.batch_size) < 0.6
    assert all(example.answer_start < len(example.token_ids) for example in dense.train_stream.examples)


def test_distill_texts_without_a_teacher_are_refused(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.distill_texts needs a teacher .* set distill\.teacher"):
        config_of(workspace, tmp_path / "run", data={"distill_texts": ["a.jsonl"]}, distill={"teacher": "none"})


@pytest.mark.parametrize("content", [b"null", b"{", b"\xff", b'{"format": 1, "tasks": 5}'])
def test_scores_that_cannot_be_read_are_named_on_resume(content: bytes, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    context: Any = SimpleNamespace(folder=folder)
    file = folder.evaluation_file("dense")
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(RunFolderError, match=r"dense\.json cannot be read .*: remove it to score anew") as error:
        stages.evaluate_models(context, ["dense"])
    assert "\n" not in str(error.value)
    file.unlink()
    os.mkfifo(file)  # whose reader would wait for ever
    with pytest.raises(RunFolderError, match="it is no regular file"):
        stages.evaluate_models(context, ["dense"])
