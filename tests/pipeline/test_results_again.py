"""Results of prunetune, pruned once more: bits, files, card and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune import Plan, cut, find_sites, masked
from prunetune.config.recipe import from_mapping
from prunetune.errors import ConfigError
from prunetune.export.checkpoint import write_checkpoint
from prunetune.export.formats import ExportOptions, export_run
from prunetune.export.selfcheck import compute_logits
from prunetune.model.loading import load_meta_model, load_model_and_tokenizer
from prunetune.pipeline.prepare import prepare
from prunetune.pipeline.run import run
from prunetune.pruning.remaining_sites import plan_within
from prunetune.utils.console import SilentConsole
from support.data import subwords
from support.evaluation import write_model_and_rows
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


def recipe(folder: Path, model: Path, out: str, **changes: Any) -> Any:
    """A run of two steps without a teacher."""
    values = {
        "model": str(model),
        "out": str(folder / out),
        "device": "cpu",
        "dtype": "float32",
        "data": {"train": [str(folder / "rows.jsonl")]},
        "budget": {"keep": 0.8, "align": 8},
        "train": {"steps": 2, "batch_size": 2, "learning_rate": 1e-3},
        "search": {"init_batches": 1},
        "distill": {"teacher": "none"},
        "evaluate": {"dense_tuned": False, "limit": 4, "generate_limit": 1, "max_new_tokens": 2},
    }
    return from_mapping(values | changes)


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_result_is_pruned_again_and_its_card_tells_both_runs(layout: str, tmp_path: Path) -> None:
    folder = write_model_and_rows(tmp_path, 12)
    run(recipe(folder, folder / "dense", "first", layout=layout))
    first, second = tmp_path / "first" / "model", tmp_path / "second" / "model"
    run(recipe(folder, first, "second", layout=layout, budget={"keep": 0.75, "align": 8}))
    models = [load_model_and_tokenizer(str(model), **ON_CPU).model for model in (folder / "dense", first, second)]
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in models]
    assert sizes[0] > sizes[1] > sizes[2]
    history = json.loads((second / "history.json").read_text())
    assert [(entry["model"], entry["params"]) for entry in history] == [
        (str(folder / "dense"), sizes[1]),
        (str(first), sizes[2]),
    ]
    card = (second / "README.md").read_text()
    assert "## History" in card
    assert "## History" not in (first / "README.md").read_text()
    for entry in history:
        assert f"{100 * entry['kept']:.1f}% of the prunable parameters kept in 2 steps" in card
    expected = compute_logits(models[2], tokens())
    targets = ("per-layer", "onnx", "gguf", "uniform") if layout == "per-layer" else ("uniform", "onnx", "gguf")
    for to in targets:
        pad = to == "uniform" and layout == "per-layer"
        result = export_run(tmp_path / "second", to=to, options=ExportOptions(pad=pad))
        assert result.checks[0].ran, result
        if result.path.is_dir() and to != "onnx":
            exported = load_model_and_tokenizer(str(result.path), **ON_CPU).model
            assert relative(compute_logits(exported, tokens()), expected) <= 1e-5
        if to in ("uniform", "per-layer"):
            assert "## History" in (result.path / "README.md").read_text()
