"""Laws of latency tables: exact for additive devices, and for one device, driver and workload only."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune.bench.cuda_graph import CudaGraphStep
from prunetune.bench.latency import measure, request_timing, tables
from prunetune.bench.latency.measure import LatencyTableBuilder, Timer
from prunetune.bench.latency.request_timing import time_requests, time_tracks
from prunetune.bench.latency.short_models import build_short_model, narrow_layers
from prunetune.bench.latency.tables import driver, table_header, table_path
from prunetune.bench.latency.verify import verify_budgets
from prunetune.bench.options import BenchOptions
from prunetune.config.recipe import WorkloadConfig, from_mapping
from prunetune.cost.budget_limits import BudgetLimits, make_budget_limits
from prunetune.cost.deployment import max_cost
from prunetune.cost.latency_table import PHASES, TRACKS, LatencyTable, LayerTiming, interpolate, latency_costs
from prunetune.cost.layer_shapes import model_shape
from prunetune.errors import ConfigError
from prunetune.pipeline.plan_constraints import apply_budgets
from prunetune.plan import Plan
from prunetune.pruning.cut import cut
from prunetune.pruning.sites import find_sites
from prunetune.search.plan_rules import PlanConstraints
from support.models import tiny, tiny_config

CPU = torch.device("cpu")
WORKLOAD = WorkloadConfig(prompt=6, generate=3, dtype="float32")
TILE = 500
SHORT = 5  # layers of a short model here


@pytest.fixture(autouse=True)
def _short_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunetune.bench.latency.short_models.CPU_CACHE", 1)


def tiles(models: Sequence[Any], workload: WorkloadConfig, runs: int) -> list[dict[str, float]]:
    """Seconds of a made-up device that computes in tiles: they depend on shapes and differ by phase."""
    timings = []
    for model in models:
        seconds = 0.5
        for name, weight in model.named_parameters():
            if ".layers." in name and weight.dim() == 2:
                seconds += -(-weight.numel() // TILE) * (2 if "self_attn" in name else 1)
        timings.append({"prefill": seconds, "decode": 1 + seconds / 7})
    return timings


def tracks(models: Sequence[Any], workload: WorkloadConfig, runs: int) -> list[dict[str, float]]:
    """Seconds of the same device by track: the prefill takes longer on the device, decoding on the host."""
    timings = tiles(models, workload, runs)
    return [
        {
            "prefill.device": seconds["prefill"],
            "prefill.host": len(model.model.layers),
            "decode.device": 0.01,
            "decode.host": seconds["decode"],
        }
        for model, seconds in zip(models, timings, strict=True)
    ]


def builder(config: Any, **changes: Any) -> LatencyTableBuilder:
    return LatencyTableBuilder(config, WORKLOAD, CPU, 8, track_timer=tracks, request_timer=tiles, **changes)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2"])
def test_table_of_an_additive_device_is_exact(family: str) -> None:
    config = tiny_config(family, layers=4, vocab_size=16)
    table = builder(config, includes_zero_width=True).measure({})
    model = build_short_model(config, range(4), WORKLOAD, CPU)
    sites = find_sites(model, ("kv-groups", "mlp-channels", "mlp-blocks", "layers"))
    anatomy = model_shape(model, sites)
    rng = torch.Generator().manual_seed(0)
    for case in range(4):
        widths: dict[str, int] = {}
        for site in sites:
            drawn = int(torch.randint(site.units + 1, (), generator=rng)) if case else site.units
            width = {"mlp": -(-drawn // 8) * 8, "attention": drawn}.get(
                site.kind, int(bool(drawn or site.min_units_per_group))
            )
            widths[site.name] = max(width, site.min_units_per_group) if not site.parent or widths[site.parent] else 0
        plan = Plan(
            {name: tuple(range(width)) for name, width in widths.items()}, {site.name: site.units for site in sites}
        )
        small = cut(copy.deepcopy(model), plan, sites=sites)
        seconds = tiles([small], WORKLOAD, 1)[0]
        for phase in PHASES:
            cost = max_cost(latency_costs(anatomy, WORKLOAD, table, phase), plan.widths())
            assert cost == pytest.approx(seconds[phase])
        whole = seconds["prefill"] + (WORKLOAD.generate - 1) * seconds["decode"]
        assert max_cost(latency_costs(anatomy, WORKLOAD, table, "mix"), plan.widths()) == pytest.approx(whole)


def test_table_survives_json() -> None:
    table = builder(tiny_config("llama", layers=2)).measure({"device": "d"})
    assert LatencyTable.from_json(table.to_json(), "here") == table


def test_interpolation_is_linear_between_widths() -> None:
    curve = ((0, -4.0), (2, -2.0), (6, 0.0))
    assert [interpolate(curve, units) for units in (0, 1, 2, 4, 6, 9, None)] == [-4, -3, -2, -1, 0, 0, 0]
    assert interpolate((), 3) == 0
    assert interpolate(((4, -1.0), (8, 0.0)), 2) == -1  # nothing narrower was measured


def test_narrow_layers_keeps_the_first_layer() -> None:
    model = tiny("llama", layers=3)
    for kind, units in (("attention", 0), ("attention", 1), ("mlp", 8), ("mlp", 0)):
        small = narrow_layers(model, kind, units, remove_empty_blocks=True)
        time_requests([small, model], WORKLOAD, 1)  # and it runs
        widths = [getattr(layer.mlp.down_proj, "in_features", 0) for layer in small.model.layers]
        assert widths == ([96, units, units] if kind == "mlp" else [96] * 3)


def test_request_times_are_positive_for_each_phase() -> None:
    timings = time_requests([tiny("llama")], WORKLOAD, 1)
    assert set(timings[0]) == set(PHASES)
    assert all(seconds > 0 for seconds in timings[0].values())


class SlowDevice:
    """A device with a clock of its own, on which a run of a short model takes `seconds`; records calls."""

    def __init__(self, seconds: float, timer: Timer = tracks) -> None:
        self.seconds, self.timer, self.now = seconds, timer, 0.0
        self.runs_timed: list[int] = []

    def clock(self) -> float:
        return self.now

    def tracks(self, models: Sequence[Any], workload: WorkloadConfig, runs: int) -> list[dict[str, float]]:
        layers = sum(len(model.model.layers) for model in models)
        self.now += self.seconds * layers / SHORT * (runs + 1)
        self.runs_timed.append(runs)
        return self.timer(models, workload, runs)


def test_slow_requests_are_timed_fewer_times_and_then_at_fewer_widths(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "prunetune")
    config = tiny_config("llama", layers=2, intermediate_size=512)
    counts = {}
    for seconds in (0.01, 0.4, 0.6, 10.0):
        device = SlowDevice(seconds)
        changed = dataclasses.replace(builder(config), track_timer=device.tracks, clock=device.clock)
        table = changed.measure({})
        (timed, *_) = table.layers["prefill.device"].values()
        counts[seconds] = (device.runs_timed[-1], len(timed.mlp), len(timed.attention))
        line = next(line for line in reversed(caplog.messages) if "about" in line)
        announced = float(line.rpartition("about ")[2].removesuffix(" s"))
        assert announced == pytest.approx(max(1, device.now - 4 * seconds), abs=1)  # less what it took to find out
        assert announced <= measure.LONGEST or counts[seconds][0] == 1
    assert counts == {0.01: (5, 33, 3), 0.4: (5, 33, 3), 0.6: (3, 33, 3), 10.0: (1, 9, 3)}  # with the dense width


def test_fewer_widths_give_the_same_table_of_a_linear_device() -> None:
    """Times that are linear in the width are exact from few widths."""
    config = tiny_config("llama", layers=2, intermediate_size=512)

    def even(models: Sequence[Any], workload: WorkloadConfig, runs: int) -> list[dict[str, float]]:
        counts = [sum(weight.numel() for weight in model.parameters()) for model in models]
        return [dict.fromkeys(TRACKS, float(count)) for count in counts]

    curves = []
    for device in (SlowDevice(0.01, even), SlowDevice(10.0, even)):
        table = dataclasses.replace(builder(config), track_timer=device.tracks, clock=device.clock).measure({})
        curves.append(table.layers["prefill.host"][0].mlp)
    many, few = curves
    assert len(few) < len(many)
    assert [interpolate(few, units) for units, _ in many] == pytest.approx([value for _, value in many])


def test_sampled_steps_have_the_mean_context() -> None:
    calls: list[tuple[int, int]] = []
    model = tiny("llama")

    def record_call(_: Any, args: Any, kwargs: Any) -> None:
        calls.append((args[0].shape[1], kwargs["past_key_values"].get_seq_length()))

    model.register_forward_pre_hook(record_call, with_kwargs=True)
    for generate in (60, 3, 2):
        workload = dataclasses.replace(WORKLOAD, generate=generate)
        contexts = []
        for timer in (time_tracks, time_requests):
            calls.clear()
            timer([model], workload, 1)
            steps = [context for width, context in calls if width == 1]
            contexts.append(sum(steps) / len(steps))
        sampled, whole = contexts
        assert sampled == pytest.approx(whole, abs=0.5)


def test_slow_whole_requests_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []
    model = tiny("llama")
    model.register_forward_pre_hook(lambda *_: passes.append("pass"))
    for patience, runs in ((1e9, 5), (0.0, 1)):
        passes.clear()
        monkeypatch.setattr(request_timing, "PATIENCE", patience)
        time_requests([model], WORKLOAD, 5)
        assert len(passes) == (runs + 1) * WORKLOAD.generate


@pytest.mark.parametrize("max_layers", [12, 8, 5])
def test_dense_model_that_does_not_fit_is_halved(max_layers: int) -> None:
    def limited_timer(models: Sequence[Any], workload: WorkloadConfig, runs: int) -> list[dict[str, float]]:
        if len(models[0].model.layers) > max_layers:
            raise torch.OutOfMemoryError
        return tiles(models, workload, runs)

    small = dataclasses.replace(builder(tiny_config("llama", layers=24)), request_timer=limited_timer, points=2)
    assert small.measure({}).outside_layers["prefill.device"] == pytest.approx(0.5)


# -- header and cache -------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRUNETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        tables, "LatencyTableBuilder", functools.partial(LatencyTableBuilder, track_timer=tracks, request_timer=tiles)
    )
    return tmp_path / "cache"


def test_table_is_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, sites = tiny_config("llama"), find_sites(tiny("llama"))
    table = tables.get_latency_table(config, sites, WORKLOAD, CPU, 8)
    monkeypatch.setattr(tables, "measure_table", None)
    assert tables.get_latency_table(config, sites, WORKLOAD, CPU, 8) == table
    (file,) = (cache / "latency").iterdir()
    assert tables.get_latency_table(config, sites, WORKLOAD, CPU, 8, str(file)) == table
    with pytest.raises(TypeError):  # another workload has a table of its own
        tables.get_latency_table(config, sites, dataclasses.replace(WORKLOAD, batch=2), CPU, 8)


def test_broken_file_in_the_cache_is_measured_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, sites = tiny_config("llama"), find_sites(tiny("llama"))
    header = tables.checked_header(config, sites, WORKLOAD, CPU, 8)
    table_path(header).parent.mkdir(parents=True)
    table_path(header).write_text("{", encoding="utf-8")
    assert tables.get_latency_table(config, sites, WORKLOAD, CPU, 8).header == header
    assert "measured again" in caplog.text


@pytest.mark.parametrize("wrong", [-1e-3, float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("where", ["rest", "dense"])
def test_table_with_impossible_times_is_refused_and_never_taken_from_the_cache(
    where: str, wrong: float, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Zero seconds are possible for a part, and not for a phase."""
    config, sites = tiny_config("llama"), find_sites(tiny("llama"))
    sound = tables.get_latency_table(config, sites, WORKLOAD, CPU, 8)
    data = json.loads(sound.to_json())
    for track in TRACKS if wrong == 0 else TRACKS[-1:]:
        if where == "rest" or wrong == 0:
            data["rest"][track] = wrong
        if where == "dense" or wrong == 0:
            data["layers"][track] = {
                index: {**timing, "dense": wrong} for index, timing in data["layers"][track].items()
            }
    (file,) = (cache / "latency").iterdir()
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"it says (decode\.device|prefill) .*which cannot be.*budget\.table"
    ) as refused:
        tables.get_latency_table(config, sites, WORKLOAD, CPU, 8, str(file))
    assert "\n" not in str(refused.value)
    assert tables.get_latency_table(config, sites, WORKLOAD, CPU, 8) == sound
    assert "measured again" in caplog.text
    assert LatencyTable.load(file, sound.header) == sound  # the wrong one is replaced


def test_impossible_measurement_is_repeated_then_refused_and_not_cached(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other processes can make a deep model seem faster than a shallow one."""
    config, sites = tiny_config("llama"), find_sites(tiny("llama"))
    busy = [True, True, True]

    def noisy_tracks(models: Sequence[Any], workload: WorkloadConfig, runs: int) -> list[dict[str, float]]:
        timings = tracks(models, workload, runs)
        if len(models) == 2 and len(models[1].model.layers) > len(models[0].model.layers) and busy and busy.pop():
            timings.reverse()
        return timings

    builder = functools.partial(LatencyTableBuilder, track_timer=noisy_tracks, request_timer=tiles)
    monkeypatch.setattr(tables, "LatencyTableBuilder", builder)
    with pytest.raises(
        ConfigError, match=r"the machine is busy \(measured .* -.* s\).*quiet it.*budget\.flops"
    ) as refused:
        tables.get_latency_table(config, sites, WORKLOAD, CPU, 8)
    assert "\n" not in str(refused.value)
    assert not (cache / "latency").exists()
    assert len(busy) == 1
    caplog.clear()
    table = tables.get_latency_table(config, sites, WORKLOAD, CPU, 8)  # at the second attempt
    assert not busy
    assert "which cannot be" in caplog.text
    assert not table.impossible_time


def test_time_outside_the_layers_is_never_negative() -> None:
    """Layers of a deep model take longer where its weights outgrow a cache."""

    def uncached(models: Sequence[Any], workload: WorkloadConfig, runs: int) -> list[dict[str, float]]:
        return [dict.fromkeys(TRACKS, float(len(model.model.layers) ** 2)) for model in models]

    builder = LatencyTableBuilder(
        tiny_config("llama", layers=2), WORKLOAD, CPU, 8, points=2, track_timer=uncached, request_timer=tiles
    )
    table = builder.measure({})
    assert set(table.outside_layers.values()) == {0.0}
    assert not table.impossible_time


def test_table_is_measured_if_the_cache_cannot_be_written(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, sites = tiny_config("llama"), find_sites(tiny("llama"))
    cache.write_text("no folder", encoding="utf-8")
    table = tables.get_latency_table(config, sites, WORKLOAD, CPU, 8)
    assert table.header == tables.checked_header(config, sites, WORKLOAD, CPU, 8)
    assert "set PRUNETUNE_CACHE" in caplog.text


@pytest.mark.parametrize("name", ["device", "driver", "torch", "runtime", "prompt", "batch", "geometry", "blocks"])
def test_table_with_another_header_is_refused(cache: Path, tmp_path: Path, name: str) -> None:
    config, sites = tiny_config("llama"), find_sites(tiny("llama"))
    header = tables.checked_header(config, sites, WORKLOAD, CPU, 8)
    other = LatencyTable({**header, name: "another"}, dict.fromkeys(TRACKS, 1.0), {track: {} for track in TRACKS})
    file = tmp_path / "table.json"
    file.write_text(other.to_json(), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"budget\.table .*{name} 'another', and here") as refused:
        tables.get_latency_table(config, sites, WORKLOAD, CPU, 8, str(file))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"format": "x"}', '{"format": "prunetune-latency-1", "header": {}, "rest": {}}']
)
def test_malformed_table_is_refused(cache: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "table.json"
    file.write_text(text, encoding="utf-8")
    config, sites = tiny_config("llama"), find_sites(tiny("llama"))
    with pytest.raises(ConfigError, match=r"not a latency table"):
        tables.get_latency_table(config, sites, WORKLOAD, CPU, 8, str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        tables.get_latency_table(config, sites, WORKLOAD, CPU, 8, str(tmp_path / "none.json"))


def test_table_with_unordered_widths_is_refused() -> None:
    timed = LayerTiming(1.0, ((2, 0.0), (1, 0.0)), ())
    text = LatencyTable({}, dict.fromkeys(TRACKS, 0.0), {track: {0: timed} for track in TRACKS}).to_json()
    with pytest.raises(ConfigError, match="ascend"):
        LatencyTable.from_json(text, "here")


def test_untimed_workloads_and_units_are_refused() -> None:
    config = tiny_config("llama")
    for changes, says in (({"weights": "int8"}, "plain weights"), ({"runtime": "recorded"}, "CUDA device")):
        with pytest.raises(ConfigError, match=says):
            table_header(config, dataclasses.replace(WORKLOAD, **changes), CPU, 8)
    sites = find_sites(tiny("llama"), ("query-heads", "mlp-channels"))
    with pytest.raises(ConfigError, match="query-heads"):
        tables.checked_header(config, sites, WORKLOAD, CPU, 8)
    assert driver(CPU) == ""


def test_header_ignores_names_and_types() -> None:
    config, other = tiny_config("llama"), tiny_config("llama")
    other.architectures, other.dtype = ["X"], torch.float16
    assert table_header(config, WORKLOAD, CPU, 8) == table_header(other, WORKLOAD, CPU, 8)
    assert table_header(config, WORKLOAD, CPU, 8) != table_header(tiny_config("llama", layers=5), WORKLOAD, CPU, 8)


def test_recording_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="CUDA"):
        CudaGraphStep(tiny("llama"))
    with pytest.raises(ConfigError, match="name one"):
        BenchOptions(compile=True, record=True)


# -- in a run --------------------------------------------------------------------------------------------------------


def test_run_is_planned_by_its_table_and_verified(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", layers=4)
    sites = find_sites(model)
    budget = {"latency": 0.7, "throughput": "1.2x", "align": 8}
    workload = {"prompt": 6, "generate": 3, "dtype": "float32"}
    config = from_mapping({"budget": budget, "workload": workload})
    config, shape = apply_budgets(config, sites, PlanConstraints("per-layer", 8), model, CPU)
    limits = shape.limits
    assert limits is not None
    assert config.budget.keep == limits.feasible_keep < 1
    assert [cap.kind for cap in limits.limits] == ["latency", "throughput"]
    kept = {site.name: tuple(range(max(1, site.units // 2))) for site in sites}
    plan = Plan(kept, {site.name: site.units for site in sites})
    small = cut(copy.deepcopy(model), plan, sites=sites)
    monkeypatch.setattr("prunetune.bench.latency.verify.time_requests", tiles)
    rows = verify_budgets(limits, plan, config.workload, lambda: small, 1)
    assert [row["budget"] for row in rows] == ["latency", "throughput"]
    for row in rows:
        assert abs(row["error"]) < 1e-9
        assert row["measured"] == pytest.approx(row["counted"])
    json.dumps(rows)


def test_inaccurate_table_is_a_warning(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    anatomy = model_shape(model, find_sites(model))
    table = builder(model.config).measure({})
    amounts = from_mapping({"budget": {"latency": "0.7"}}).budget.amounts()
    limits = BudgetLimits(make_budget_limits(amounts, anatomy, WORKLOAD, table))
    slow = {phase: 1.1 * seconds for phase, seconds in tiles([model], WORKLOAD, 1)[0].items()}
    monkeypatch.setattr("prunetune.bench.latency.verify.time_requests", lambda *_: [slow])
    plan = Plan({name: tuple(range(units)) for name, units in anatomy.dense_counts().items()}, anatomy.dense_counts())
    assert verify_budgets(limits, plan, WORKLOAD, lambda: model)[0]["error"] == pytest.approx(0.1)
    assert "+10.0% of what the table says" in caplog.text


def test_noisy_machine_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    clock = iter(range(1, 10**6))

    def drifting(models: Sequence[Any], workload: WorkloadConfig, runs: int) -> list[dict[str, float]]:
        return [{track: float(next(clock)) for track in TRACKS} for _ in models]

    dataclasses.replace(builder(tiny_config("llama", layers=2)), track_timer=drifting).measure({})
    assert "quiet the machine" in caplog.text
    assert measure.NOISY < 0.5
