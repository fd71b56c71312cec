"""Required gains of a run: met margins are recorded, and a missed one names its reason."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from prunetune.bench.interleaved import run_interleaved
from prunetune.bench.models import context_length
from prunetune.bench.options import BenchOptions
from prunetune.bench.result import BenchedModel, summarise_bench
from prunetune.bench.runner_protocol import BenchSample, OutOfMemory, WorkEstimate
from prunetune.bench.tile_alignment import misaligned_widths
from prunetune.config.recipe import RequireConfig, from_mapping
from prunetune.manifest import GainFacts
from prunetune.pipeline import requirements
from prunetune.pipeline.prepare import RunContext
from prunetune.pipeline.requirements import gain_bench_options, judge_gain, measure_gain
from prunetune.plan import Plan
from prunetune.pruning.units import LinearSlice, Site, SiteWeights, UnitKind, dense_plan
from prunetune.runs.folder import RunFolder
from support.bench import ScriptedRunner, facts
from support.suites import model_folder


def site(layer: int, kind: Any, units: int, columns: int = 1) -> Site:
    name = f"model.layers.{layer}.{'mlp' if kind == 'mlp' else 'self_attn'}"
    weights = SiteWeights(consumer=LinearSlice(name, (columns,)))
    return Site(name=name, layer=layer, kind=UnitKind(kind), units=units, unit_params=10, weights=weights)


SITES = (site(0, "attention", 8, 64), site(0, "mlp", 1000), site(7, "attention", 8, 64), site(7, "mlp", 1000))


def plan_of(*widths: int) -> Plan:
    names = [site.name for site in SITES]
    kept = {name: tuple(range(width)) for name, width in zip(names, widths, strict=True)}
    return Plan(kept, {site.name: site.units for site in SITES})


def models(
    pruned: BenchSample | None = None, parameters: int = 700, **pruned_as: Any
) -> tuple[BenchedModel, BenchedModel]:
    runners = (
        ScriptedRunner("dense", work=WorkEstimate(200.0, 90.0)),
        ScriptedRunner(
            "pruned",
            [pruned or BenchSample(0.5, 0.25, 0.05)],
            model_facts=facts(parameters),
            work=WorkEstimate(100.0, 60.0),
            **pruned_as,
        ),
    )
    options = BenchOptions(batch="1", generate=4, runs=3)
    measured = run_interleaved(runners, options.batches, options.runs)
    known = [runner.facts() for runner in runners]
    result = summarise_bench(["dense", "pruned"], known, measured, options=options, versions={})
    return result.models[0], result.models[1]


def verdict(plan: Plan, pair: tuple[BenchedModel, BenchedModel] | None = None, **gain: Any) -> dict[str, Any]:
    return judge_gain(*(pair or models()), RequireConfig(**gain), plan, SITES).to_dict()


def test_met_margins_are_recorded() -> None:
    facts = verdict(plan_of(4, 512, 2, 256), smaller=0.3, faster=2.0)
    assert [limit["held"] for limit in facts["limits"]] == [True, True]
    assert facts["smaller"] == pytest.approx(0.3)
    assert facts["speed"]["throughput"]["median"] == pytest.approx(2.0)
    assert not any("says" in limit for limit in facts["limits"])


@pytest.mark.parametrize("speed", ["throughput", "prefill", "decode"])
def test_margin_is_on_the_required_kind_of_speed(speed: str) -> None:
    pair = models(BenchSample(0.8, 0.4, 0.1))
    ratio = {"throughput": 1.25, "prefill": 1.25, "decode": 1.0}[speed]
    assert verdict(plan_of(4, 512, 2, 256), pair, faster=1.1, speed=speed)["limits"][0]["held"] == (ratio > 1.1)


def test_no_requirement_gives_no_limit() -> None:
    assert verdict(plan_of(4, 512, 2, 256))["limits"] == []
    assert not RequireConfig().has_requirements
    assert RequireConfig(smaller=0.1).has_requirements
    assert RequireConfig(faster=0.5).has_requirements


def test_misaligned_widths_are_named_worst_first() -> None:
    plan = plan_of(3, 613, 1, 624)
    words = [str(width) for width in misaligned_widths(plan, SITES)]
    assert words == [
        "MLP width of layer 0 is 613, no multiple of 64 or 128",
        "MLP width of layer 7 is 624, no multiple of 64 or 128",
        "attention width of layer 7 is 64, no multiple of 128",
        "attention width of layer 0 is 192, no multiple of 128",
    ]
    says = verdict(plan, faster=3.0)["limits"][0]["says"]
    assert says.startswith(
        "require.faster >= 3: throughput is 2.00 times the dense model's; MLP width of layer 0 is 613"
    )
    assert "set budget.align to 128; by FLOPs the prefill can gain" in says
    assert " more: " not in says


def test_misaligned_widths_beyond_the_first_ones_are_counted() -> None:
    sites = tuple(site(layer, "mlp", 1000) for layer in range(7))
    plan = Plan({site.name: tuple(range(613)) for site in sites}, {site.name: site.units for site in sites})
    says = judge_gain(*models(), RequireConfig(faster=3.0), plan, sites).limits[0].explanation
    assert says is not None
    assert (says.count("is 613"), says.count(" and 2 more: set budget.align")) == (5, 1)


@pytest.mark.parametrize(("limit", "shown"), [(1.2, "1.01"), (1.01, "1.0096"), (1.00961, "1.0096")])
def test_missed_margin_is_shown_with_enough_digits(limit: float, shown: str) -> None:
    pair = models(BenchSample(1 / 1.0096, 0.25, 0.05))
    assert f"throughput is {shown} times" in verdict(plan_of(4, 512, 2, 256), pair, faster=limit)["limits"][0]["says"]


def test_dense_removed_and_aligned_widths_are_not_blamed() -> None:
    assert misaligned_widths(plan_of(8, 1000, 0, 128), SITES) == []  # 1000 is the dense model's own width
    assert misaligned_widths(dense_plan(SITES), SITES) == []


def test_aligned_widths_are_not_blamed_for_a_missed_margin() -> None:
    says = verdict(plan_of(4, 512, 2, 256), faster=3.0)["limits"][0]["says"]
    assert "all widths are multiples of 128, so none is to blame" in says
    assert "by FLOPs the prefill can gain x2.00 at most, by bytes a decode step can gain x1.50 at most" in says


def test_missed_size_names_the_layers_that_kept_most() -> None:
    says = verdict(plan_of(8, 900, 2, 256), smaller=0.5)["limits"][0]["says"]
    assert "30.0% of all parameters are pruned" in says
    assert "layer 0 (90%), layer 7 (26%)" in says
    assert "lower budget.keep" in says


def test_unmeasured_speed_misses_the_margin() -> None:
    limit = verdict(plan_of(4, 512, 2, 256), models(max_batch=0), faster=1.0)["limits"][0]
    assert not limit["held"]
    assert "could not be measured (batch 1 of pruned: out of memory)" in limit["says"]


def test_short_context_shortens_the_prompt(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = model_folder(tmp_path_factory.mktemp("models") / "dense")
    context = context_length(str(folder), trust_remote_code=False)
    long = gain_bench_options(from_mapping({"model": str(folder), "require": {"prompt": 10**6, "generate": 8}}))
    assert (long.prompt + long.generate, long.generate) == (context, 8)
    longer = gain_bench_options(from_mapping({"model": str(folder), "require": {"prompt": 10**6, "generate": 10**6}}))
    assert longer.prompt + longer.generate == context
    short = gain_bench_options(from_mapping({"model": str(folder), "require": {"prompt": 3, "generate": 2}}))
    assert (short.prompt, short.generate) == (3, 2)


@pytest.mark.parametrize(("context", "prompt", "generate"), [(9, 5, 4), (3, 1, 2), (2, 1, 2), (0, 99, 77)])
def test_prompt_and_answer_share_a_short_context_in_whole_tokens(
    context: int, prompt: int, generate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 0 the model says nothing."""
    monkeypatch.setattr(requirements, "context_length", lambda *_, **__: context)
    options = gain_bench_options(from_mapping({"model": "x", "require": {"prompt": 99, "generate": 77, "faster": 1}}))
    assert (options.prompt, options.generate) == (prompt, generate)


def test_missed_size_says_how_much_cannot_be_pruned_and_counts_layers_without_parameters() -> None:
    none = replace(site(3, "mlp", 10), unit_params=0)
    plan = plan_of(8, 900, 2, 256)
    plan = Plan({**plan.kept, none.name: ()}, {**plan.units, none.name: 10})
    dense, pruned = models()
    dense = replace(dense, facts=facts(40_320))  # of which 20,160 are the sites'
    facts_of_gain = judge_gain(dense, pruned, RequireConfig(smaller=0.99), plan, (*SITES, none))
    says = facts_of_gain.limits[0].explanation
    assert says is not None
    assert "; 50% (embeddings, head, norms) cannot be" in says
    assert "layer 0 (90%), layer 7 (26%), layer 3 (0%)" in says


def test_each_size_is_timed_beside_its_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[list[str]] = []
    announced: list[tuple[str, int]] = []

    def measure(names: list[str], options: BenchOptions) -> Any:
        timed.append(names)
        return SimpleNamespace(models=models(), to_dict=lambda: {"names": names})

    gains: dict[str, GainFacts] = {}
    monkeypatch.setattr(requirements.gc, "collect", lambda: 0)  # seconds in a process that has run other tests
    monkeypatch.setattr(requirements, "measure_in_process", measure)
    monkeypatch.setattr(requirements, "gain_bench_options", lambda config: BenchOptions())
    monkeypatch.setattr(RunFolder, "update_manifest", lambda self, gain: gains.update({self.path.name: gain}))
    folders = [RunFolder(tmp_path / name) for name in ("large", "small")]
    for folder in folders:
        folder.path.mkdir()
        folder.plan_file.write_text(plan_of(4, 512, 2, 256).to_json())
    context = SimpleNamespace(
        console=SimpleNamespace(stage=lambda name, steps: announced.append((name, steps))),
        device=torch.device("cpu"),
        sites=SITES,
        config=from_mapping({"require": {"faster": 2}}),
    )
    measure_gain(folders[0], folders, cast("RunContext", context))
    assert timed == [[str(folder.path)] for folder in folders]
    assert announced == [(f"bench: dense and {name} in turns", 0) for name in ("large", "small")]  # of unknown length
    assert set(gains) == {"large", "small"}
    assert [limit.is_met for limit in gains["small"].limits] == [True]
    assert json.loads(folders[0].bench_file.read_text()) == [{"names": names} for names in timed]


def test_request_without_a_required_margin_is_short(tmp_path: Path) -> None:
    model = str(model_folder(tmp_path))
    for changes, expected in (
        ({}, (17, 5)),
        ({"require": {"generate": 4, "runs": 3}}, (4, 3)),
        ({"require": {"faster": 1.1}}, (64, 7)),
        ({"budget": {"keep": [0.8, 0.6]}}, (64, 7)),  # the page of several sizes compares their speeds
    ):
        options = gain_bench_options(from_mapping({"model": model, **changes}))
        assert (options.generate, options.runs) == expected


@pytest.mark.parametrize("is_required", [False, True])
def test_models_that_do_not_fit_together_fail_a_run_only_if_a_margin_is_required(
    is_required: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> Any:
        raise OutOfMemory("the weights of dense: out of memory")

    monkeypatch.setattr(requirements, "measure_in_process", refuse)
    monkeypatch.setattr(requirements, "gain_bench_options", lambda _: BenchOptions())
    folder = RunFolder(tmp_path)
    context = SimpleNamespace(
        console=SimpleNamespace(stage=lambda *_: None),
        device=torch.device("cpu"),
        config=from_mapping({"require": {"faster": 2 * is_required}}),
    )
    with pytest.raises(OutOfMemory) if is_required else nullcontext():
        measure_gain(folder, [folder], cast("RunContext", context))
        assert "was not measured: the weights of dense: out of memory" in caplog.text
    assert not folder.read_manifest().gain
