"""`export_run`: it overwrites nothing, keeps nothing that fails its check, and refuses in one line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prunetune import Plan, cut, export_run, find_sites
from prunetune.config.recipe import UnitName
from prunetune.errors import ConfigError, ModelError, PlanError, SelfCheckFailed
from prunetune.export import convert
from prunetune.export.checkpoint import write_checkpoint
from prunetune.export.result import ExportOptions
from prunetune.export.selfcheck import SelfCheck, compute_logits
from prunetune.model.checksums import verify_checksums, write_checksums
from prunetune.pruning.units import dense_plan
from support.data import subwords
from support.export import WIDE, run_folder
from support.models import random_plan, relative, tiny

IDS = torch.arange(32)[None]


def logits_of(folder: Path) -> torch.Tensor:
    return compute_logits(AutoModelForCausalLM.from_pretrained(folder).eval(), IDS)


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_export_rewrites_the_same_layout_in_another_dtype(layout: str, tmp_path: Path) -> None:
    run, model = run_folder(tmp_path / "run", subwords(), layout=layout)
    result = export_run(run / "model", layout, options=ExportOptions(dtype="bf16"))
    assert result.path == run / f"model-{layout}-bf16"
    assert {tensor.dtype for tensor in load_file(result.path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((result.path / "config.json").read_text())["dtype"] == "bfloat16"
    assert result.params == sum(weight.numel() for weight in model.parameters())


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the check in a fresh process; the test itself opens the written folder."""
    monkeypatch.setattr(convert, "check_checkpoint", lambda written, tokens, expected: SelfCheck(0.0, tokens.numel()))


@pytest.mark.usefixtures("_quick")
def test_export_without_dtype_keeps_the_weights(tmp_path: Path) -> None:
    run, model = run_folder(tmp_path / "run", subwords(), layout="uniform")
    result = export_run(run, "uniform")
    assert result.path == run / "exports" / "uniform"
    assert torch.equal(logits_of(result.path), compute_logits(model, IDS))
    assert verify_checksums(result.path)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2"])
def test_padded_model_has_the_same_logits(family: str, tmp_path: Path) -> None:
    run, model = run_folder(tmp_path / "run", subwords(), family)
    with pytest.raises(ModelError, match=r"--layout uniform, or export gguf or onnx, or .* times the size with --pad"):
        export_run(run, "uniform")
    result = export_run(run, "uniform", options=ExportOptions(pad=True))
    assert relative(logits_of(result.path), compute_logits(model, IDS)) <= 1e-5
    assert "times the parameters" in result.notes[0]


@pytest.mark.usefixtures("_quick")
def test_padding_fills_a_skipped_attention(tmp_path: Path) -> None:
    plan = random_plan(tiny("qwen3", **WIDE))
    plan = Plan({**plan.kept, "model.layers.1.self_attn": ()}, plan.units)
    run, model = run_folder(tmp_path / "run", subwords(), "qwen3", plan=plan)
    result = export_run(run, "uniform", options=ExportOptions(pad=True))
    assert relative(logits_of(result.path), compute_logits(model, IDS)) <= 1e-5


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("layers", [(1,), range(4)], ids=["one", "all"])
@pytest.mark.parametrize("block", ["attention-blocks", "mlp-blocks"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_padding_fills_removed_blocks(family: str, block: UnitName, layers: Iterable[int], tmp_path: Path) -> None:
    """Also where they are no module of their own, or of units that cannot be pruned singly."""
    model = tiny(family, layers=4, vocab_size=320)
    sites = find_sites(model, (block,))
    plan = dense_plan(sites)
    plan = Plan({**plan.kept, **{site.name: () for site in sites if site.layer in layers}}, plan.units)
    write_checkpoint(
        cut(model, plan, sites=sites), subwords(), plan, sites, tmp_path / "m", layout="per-layer", card=""
    )
    result = export_run(tmp_path / "m", "uniform", options=ExportOptions(pad=True))
    assert relative(logits_of(result.path), compute_logits(model, IDS)) <= 1e-5


def test_export_overwrites_nothing_and_removes_what_fails_its_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = run_folder(tmp_path / "run", subwords(), layout="uniform")
    (tmp_path / "deep").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export_run(run, "uniform", out=tmp_path / "deep")
    save = convert.save_file
    monkeypatch.setattr(
        convert,
        "save_file",
        lambda tensors, *rest: save({name: 1.5 * tensor for name, tensor in tensors.items()}, *rest),
    )
    with pytest.raises(SelfCheckFailed, match="differs"):
        export_run(run, "uniform", out=tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "run"]


def test_export_refuses_unknown_formats_dtypes_and_folders(tmp_path: Path) -> None:
    run, _ = run_folder(tmp_path / "run", subwords(), layout="uniform")
    with pytest.raises(ConfigError, match="'tar' is not known; known are uniform, per-layer"):
        export_run(run, "tar")
    with pytest.raises(ConfigError, match="takes no dtype 'f64'; use one of f32"):
        export_run(run, "uniform", options=ExportOptions(dtype="f64"))
    with pytest.raises(ModelError, match="its layers are equal"):
        export_run(run, "per-layer")
    with pytest.raises(ModelError, match=r"no run folder .* and no model folder"):
        export_run(tmp_path, "uniform")


def lose_a_shard(run: Path) -> None:
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (run / "model" / "model.safetensors").rename(run / "model" / names["a"])
    (run / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def change_weights(run: Path) -> None:
    file = run / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.down_proj.weight"] = weights["model.layers.0.mlp.down_proj.weight"][:, 1:].contiguous()
    save_file(weights, file, {"format": "pt"})
    write_checksums(run / "model")


def change_a_byte(run: Path) -> None:
    file = run / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def change_plan(run: Path) -> None:
    file = run / "model" / "plan.json"
    values = json.loads(file.read_text())
    values["sites"]["model.layers.1.mlp"]["kept"] = [0]
    file.write_text(json.dumps(values))


def name_no_activation(run: Path) -> None:
    file = run / "model" / "config.json"
    file.write_text(file.read_text().replace('"silu"', '"none"'))


DAMAGES = {
    "torn": (lambda run: cut_short(run / "model" / "model.safetensors"), ModelError, "not whole"),
    "no weights": (lambda run: (run / "model" / "model.safetensors").unlink(), ModelError, "no weights"),
    "a shard is missing": (lose_a_shard, ModelError, "model-00002-of-00002.safetensors is missing"),
    "other weights": (change_weights, ModelError, "do not belong together"),
    "a changed byte": (change_a_byte, ModelError, "model.safetensors is not what was written"),
    "another plan": (change_plan, PlanError, "keeps 1 units at model.layers.1.mlp .* another model"),
    "no plan": (lambda run: (run / "model" / "plan.json").write_text("{}"), PlanError, "not a plan"),
    "no configuration": (lambda run: cut_short(run / "model" / "config.json"), ModelError, "cannot be read"),
    "no activation": (name_no_activation, ModelError, "config.json: KeyError: 'none'; write the model again"),
    "unfinished": (lambda run: (run / "model").rename(run / "gone"), ModelError, "--resume"),
}


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_export_refuses_a_damaged_folder_in_one_line(damage: str, layout: str, tmp_path: Path) -> None:
    run, _ = run_folder(tmp_path / "run", subwords(), layout=layout)
    change, error, match = DAMAGES[damage]
    change(run)
    with pytest.raises(error, match=match) as refusal:
        export_run(run, layout)
    assert "\n" not in str(refusal.value)
    assert not (run / "exports").exists()
