"""Results of `prunetune bench` on made-up samples: spread, ratios, interleaving and the table."""

from __future__ import annotations

import json

import pytest

from prunetune.bench.interleaved import SummaryStats, paired_ratios, run_interleaved, summary_stats
from prunetune.bench.options import BenchOptions
from prunetune.bench.result import BenchResult, summarise_bench
from prunetune.bench.runner_protocol import BenchSample, WorkEstimate
from prunetune.bench.table import render_bench
from prunetune.errors import ConfigError
from support.bench import ScriptedRunner, facts, slowed

DENSE = {"total": 4.0, "prefill": 2.0, "decode": 0.2}
PRUNED = {"total": 2.0, "prefill": 1.0, "decode": 0.16}
SLOWDOWNS = (1.0, 3.0, 1.5, 9.0, 1.1)


def benched(*runners: ScriptedRunner, options: BenchOptions | None = None) -> BenchResult:
    options = options or BenchOptions(batch="1,4", generate=10, runs=len(SLOWDOWNS))
    measured = run_interleaved(runners, options.batches, options.runs)
    model_facts = [runner.facts() for runner in runners]
    return summarise_bench(
        [runner.name for runner in runners], model_facts, measured, options=options, versions={"torch": "2"}
    )


# -- spread ----------------------------------------------------------------------------------------------------------


def test_summary_has_median_quartiles_and_range() -> None:
    assert summary_stats([5.0, 1.0, 2.0, 4.0, 3.0]) == SummaryStats(3.0, 2.0, 4.0, 1.0, 5.0, 5)
    assert summary_stats([7.0]) == SummaryStats(7.0, 7.0, 7.0, 7.0, 7.0, 1)
    assert summary_stats([1.0, 2.0]).median == 1.5


def test_one_slow_run_changes_the_maximum_and_not_the_median() -> None:
    calm, disturbed = summary_stats([1.0, 1.1, 1.2, 1.3, 1.4]), summary_stats([1.0, 1.1, 1.2, 1.3, 90.0])
    assert (calm.median, calm.high_quartile) == (disturbed.median, disturbed.high_quartile)
    assert disturbed.max == 90.0


def test_paired_ratios_are_of_the_same_round() -> None:
    assert paired_ratios([4.0, 12.0], [2.0, 6.0]) == [2.0, 2.0]
    with pytest.raises(ValueError, match="argument"):
        paired_ratios([1.0], [1.0, 2.0])


# -- interleaving ----------------------------------------------------------------------------------------------------


def test_runs_are_interleaved_and_every_other_round_is_reversed() -> None:
    calls: list[tuple[str, str, int]] = []
    measurements = run_interleaved([ScriptedRunner("a", calls=calls), ScriptedRunner("b", calls=calls)], [1, 8], 3)
    calls_at_8 = [(call, name) for call, name, batch in calls if batch == 8]
    assert calls_at_8[:2] == [("warm", "a"), ("warm", "b")]
    assert [name for _, name in calls_at_8[2:]] == ["a", "b", "b", "a", "a", "b"]
    assert [batch for _, _, batch in calls] == [1] * 8 + [8] * 8
    assert [[len(cell.samples) for cell in cells] for cells in measurements] == [[3, 3], [3, 3]]


def test_batch_that_does_not_fit_alone_has_no_samples() -> None:
    dense, pruned = run_interleaved([ScriptedRunner("dense", max_batch=4), ScriptedRunner("pruned")], [1, 8, 2], 2)
    assert [len(cell.samples) for cell in dense] == [2, 0, 2]
    assert [len(cell.samples) for cell in pruned] == [2, 2, 2]
    assert dense[1].failed == "batch 8 of dense: out of memory"


# -- results ---------------------------------------------------------------------------------------------------------


def test_slow_rounds_do_not_change_the_ratios() -> None:
    result = benched(
        ScriptedRunner("dense", slowed(DENSE, SLOWDOWNS)), ScriptedRunner("pruned", slowed(PRUNED, SLOWDOWNS))
    )
    dense, pruned = (model.cells[0] for model in result.models)
    assert pruned.figures["prefill"].max == 9 * pruned.figures["prefill"].min
    expected = {"prefill": 2.0, "decode": 1.25, "throughput": 2.0}
    for name, ratio in expected.items():
        assert pruned.ratios[name].min == pytest.approx(ratio)
        assert pruned.ratios[name].max == pytest.approx(ratio)
    assert dense.ratios == {}
    assert pruned.figures["throughput"].max == pytest.approx(1 * 10 / 2.0)
    assert result.models[1].cells[1].figures["throughput"].max == pytest.approx(4 * 10 / 2.0)


def test_unmeasured_metrics_are_absent() -> None:
    result = benched(ScriptedRunner("dense"), ScriptedRunner("pruned", [BenchSample(1.0)]))
    assert set(result.models[0].cells[0].figures) == {"prefill", "decode", "throughput"}
    assert set(result.models[1].cells[0].figures) == {"throughput"}
    assert set(result.models[1].cells[0].ratios) == {"throughput"}
    assert "not measured" in render_bench(result)
    assert "J/token" not in render_bench(result)


def test_counted_ratios_are_shown_with_measured_ones() -> None:
    dense = ScriptedRunner("dense", work=WorkEstimate(100.0, 60.0))
    result = benched(
        dense, ScriptedRunner("pruned", work=WorkEstimate(50.0, 40.0)), ScriptedRunner("other", work=WorkEstimate(80.0))
    )
    assert result.models[1].cells[0].counted == {"prefill": 2.0, "decode": 1.5}
    assert result.models[2].cells[0].counted == {"prefill": 1.25}
    assert "by FLOPs x2.00" in render_bench(result)
    assert "by bytes x1.50" in render_bench(result)


def test_table_shows_sizes_ratios_and_failures() -> None:
    small = ScriptedRunner("pruned", slowed(PRUNED, SLOWDOWNS), model_facts=facts(600, 1000))
    text = render_bench(benched(ScriptedRunner("dense", slowed(DENSE, SLOWDOWNS), max_batch=1), small))
    assert "[1] pruned" in text
    assert "x1.67" in text  # parameters
    assert "x2.00 (2.00 to 2.00)" in text
    assert "batch 4 of dense: out of memory" in text
    assert "x" not in text.partition("batch 4")[2].partition("not measured")[0]


def test_json_has_options_and_every_sample() -> None:
    result = json.loads(
        json.dumps(benched(ScriptedRunner("a", slowed(DENSE, SLOWDOWNS)), ScriptedRunner("b")).to_dict())
    )
    assert (result["reference"], result["options"]["generate"]) == ("a", 10)
    cell = result["models"][0]["cells"][0]
    assert [sample["prefill_s"] for sample in cell["samples"]] == [2.0 * factor for factor in SLOWDOWNS]
    assert cell["figures"]["prefill"]["median"] == 3.0


@pytest.mark.parametrize("batch", ["", "0", "1,", "1,-2", "two", "1.5"])
def test_malformed_batch_sizes_are_refused(batch: str) -> None:
    with pytest.raises(ConfigError, match="by commas, such as 1,8"):
        _ = BenchOptions(batch=batch).batches


def test_batch_sizes_are_in_order_without_repeats() -> None:
    assert BenchOptions(batch="8, 1,8").batches == (8, 1)
