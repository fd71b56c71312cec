"""Laws of latency tables: seconds of layers by the widths that they keep, and tables that are read again or refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.deployment import total_cost
from prunetune.cost.latency_table import (
    TRACKS,
    LatencyCost,
    LatencyTable,
    LayerTiming,
    interpolate,
    latency_costs,
    representative_layers,
)
from prunetune.cost.layer_shapes import ModelShape, model_shape
from prunetune.errors import ConfigError
from prunetune.pruning.sites import find_sites
from support.models import tiny

CURVE = ((8, -4.0), (16, -3.0), (32, 0.0))
TIMING = LayerTiming(10.0, ((0, -3.0), (2, 0.0)), ((0, -5.0), (96, 0.0)))


def shape_of(units: Sequence[str], family: str = "llama") -> ModelShape:
    model = tiny(family)
    return model_shape(model, find_sites(model, units))


def table_of(shape: ModelShape, **seconds: float) -> LatencyTable:
    """One second outside the layers on the track `prefill.device`; the others take what `seconds` says, or nothing."""
    outside_layers = {track: seconds.get(track.replace(".", "_"), float(track == "prefill.device")) for track in TRACKS}
    layers = dict.fromkeys(representative_layers(shape).values(), TIMING)
    none = dict.fromkeys(layers, LayerTiming(0.0, (), ()))
    return LatencyTable({"device": "x"}, outside_layers, {t: none if "host" in t else layers for t in TRACKS})


def seconds_of(shape: ModelShape, **removed: int) -> float:
    """Seconds of the first layer's prefill with these numbers of units of a kind of its sites."""
    kept = {site.name: removed.get(site.kind.name.lower(), site.units) for site in shape.layers[0].sites}
    cost = LatencyCost(shape, table_of(shape), (("prefill.device", 1.0),))
    return cost.layer_cost(0, shape.dense_counts() | kept)


def test_layer_takes_the_seconds_of_its_widths() -> None:
    shape = shape_of(["kv-groups", "mlp-channels"])
    assert seconds_of(shape) == pytest.approx(10.0)
    assert seconds_of(shape, kv_group=1) == pytest.approx(8.5)
    assert seconds_of(shape, mlp_channel=48) == pytest.approx(7.5)
    assert seconds_of(shape, kv_group=0, mlp_channel=0) == pytest.approx(2.0)


def test_closed_block_takes_no_seconds() -> None:
    """Whether or not its channels can be pruned as well."""
    assert seconds_of(shape_of(["mlp-blocks"]), mlp_block=0) == pytest.approx(5.0)
    assert seconds_of(shape_of(["mlp-blocks"])) == pytest.approx(10.0)
    assert seconds_of(shape_of(["mlp-blocks", "mlp-channels"]), mlp_block=0) == pytest.approx(5.0)
    assert seconds_of(shape_of(["attention-blocks"]), attention_block=0) == pytest.approx(7.0)
    assert seconds_of(shape_of(["layers", "kv-groups"]), layer=0) == 0.0


def test_noise_makes_no_layer_take_less_than_nothing() -> None:
    shape = shape_of(["kv-groups", "mlp-channels"])
    noisy = replace(TIMING, dense=4.0)
    table = replace(table_of(shape), layers={track: {0: noisy} for track in TRACKS})
    counts = shape.dense_counts() | dict.fromkeys((site.name for site in shape.layers[0].sites), 0)
    assert LatencyCost(shape, table, (("prefill.device", 1.0),)).layer_cost(0, counts) == 0.0


def test_model_takes_its_layers_and_what_is_outside_as_often_as_a_track_counts() -> None:
    shape = shape_of(["kv-groups", "mlp-channels"])
    cost = LatencyCost(shape, table_of(shape), (("prefill.device", 1.0), ("decode.device", 3.0)))
    assert total_cost(cost, shape.dense_counts()) == pytest.approx(1.0 + 3 * 10.0 + 3 * (0.0 + 3 * 10.0))


def test_widths_between_two_measured_ones_are_on_a_straight_line() -> None:
    expected = {0: -4.0, 8: -4.0, 10: -3.75, 15: -3.125, 16: -3.0, 24: -1.5, 32: 0.0, 40: 0.0, None: 0.0}
    assert {units: interpolate(CURVE, units) for units in expected} == expected
    assert interpolate((), 3) == 0.0
    assert interpolate(((8, 0.0), (16, 10.0)), 10) == 2.5  # ten seconds are not ten units


def test_layers_share_times_if_their_windows_and_widths_are_equal() -> None:
    assert representative_layers(shape_of(["kv-groups"])) == {0: 0, 1: 0, 2: 0}
    assert representative_layers(shape_of(["kv-groups", "layers"])) == {0: 0, 1: 0, 2: 0}
    windows = representative_layers(shape_of(["kv-groups"], "gemma3_text"))
    assert windows == {0: 0, 1: 0, 2: 2}  # the last one sees everything


def tracks_of(phase: str, table: LatencyTable, shape: ModelShape) -> list[dict[str, float]]:
    return [dict(cost.tracks) for cost in latency_costs(shape, WorkloadConfig(generate=5), table, phase)]


def test_costs_are_every_combination_of_measured_tracks() -> None:
    shape = shape_of(["kv-groups"])
    only_device = table_of(shape)
    assert tracks_of("mix", only_device, shape) == [{"prefill.device": 1.0, "decode.device": 4.0}]
    assert tracks_of("decode", only_device, shape) == [{"decode.device": 1.0}]
    with_host = table_of(shape, decode_host=2.0)
    assert tracks_of("prefill", with_host, shape) == [{"prefill.device": 1.0}]
    assert tracks_of("decode", with_host, shape) == [{"decode.host": 1.0}, {"decode.device": 1.0}]
    both = replace(only_device, layers={track: {0: TIMING} for track in TRACKS})
    assert len(tracks_of("mix", both, shape)) == 4


def test_host_track_is_measured_if_any_layer_took_time_there() -> None:
    shape = shape_of(["kv-groups"], "gemma3_text")  # two kinds of layers
    table = table_of(shape)
    timings = dict(table.layers["decode.host"])
    timings[max(timings)] = TIMING
    table = replace(table, layers={**table.layers, "decode.host": timings})
    assert len(timings) == 2
    assert tracks_of("decode", table, shape) == [{"decode.host": 1.0}, {"decode.device": 1.0}]


def test_table_without_a_layer_of_the_model_is_refused() -> None:
    shape = shape_of(["kv-groups"])
    with pytest.raises(ConfigError, match=r"lacks a layer of this model; leave budget.table out"):
        tracks_of("mix", replace(table_of(shape), layers={track: {} for track in TRACKS}), shape)


@pytest.mark.parametrize("lacking", ["decode.host", "decode.device"])
def test_table_that_lacks_a_layer_on_one_track_is_refused(lacking: str) -> None:
    shape = shape_of(["kv-groups"])
    table = table_of(shape, decode_host=2.0)
    with pytest.raises(ConfigError, match="lacks a layer of this model"):
        tracks_of("decode", replace(table, layers={**table.layers, lacking: {}}), shape)


def test_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = table_of(shape_of(["kv-groups"]))
    (tmp_path / "table.json").write_text(table.to_json(), encoding="utf-8")
    assert LatencyTable.load(tmp_path / "table.json", {"device": "x"}) == table
    with pytest.raises(ConfigError, match=r"measured with device 'x', and here it is 'y'"):
        LatencyTable.load(tmp_path / "table.json", {"device": "y"})
    with pytest.raises(ConfigError, match="cannot be read"):
        LatencyTable.load(tmp_path / "none.json", {})


@pytest.mark.parametrize("change", [{"format": "x"}, {"rest": {}}, {"layers": []}, {"header": 5}])
def test_file_that_is_no_table_is_refused(change: dict[str, object]) -> None:
    values = json.loads(table_of(shape_of(["kv-groups"])).to_json())
    with pytest.raises(ConfigError, match=r"x\.json: not a latency table"):
        LatencyTable.from_json(json.dumps(values | change), "x.json")


def test_table_whose_widths_do_not_ascend_is_refused() -> None:
    values = json.loads(table_of(shape_of(["kv-groups"])).to_json())
    values["layers"]["decode.device"]["0"]["mlp"].reverse()
    with pytest.raises(ConfigError, match="widths do not ascend"):
        LatencyTable.from_json(json.dumps(values), "x.json")


def test_scaled_table_takes_each_track_by_its_factor() -> None:
    shape = shape_of(["kv-groups", "mlp-channels"])
    scaled = table_of(shape).scaled({track: 2.0 if track == "prefill.device" else 3.0 for track in TRACKS})
    assert scaled.outside_layers["prefill.device"] == 2.0
    timing = scaled.layers["prefill.device"][0]
    assert timing == LayerTiming(20.0, ((0, -6.0), (2, 0.0)), ((0, -10.0), (96, 0.0)))
    assert scaled.layers["decode.device"][0].dense == 30.0
