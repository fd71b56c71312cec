"""Results of prunetune, pruned once more: bits, files, card and scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from prunetune import Plan, cut, find_sites, masked
from prunetune.bench import measure_models
from prunetune.errors import ConfigError, ModelError
from prunetune.export import selfcheck
from prunetune.export.checkpoint import write_checkpoint
from prunetune.export.formats import ExportOptions, export_run
from prunetune.export.gguf import llamacpp
from prunetune.export.selfcheck import compute_logits
from prunetune.export.source import ExportSource
from prunetune.model.loading import load_meta_model, load_model_and_tokenizer
from prunetune.model.provenance import PruningRun, has_per_layer_config
from prunetune.pipeline.prepare import prepare
from prunetune.pipeline.run import run
from prunetune.pruning.remaining_sites import plan_within
from prunetune.pruning.units import dense_plan
from prunetune.utils.console import SilentConsole
from support.again import ReaderHere, recipe
from support.data import subwords, write_lines
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
        align = 8 if site.kind in ("expert-channels", "hidden-channels") else 1
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
    again = opened(tmp_path / "first")
    left, second = find_sites(again, units), plan_within(both, first)
    assert {site.name: site.units for site in left} == second.units
    with masked(again, second, sites=left):
        expected = compute_logits(again, tokens())
    cut(again, second, sites=left)
    assert again.state_dict().keys() == once.state_dict().keys()
    assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in again.state_dict().items())
    write_checkpoint(again, subwords(), second, left, tmp_path / "second", layout="per-layer", card="")
    reopened = opened(tmp_path / "second")
    assert relative(compute_logits(reopened, tokens()), expected) <= 1e-5
    values = json.loads((tmp_path / "second" / "config.json").read_text())
    assert values["model_type"] == f"pruned_{family}"


class Second(NamedTuple):
    """A run that pruned the result of an earlier one, which was per-layer, uniform, or of another tool."""

    origin: str
    dense: Path
    first: Path
    run: Path


def opened(folder: Path) -> Any:
    return load_model_and_tokenizer(str(folder), **ON_CPU).model


def size(folder: Path) -> int:
    return sum(weight.numel() for weight in opened(folder).parameters())


def make_of_another_tool(folder: Path) -> dict[str, Any]:
    """Leave transformers' `per_layer_config` under the stock model type, and no code; returns the configuration."""
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    del values["auto_map"]
    values |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(values))
    for name in ("configuration_pruned.py", "modeling_pruned.py", "plan.json", "SHA256SUMS"):
        (folder / name).unlink()
    return values


def measure_here(spec: Any, options: Any, opener: Any) -> Any:
    """Replaces `measure_models.Worker`."""
    runner = opener(spec, options)
    runner.close = lambda: None  # there is no process to end
    return runner


@pytest.fixture(scope="module")
def checks_here() -> Iterator[None]:
    """Checks and measurements in this process, as fresh ones take seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selfcheck, "FreshReader", ReaderHere)
        patch.setattr(llamacpp, "reference_continuations", reference_here)
        patch.setattr(measure_models, "Worker", measure_here)
        yield


@pytest.fixture(scope="module", params=["per-layer", "uniform", "another tool"])
def second(request: pytest.FixtureRequest, checks_here: None, tmp_path_factory: pytest.TempPathFactory) -> Second:
    folder = write_model_and_rows(tmp_path_factory.mktemp("again"), 8)
    dense, first, layout = folder / "dense", folder / "first", request.param
    speaker(vocab_size=320).save_pretrained(dense)
    subwords().save_pretrained(dense)
    model = opened(dense)
    sites = find_sites(model)
    if layout == "uniform":  # one KV group less, and 64 channels
        plan = plan_of(model, sites[0].units - 1, 64)
    else:
        layout, plan = "per-layer", random_plan(model, keep=0.8)
    cut(model, plan)
    history = [PruningRun(str(dense), layout, 0.8, model.num_parameters(), 2)] * (request.param == layout)
    write_checkpoint(model, subwords(), plan, sites, first, layout=layout, card="", history=history)
    if request.param != layout:
        make_of_another_tool(first)
    run(recipe(folder, first, "second", layout=layout, budget={"keep": 0.75, "align": 8}))
    return Second(request.param, dense, first, folder / "second")


def test_second_result_is_smaller_and_its_card_tells_all_runs(second: Second) -> None:
    result = second.run / "model"
    assert size(second.dense) > size(second.first) > size(result)
    told = json.loads((result / "history.json").read_text())
    runs = [(str(second.dense), size(second.first)), (str(second.first), size(result))]
    if second.origin == "another tool":  # which says nothing of its own
        del runs[0]
    assert [(entry["model"], entry["params"]) for entry in told] == runs
    card = (result / "README.md").read_text()
    assert ("## History" in card) == (len(runs) > 1)
    assert f"| | {'before this run' if len(runs) > 1 else 'dense'} | this model |" in card
    assert ("trust_remote_code" in card) == (second.origin != "uniform")
    for entry in told if len(runs) > 1 else ():
        assert f"{100 * entry['kept']:.1f}% of the prunable parameters kept in 2 steps" in card


@pytest.mark.parametrize("to", ["per-layer", "uniform", "gguf", "onnx"])
def test_exports_of_the_second_result_agree_with_it(second: Second, to: str) -> None:
    """The export itself compares tokens of llama.cpp and logits of onnxruntime with the model, and fails if not."""
    result, is_uniform = second.run / "model", second.origin == "uniform"
    if to == "onnx" and second.origin == "another tool":
        return  # the same files as of origin per-layer, and tracing takes seconds
    if to == "per-layer" and is_uniform:
        with pytest.raises(ModelError, match="its layers are equal, so a stock class opens it: export --to uniform"):
            export_run(second.run, to=to)
        return
    options = ExportOptions(pad=to == "uniform" and not is_uniform)
    exported = export_run(second.run, to=to, options=options)
    assert all(check.ran for check in exported.checks), exported
    if to in ("uniform", "per-layer"):
        assert (
            relative(compute_logits(opened(exported.path), tokens()), compute_logits(opened(result), tokens())) <= 1e-5
        )
        assert has_per_layer_config(str(exported.path)) == (to == "per-layer")  # which a next card tells
        for name in ("README.md", "history.json"):
            told = [(folder / name).read_text() for folder in (exported.path, result)]
            assert told[0].partition("## History")[2] == told[1].partition("## History")[2]


def test_result_is_tuned_again_and_nothing_is_removed(second: Second, tmp_path: Path) -> None:
    layout = "uniform" if second.origin == "uniform" else "per-layer"
    again = recipe(second.first.parent, second.first, str(tmp_path / "tuned"), layout=layout, budget={"keep": 1.0})
    result = run(again) / "model"
    before, after = opened(second.first).state_dict(), opened(result).state_dict()
    assert {name: weight.shape for name, weight in before.items()} == {n: weight.shape for n, weight in after.items()}
    assert not all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert "100.0% of the attention and MLP parameters" in (result / "README.md").read_text()


def test_eval_check_and_bench_take_the_second_run(
    second: Second, tmp_path: Path, say: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is compared with is the model that its run began with."""
    monkeypatch.setenv("PRUNETUNE_CACHE", str(tmp_path / "cache"))
    write_lines(tmp_path / "texts.jsonl", *({"text": f"text {n} of a few words"} for n in range(4)))
    (tmp_path / "suite.yaml").write_text("tasks: {texts: {data: texts.jsonl, scorer: perplexity}}\n")
    asked = ("--suite", tmp_path / "suite.yaml", "--device", "cpu", "--dtype", "float32")
    scores = []
    for model in (second.run, second.run / "model", second.first):
        assert say("eval", model, *asked, "--out", tmp_path / "scores.json")[0] == 0
        scores.append(json.loads((tmp_path / "scores.json").read_text())["tasks"]["texts"]["scores"]["perplexity"])
    assert scores[0] == scores[1] != scores[2]
    say("check", second.run, *asked, "--json", tmp_path / "check.json")
    compared = json.loads((tmp_path / "check.json").read_text())
    assert compared["scores"]["texts"]["perplexity"] == [scores[0]["value"], scores[2]["value"]]
    assert not compared["errors"]
    short = ("--prompt", 8, "--generate", 2, "--batch", 1, "--runs", 1, "--device", "cpu", "--dtype", "float32")
    assert say("bench", second.run, *short, "--json", tmp_path / "bench.json")[0] == 0
    measured = json.loads((tmp_path / "bench.json").read_text())["models"]
    assert [model["facts"]["parameters"] for model in measured] == [size(second.first), size(second.run / "model")]
    began = "dense" if second.origin == "another tool" else "before the run"
    assert [model["name"] for model in measured] == [f"{second.first} ({began})", str(second.run)]


def test_per_layer_model_of_another_tool_is_pruned(tmp_path: Path) -> None:
    """It has transformers' `per_layer_config` under the stock model type, and no code."""
    model = tiny(layers=4)
    sites, plan = find_sites(model), random_plan(model)
    write_checkpoint(cut(model, plan), subwords(), plan, sites, tmp_path / "other", layout="per-layer", card="")
    file, values = tmp_path / "other" / "config.json", make_of_another_tool(tmp_path / "other")
    other = opened(tmp_path / "other")
    assert relative(compute_logits(other, tokens()), compute_logits(model, tokens())) <= 1e-6
    left = find_sites(load_meta_model(str(tmp_path / "other")))
    again = random_plan(other, seed=4)
    expected = compute_logits(cut(other, again, sites=left), tokens())
    write_checkpoint(other, subwords(), again, left, tmp_path / "result", layout="per-layer", card="")
    reopened = opened(tmp_path / "result")
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
    again = opened(tmp_path / "first")
    left = find_sites(again, ("kv-groups",))
    assert {site.layer for site in left} == {0, 2}
    second = Plan({site.name: (0,) for site in left}, {site.name: site.units for site in left})
    with masked(again, second, sites=left):
        expected = compute_logits(again, tokens())
    write_checkpoint(cut(again, second), subwords(), second, left, tmp_path / "second", layout="per-layer", card="")
    reopened = opened(tmp_path / "second")
    assert relative(compute_logits(reopened, tokens()), expected) <= 1e-5
    assert ExportSource.open(tmp_path / "second").layer_widths[1].kv_heads == 0
