"""Results of prunetune, pruned once more: bits, files, card and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune import Plan, cut, find_sites, masked
from prunetune.errors import ConfigError, ModelError
from prunetune.export import selfcheck
from prunetune.export.checkpoint import write_checkpoint
from prunetune.export.formats import ExportOptions, export_run
from prunetune.export.gguf import llamacpp
from prunetune.export.selfcheck import compute_logits
from prunetune.export.source import ExportSource
from prunetune.model.history import PruningRun
from prunetune.model.loading import load_meta_model, load_model_and_tokenizer
from prunetune.pipeline.prepare import prepare
from prunetune.pipeline.run import run
from prunetune.pruning.remaining_sites import plan_within
from prunetune.pruning.units import dense_plan
from prunetune.utils.console import SilentConsole
from support.again import recipe, reopen_here
from support.data import subwords
from support.evaluation import characters, speaker, write_model_and_rows
from support.export import plan_of, reference_here
from support.models import kinds_of, random_plan, relative, tiny, tokens

ON_CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}


def smaller(plan: Plan, sites: Any) -> Plan:
    """A plan inside another: each group of a site's units loses some of those that it still has."""
    kept: dict[str, tuple[int, ...]] = {}
    for site in sites:
        of_group: dict[int, list[int]] = {}
        for unit in plan.kept[site.name]:
            parent = site.parent and unit // (site.units // plan.units[site.parent]) not in kept[site.parent]
            if not parent:
                of_group.setdefault(unit // site.units_per_group, []).append(unit)
        align = 8 if site.kind == "expert-channels" else 1
        least = max(align, site.min_units_per_group)
        kept[site.name] = tuple(
            unit for units in of_group.values() for unit in units[: max(least, len(units) * 3 // 4 // align * align)]
        )
    return Plan(kept, plan.units)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_oss", "qwen3_moe"])
def test_pruned_twice_equals_pruned_by_the_composed_plan_to_the_bit(family: str, tmp_path: Path) -> None:
    """All kinds of unit at once; between the two cuts the model is written and opened again."""
    units = tuple(kind for kind in kinds_of(family) if kind != "layers")
    once, twice = tiny(family, ratio=4), tiny(family, ratio=4)
    sites = find_sites(once, units)
    first = random_plan(once, keep=0.8, units=units)
    both = smaller(first, sites)
    cut(once, both, sites=sites)
    cut(twice, first, sites=sites)
    write_checkpoint(twice, subwords(), first, sites, tmp_path / "first", layout="per-layer", card="")
    again = load_model_and_tokenizer(str(tmp_path / "first"), **ON_CPU).model
    left, second = find_sites(again, units), plan_within(both, first)
    assert {site.name: site.units for site in left} == second.units
    with masked(again, second, sites=left):
        expected = compute_logits(again, tokens())
    cut(again, second, sites=left)
    assert again.state_dict().keys() == once.state_dict().keys()
    assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in again.state_dict().items())
    write_checkpoint(again, subwords(), second, left, tmp_path / "second", layout="per-layer", card="")
    reopened = load_model_and_tokenizer(str(tmp_path / "second"), **ON_CPU).model
    assert relative(compute_logits(reopened, tokens()), expected) <= 1e-5
    values = json.loads((tmp_path / "second" / "config.json").read_text())
    assert values["model_type"] == f"pruned_{family}"


def uniform_plan(model: Any) -> Plan:
    """One KV group less, and 64 channels."""
    return plan_of(model, find_sites(model)[0].units - 1, 64)


@pytest.fixture
def checks_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks in this process, as fresh ones take seconds to start."""
    monkeypatch.setattr(selfcheck, "reopen_in_fresh_process", reopen_here)
    monkeypatch.setattr(llamacpp, "reference_continuations", reference_here)


@pytest.mark.usefixtures("checks_here")
@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_result_is_pruned_again_and_its_card_tells_both_runs(layout: str, tmp_path: Path) -> None:
    folder = write_model_and_rows(tmp_path, 8)
    speaker(vocab_size=320).save_pretrained(folder / "dense")
    subwords().save_pretrained(folder / "dense")
    model = load_model_and_tokenizer(str(folder / "dense"), **ON_CPU).model
    sites, plan = find_sites(model), uniform_plan(model) if layout == "uniform" else random_plan(model, keep=0.8)
    first, second = tmp_path / "first", tmp_path / "second" / "model"
    cut(model, plan)
    history = [PruningRun(str(folder / "dense"), layout, 0.8, model.num_parameters(), 2)]
    write_checkpoint(model, subwords(), plan, sites, first, layout=layout, card="", history=history)
    run(recipe(folder, first, "second", layout=layout, budget={"keep": 0.75, "align": 8}))
    models = [load_model_and_tokenizer(str(model), **ON_CPU).model for model in (folder / "dense", first, second)]
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in models]
    assert sizes[0] > sizes[1] > sizes[2]
    told = json.loads((second / "history.json").read_text())
    assert [(entry["model"], entry["params"]) for entry in told] == [
        (str(folder / "dense"), sizes[1]),
        (str(first), sizes[2]),
    ]
    card = (second / "README.md").read_text()
    assert "## History" in card
    for entry in told:
        assert f"{100 * entry['kept']:.1f}% of the prunable parameters kept in 2 steps" in card
    expected = compute_logits(models[2], tokens())
    for to in ("per-layer", "uniform", "gguf", "onnx") if layout == "per-layer" else ("gguf",):
        pad = to == "uniform" and layout == "per-layer"
        result = export_run(tmp_path / "second", to=to, options=ExportOptions(pad=pad))
        assert result.checks[0].ran, result
        if result.path.is_dir() and to != "onnx":
            exported = load_model_and_tokenizer(str(result.path), **ON_CPU).model
            assert relative(compute_logits(exported, tokens()), expected) <= 1e-5
        if to in ("uniform", "per-layer"):
            assert "## History" in (result.path / "README.md").read_text()


def test_per_layer_model_of_another_tool_is_pruned(tmp_path: Path) -> None:
    """It has transformers' `per_layer_config` under the stock model type, and no code."""
    model = tiny(layers=4)
    sites, plan = find_sites(model), random_plan(model)
    write_checkpoint(cut(model, plan), subwords(), plan, sites, tmp_path / "other", layout="per-layer", card="")
    file = tmp_path / "other" / "config.json"
    values = json.loads(file.read_text())
    del values["auto_map"]
    values |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    file.write_text(json.dumps(values))
    for name in ("configuration_pruned.py", "modeling_pruned.py", "plan.json", "SHA256SUMS"):
        (tmp_path / "other" / name).unlink()
    opened = load_model_and_tokenizer(str(tmp_path / "other"), **ON_CPU).model
    assert relative(compute_logits(opened, tokens()), compute_logits(model, tokens())) <= 1e-6
    left = find_sites(load_meta_model(str(tmp_path / "other")))
    again = random_plan(opened, seed=4)
    expected = compute_logits(cut(opened, again, sites=left), tokens())
    write_checkpoint(opened, subwords(), again, left, tmp_path / "result", layout="per-layer", card="")
    reopened = load_model_and_tokenizer(str(tmp_path / "result"), **ON_CPU).model
    assert relative(compute_logits(reopened, tokens()), expected) <= 1e-6
    for change, named in (({"hidden_size": 96}, "hidden_size"), ({"skip": ["norm"]}, "norm")):
        file.write_text(json.dumps(values | {"per_layer_config": {"0": change}}))
        with pytest.raises(ModelError, match=f"per_layer_config names {named}, and layers may differ here in"):
            load_meta_model(str(tmp_path / "other"))


def test_layout_uniform_of_a_result_whose_layers_differ_is_refused(tmp_path: Path) -> None:
    folder, model = write_model_and_rows(tmp_path, 12), speaker()
    sites, plan = find_sites(model), random_plan(model)
    write_checkpoint(cut(model, plan), characters(), plan, sites, tmp_path / "first", layout="per-layer", card="")
    with pytest.raises(ConfigError, match=r"layout uniform needs equal layers, .*: set layout per-layer"):
        prepare(recipe(folder, tmp_path / "first", "run", layout="uniform"), resume=False, console=SilentConsole())


def test_removed_layers_and_blocks_stay_removed(tmp_path: Path) -> None:
    """A layer without any site of the kinds that the second run prunes keeps its place."""
    model = tiny(layers=4)
    units = ("layers", "kv-groups", "mlp-channels")
    sites = find_sites(model, units)
    kept = dense_plan(sites).kept | {"model.layers.2.self_attn": ()}
    plan = Plan(kept | {site.name: () for site in sites if site.layer == 1}, dense_plan(sites).units)
    write_checkpoint(cut(model, plan), subwords(), plan, sites, tmp_path / "first", layout="per-layer", card="")
    again = load_model_and_tokenizer(str(tmp_path / "first"), **ON_CPU).model
    left = find_sites(again, ("kv-groups",))
    assert {site.layer for site in left} == {0, 2}
    second = Plan({site.name: (0,) for site in left}, {site.name: site.units for site in left})
    with masked(again, second, sites=left):
        expected = compute_logits(again, tokens())
    write_checkpoint(cut(again, second), subwords(), second, left, tmp_path / "second", layout="per-layer", card="")
    reopened = load_model_and_tokenizer(str(tmp_path / "second"), **ON_CPU).model
    assert relative(compute_logits(reopened, tokens()), expected) <= 1e-5
    assert ExportSource.open(tmp_path / "second").layer_widths[1].kv_heads == 0
