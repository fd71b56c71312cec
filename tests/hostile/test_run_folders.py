"""No run folder runs code: hostile ones, each opened as commands do; and changed weights are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from prunetune.bench.models import resolve_models
from prunetune.bench.options import BenchOptions
from prunetune.errors import ModelError
from prunetune.evaluation.suites.open_model import check_can_open, dense_model_of_run, open_backend, resolve_checkpoint
from prunetune.evaluation.suites.options import EvalOptions
from prunetune.export.source import ExportSource
from prunetune.model.checksums import CHECKSUM_FILE, verify_checksums, write_checksums
from prunetune.model.loading import open_safetensors
from prunetune.plan import Plan
from prunetune.runs.diff import load_compared_run
from prunetune.train.checkpoints import Checkpoints, TrainingState
from prunetune.utils.files import sha256
from support.hostile import Artefacts, Place, check_runs_nothing, load

pytestmark = pytest.mark.filterwarnings("default")  # lm-eval's and transformers' own
artefact = Artefacts()


@artefact
def changed_modules_of_a_run(place: Place) -> None:
    load(resolve_checkpoint(str(place.run())))


@artefact
def changed_modules_of_a_model_folder(place: Place) -> None:
    load(place.run() / "model")


@artefact
def changed_modules_without_checksums(place: Place) -> None:
    run = place.run()
    (run / "model" / CHECKSUM_FILE).unlink()
    check_can_open(str(run), EvalOptions(device="cpu"))
    load(run / "model")


@artefact
def changed_modules_in_bench(place: Place) -> None:
    run = place.run()
    place.write("run/config.yaml", f"model: {place.model()}\nlayout: per-layer\n")
    for spec in resolve_models([str(run)], BenchOptions(prompt=4, generate=4)):
        load(spec.source, trust_remote_code=spec.trust_remote_code)


@artefact
def changed_modules_in_export(place: Place) -> None:
    source = ExportSource.open(place.run())
    source.load_model()
    (place.folder / "export").mkdir()
    source.copy_other_files(place.folder / "export")
    for name in ("modeling_pruned.py", "configuration_pruned.py"):
        written = (place.folder / "export" / name).read_text()
        assert written == (place.templates / "run" / "model" / name).read_text()


@artefact
def other_modules_of_a_run(place: Place) -> None:
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    run = place.run(auto_map=auto_map)
    place.write("run/model/evil.py", place.code + "class Evil: pass\n")
    write_checksums(run / "model")
    load(run / "model")
    (place.folder / "export").mkdir()
    ExportSource.open(run).copy_other_files(place.folder / "export")
    assert not (place.folder / "export" / "evil.py").exists()
    assert "evil" not in (place.folder / "export" / "config.json").read_text()


@artefact
def modules_of_another_folder(place: Place) -> None:
    other = place.write("other/evil.py", place.code + "class Evil: pass\n").parent
    load(place.run(auto_map={"AutoConfig": f"{other}--evil.Evil", "AutoModelForCausalLM": f"{other}--evil.Evil"}))


@artefact
def per_layer_family_that_nobody_knows(place: Place) -> None:
    load(place.run(model_type="pruned_evil") / "model")


@artefact
def code_as_a_width(place: Place) -> None:
    widths = {
        "num_attention_heads": f"exec({place.code!r})",
        'skip"]; import evil': 1,
        "skip": [f"exec({place.code!r})"],
    }
    load(place.run(per_layer_config={"00": widths, "01": widths}) / "model")


@artefact
def generation_code_of_a_run(place: Place) -> None:
    run = place.run()
    place.write("run/model/custom_generate/generate.py", place.code + "def generate(*a, **k): pass\n")
    load(run / "model")


@artefact
def plan_that_is_a_pickle(place: Place) -> None:
    run = place.run()
    place.write("run/plan.json", place.pickled)
    load_compared_run(run)


@artefact
def plan_with_code_as_a_name(place: Place) -> None:
    place.write("plan.json", {"format": 1, "sites": {f"exec({place.code!r})": {"units": 2, "kept": [0]}}})
    Plan.load(place.folder / "plan.json")


@artefact
def recipe_of_a_run_with_a_tag(place: Place) -> None:
    run = place.run()
    place.write("run/config.yaml", f"model: {place.tag}\n")
    open_backend(str(run), EvalOptions(device="cpu"))


@artefact
def recipe_of_a_run_that_trusts_another_model(place: Place) -> None:
    dense = place.model(model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    run = place.run()
    place.write("run/config.yaml", f"model: {dense}\ntrust_remote_code: true\n")
    check_can_open(dense_model_of_run(str(run)), EvalOptions(device="cpu"))


@artefact
def scores_of_a_run_that_are_a_pickle(place: Place) -> None:
    run = place.run()
    place.write("run/evaluation/pruned.json", place.pickled)
    load_compared_run(run)


@artefact
def checksums_of_files_elsewhere(place: Place) -> None:
    folder = place.model(evil=False)
    place.write(f"model/{CHECKSUM_FILE}", f"{'0' * 64}  ../../../../../../proc/self/environ\n")
    load(folder)


@artefact
def pickled_checkpoint(place: Place) -> None:
    Checkpoints(place.folder / "checkpoints").save(TrainingState(1, tensors={"adapters": {"a": torch.zeros(1)}}))
    file = place.write("checkpoints/step-0000001/adapters.safetensors", place.torch_pickled)
    place.edit("checkpoints/step-0000001/state.json", sha256={file.name: sha256(file)})
    Checkpoints(place.folder / "checkpoints").latest()


@pytest.mark.parametrize("name", artefact)
def test_hostile_artefact_runs_nothing(name: str, place: Place) -> None:
    check_runs_nothing(artefact[name], place)


@pytest.mark.parametrize("change", ["flipped", "missing", "added"])
def test_changed_folder_is_refused_wherever_weights_are_read(change: str, place: Place) -> None:
    model = place.model(evil=False)
    write_checksums(model)
    load(model)
    if change == "flipped":
        content = bytearray((model / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (model / "model.safetensors").write_bytes(content)
        named = "model.safetensors is not what was written"
    elif change == "missing":
        (model / "generation_config.json").unlink()
        named = "generation_config.json is missing"
    else:
        place.write("model/model-00002.safetensors", (model / "model.safetensors").read_bytes())
        named = "model-00002.safetensors was not written with the model"
    for read in (load, lambda folder: open_safetensors(str(folder)), ExportSource.open):
        with pytest.raises(ModelError, match=named) as refused:
            read(model)
        assert "\n" not in str(refused.value)


def test_folder_is_hashed_once_in_a_process(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place.templates / "run" / "model", place.folder / "model")
    hashed: list[Path] = []
    monkeypatch.setattr("prunetune.model.checksums.sha256", lambda path: hashed.append(path) or sha256(path))
    assert verify_checksums(place.folder / "model")
    count = len(hashed)
    assert verify_checksums(place.folder / "model")
    assert len(hashed) == count > 3
    (place.folder / "model" / "LICENSE").write_text("a file that no loader reads\n")
    assert verify_checksums(place.folder / "model")
