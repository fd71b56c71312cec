"""Parts of the report: scores, samples, layers, curves, formats, verdicts, heat map."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prunetune.cli.output import render_run
from prunetune.evaluation.results import Evaluation, Item, Score, TaskResult
from prunetune.manifest import DataFacts
from prunetune.plan import Plan
from prunetune.report import cuts, decision_heatmap, formatting, run_details, verdicts, write_report
from prunetune.report.kept_layers import CHANNELS, GROUPS, count_kept, format_ranges, kept_by_kind
from prunetune.report.run_folder import read_run
from prunetune.report.samples import select_samples
from prunetune.report.scores import headline_score, metric_rows
from prunetune.report.training_curves import MAX_POINTS, downsample, phase_spans, running_mean, training_curve
from support.report import evaluations, make_run, make_sizes


def task(name: str, values: list[float], metric: str = "accuracy") -> TaskResult:
    items = tuple(Item(f"{name}{i}", "?", "a", "a", value > 0.5, {metric: value}) for i, value in enumerate(values))
    mean = sum(values) / len(values)
    return TaskResult(name, {metric: Score(mean, math.sqrt(mean * (1 - mean) / (len(values) - 1)), len(values))}, items)


def test_change_over_the_same_items_has_the_paired_error() -> None:
    reference, pruned = task("t", [1, 0] * 50), task("t", [1, 0] * 49 + [0, 0])
    (row,) = metric_rows({"tuned": Evaluation({"t": reference}), "pruned": Evaluation({"t": pruned})})
    assert row.change == "−0.010 ± 0.010"
    assert row.verdict == "within noise"
    assert row.recovery == "98.0%"


def test_change_over_other_items_has_the_unpaired_error() -> None:
    reference, pruned = task("t", [1, 0] * 50), task("t", [1, 0] * 40)
    (row,) = metric_rows({"tuned": Evaluation({"t": reference}), "pruned": Evaluation({"t": pruned})})
    assert row.change == "0.000 ± 0.075"


def test_headline_is_the_mean_over_common_tasks() -> None:
    reference = Evaluation({"a": task("a", [1, 1, 1, 0]), "b": task("b", [1, 0])})
    pruned = Evaluation({"a": task("a", [1, 1, 0, 0]), "c": task("c", [1, 1])})
    headline = headline_score({"tuned": reference, "pruned": pruned})
    assert headline is not None
    assert (headline.tasks, headline.pruned, headline.reference) == (1, 0.5, 0.75)
    assert headline.recovery == pytest.approx(2 / 3)


def test_headline_leaves_general_tasks_out() -> None:
    school = replace(task("school", [0, 0]), general=True)
    results = {name: Evaluation({"a": task("a", [1, 0]), "school": school}) for name in ("tuned", "pruned")}
    headline = headline_score(results)
    assert headline is not None
    assert (headline.tasks, headline.pruned) == (1, 0.5)


def test_headline_of_a_loss_has_no_recovery() -> None:
    results = {
        name: Evaluation({"a": TaskResult("a", {"perplexity": Score(9.0, 0.1, 5)}, ())}) for name in ("dense", "pruned")
    }
    headline = headline_score(results)
    assert headline is not None
    assert (headline.metric, headline.recovery, headline.reference_name) == ("perplexity", None, "dense untuned")


def test_headline_needs_reference_and_result() -> None:
    evaluation = Evaluation({"a": task("a", [1, 0])})
    assert headline_score({"pruned": evaluation}) is None
    assert headline_score({"tuned": evaluation, "dense": evaluation}) is None
    assert headline_score({}) is None


def test_samples_show_flips_of_several_tasks_and_count_all() -> None:
    results = evaluations()
    samples = select_samples(results)
    tuned, pruned = results["tuned"].tasks, results["pruned"].tasks
    lost = sum(
        bool(before.correct and not after.correct)
        for name in ("bill_topic", "casehold", "mmlu_law", "overruling")
        for before, after in zip(tuned[name].items, pruned[name].items, strict=True)
    )
    assert samples.counts["lost"] == lost
    assert len(samples.selected) == 12
    assert len({sample.task for sample in samples.selected if sample.flip == "lost"}) == 4
    assert {sample.flip for sample in samples.selected} == {"lost", "gained", "right", "wrong", "open"}


def test_generated_answer_is_marked_by_overlap_alone() -> None:
    generated = [sample for sample in select_samples(evaluations()).selected if sample.task == "billsum"]
    assert generated
    assert all(
        sample.pruned_mark.is_correct is None and sample.pruned_mark.label.startswith("ROUGE-L") for sample in generated
    )


@pytest.mark.parametrize(("attention", "mlp"), [
    ("model.layers.{}.self_attn", "model.layers.{}.mlp"),
    ("transformer.h.{}.attn", "transformer.h.{}.mlp"),
    ("gpt_neox.layers.{}.attention", "gpt_neox.layers.{}.mlp"),
])  # fmt: skip
def test_layers_come_from_the_numbers_in_site_names(attention: str, mlp: str) -> None:
    sites = {name.format(layer): (0, 2) if name == mlp else () for layer in (10, 2) for name in (mlp, attention)}
    kept = kept_by_kind(Plan(sites, dict.fromkeys(sites, 4)))
    assert {kind: sorted(by_layer) for kind, by_layer in kept.items()} == {GROUPS: [2, 10], CHANNELS: [2, 10]}
    assert count_kept(kept[GROUPS].values()) == (0, 8)
    assert count_kept(kept[CHANNELS].values()) == (4, 8)


def test_format_ranges_joins_neighbours() -> None:
    assert format_ranges((0, 1, 2, 5, 7, 8)) == "0–2, 5, 7–8"
    assert format_ranges(()) == ""


def test_phase_ends_at_the_start_of_the_next() -> None:
    spans = phase_spans([{"step": s, "phase": p} for s, p in ((1, "search"), (5, "search"), (9, "tune"), (20, "tune"))])
    assert [(span.phase, span.first, span.last) for span in spans] == [("search", 1, 9), ("tune", 9, 20)]


def test_training_curve_takes_the_later_of_two_lines_and_no_nan() -> None:
    lines = [
        {"step": 2, "loss": 5.0},
        {"step": 1, "loss": 9.0},
        {"step": 2, "loss": 4.0},
        {"step": 3, "loss": math.nan},
    ]
    line = training_curve(lines, "loss", "red")
    assert line is not None
    assert line.points == ((1, 9.0), (2, 4.0))
    assert training_curve(lines, "lr", "red") is None


@pytest.mark.parametrize("count", [0, 1, MAX_POINTS, MAX_POINTS + 1, 10 * MAX_POINTS])
def test_downsample_keeps_the_mean(count: int) -> None:
    few = downsample([(float(step), 3.0) for step in range(count)])
    assert len(few) <= MAX_POINTS
    assert bool(few) == bool(count)
    assert all(value == pytest.approx(3.0) for _, value in few)


def test_running_mean_of_a_constant_is_the_constant() -> None:
    assert running_mean([2.0] * 9, 3) == [2.0] * 9


@pytest.mark.parametrize(("formatted", "expected"), [
    (formatting.count(1536), "1,536"),
    (formatting.short(134_515_008), "134.5M"),
    (formatting.short(999), "999"),
    (formatting.size(269_060_552), "269.1 MB"),
    (formatting.share(0.34), "34%"),
    (formatting.share(-0.0001), "0%"),
    (formatting.decimal(-0.25), "−0.250"),
    (formatting.signed_decimal(0.25), "+0.250"),
    (formatting.duration(3725), "1 h 02 min"),
    (formatting.duration(119.9), "1 min 59 s"),
    (formatting.duration(3599.9), "1 h 00 min"),
    (formatting.scientific(2.4e-6), "2.4e-6"),
    (formatting.decimal(math.nan), formatting.NOT_KNOWN),
    (formatting.share(None), formatting.NOT_KNOWN),
])  # fmt: skip
def test_numbers_are_formatted(formatted: str, expected: str) -> None:
    assert formatted == expected


# -- the four answers ------------------------------------------------------------------------------------------------


def answered(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    folder = make_run(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run = read_run(folder)
    answers = verdicts.run_verdicts(run, headline_score(run.evaluations), metric_rows(run.evaluations))
    return {answer.question: answer for answer in answers}


def test_verdicts_of_a_good_run(tmp_path: Path) -> None:
    answers = answered(tmp_path)
    assert [answer.answer for answer in answers.values()] == ["yes", "yes", "partly", "yes"]
    assert "106.2M → 63.7M" in answers["Smaller?"].explanation
    assert "after acting once" in answers["Within limits?"].explanation


@pytest.mark.parametrize(
    ("changes", "question", "reading", "words"),
    [
        (
            {"gain": {}, "speed": {"dense": {"decode_tokens_per_s": 61}}},
            "Faster?",
            "unknown",
            "was not measured in turns",
        ),
        ({"model": {}}, "Smaller?", "unknown", "not known"),
        ({"gates": {}}, "Within limits?", "none", "No limit was set"),
        (
            {"gates": {"limits": [{"gate": "g", "limit": 1, "found": 2, "held": False}]}},
            "Within limits?",
            "no",
            "g: 2",
        ),
        (
            {"gates": {"keep_asked": 0.5, "kept": 0.6}},
            "Smaller?",
            "partly",
            "50% was asked for; a limit on a score kept 60%",
        ),
        ({"failed": "stopped at step 4"}, "Within limits?", "no", "Stopped at step 4."),
        ({"gates": {"limits": "odd", "events": [3]}, "validation": []}, "Within limits?", "none", "No limit"),
    ],
)
def test_verdicts_follow_the_manifest(
    changes: dict[str, Any], question: str, reading: str, words: str, tmp_path: Path
) -> None:
    answer = answered(tmp_path, **changes)[question]
    assert answer.answer == reading
    assert words in answer.explanation


def test_quality_is_unknown_without_a_tuned_reference(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "evaluation" / "tuned.json").unlink()
    run = read_run(folder)
    answer = verdicts.run_verdicts(run, headline_score(run.evaluations), metric_rows(run.evaluations))[2]
    assert answer.answer == "unknown"
    assert "a dense tuned one was not scored" in answer.explanation


def test_speed_on_which_rounds_disagree_is_an_uncertain_verdict(tmp_path: Path) -> None:
    decode, prefill = {"median": 0.9, "min": 0.7, "max": 1.02}, {"median": 1.3, "min": 1.2, "max": 1.4}
    answer = answered(tmp_path / "both", gain={"speed": {"decode": decode, "prefill": prefill}})["Faster?"]
    assert answer.answer == "partly"  # prefill, which is clear
    assert "Rounds of decode disagree on which is faster" in answer.explanation
    assert "prunetune bench" in answer.explanation
    assert "Decode 0.90× (0.70 to 1.02), prefill 1.30× (1.20 to 1.40)" in answer.explanation
    assert answered(tmp_path / "one", gain={"speed": {"decode": decode}})["Faster?"].answer == "unknown"


def test_manifest_that_lost_its_facts_is_printed(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"a": 5}')
    (tmp_path / "config.yaml").write_text("model: tiny")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "pruned.json").write_text(Evaluation({}).to_json())
    assert "self-check          nan relative (limit nan)" in render_run(tmp_path)


def test_speed_has_its_spread_on_pages_and_in_the_terminal(tmp_path: Path) -> None:
    folder = make_sizes(tmp_path / "run")
    size_folder = folder / "sizes" / "0.8"
    turns = "1.14× (1.11 to 1.18)"
    assert turns in render_run(folder)
    assert turns in render_run(size_folder)
    page = write_report(folder).read_text(encoding="utf-8")
    assert f"<td>{turns}</td>" in page
    page = write_report(size_folder).read_text(encoding="utf-8")
    assert f"Throughput {turns} of the dense model" in page


@pytest.mark.parametrize(("count", "reading"), [(5, "unknown"), (500, "yes")])
def test_quality_is_unknown_with_too_few_items(count: int, reading: str, tmp_path: Path) -> None:
    reference, pruned = task("t", [1, 0, 1, 1] * count), task("t", [1, 1, 0, 1] * count)
    scored = {"tuned": Evaluation({"t": reference}), "pruned": Evaluation({"t": pruned})}
    run = replace(read_run(make_run(tmp_path / "run")), evaluations=scored)
    answer = verdicts.run_verdicts(run, headline_score(scored), metric_rows(scored))[2]
    assert answer.answer == reading
    assert ("with 20 items" in answer.explanation) == (count == 5)


def quality(tmp_path: Path, **scored: Evaluation) -> verdicts.RunVerdict:
    run = replace(read_run(make_run(tmp_path / "run")), evaluations=scored)
    return verdicts.run_verdicts(run, headline_score(scored), metric_rows(scored))[2]


def choices(right: int, expected: str = "ab", nll: float = 1.0) -> Evaluation:
    """The first `right` of 200 rows are right; the right answers are those of `expected`, in turn."""
    items = tuple(
        Item(str(i), "?", expected[i % len(expected)], "", i < right, {"accuracy": float(i < right)})
        for i in range(200)
    )
    mean = right / 200
    scores = {"accuracy": Score(mean, math.sqrt(mean * (1 - mean) / 199), 200), "nll": Score(nll, 0.01, 200)}
    return Evaluation({"t": TaskResult("t", scores, items)})


def test_model_that_is_not_above_the_untuned_one_has_learnt_nothing(tmp_path: Path) -> None:
    answer = quality(tmp_path, dense=choices(120), tuned=choices(122), pruned=choices(121))
    assert answer.answer == "no"
    assert answer.explanation.startswith(
        "Nothing that was learnt shows in the pruned model, nor in the dense tuned one:"
    )
    answer = quality(tmp_path / "b", dense=choices(120), tuned=choices(180), pruned=choices(121))
    assert answer.explanation.startswith("Nothing that was learnt shows in the pruned model: ")


def test_accuracy_that_one_answer_for_all_rows_reaches_was_not_learnt(tmp_path: Path) -> None:
    scored = {"dense": choices(60, "aaab"), "tuned": choices(150, "aaab"), "pruned": choices(150, "aaab")}
    assert quality(tmp_path, **scored).answer == "no"
    scored = {"dense": choices(60, "aaab"), "tuned": choices(180, "aaab"), "pruned": choices(180, "aaab")}
    assert quality(tmp_path / "b", **scored).answer == "yes"


def test_general_task_shows_no_learning() -> None:
    tasks = {name: replace(choices(right).tasks["t"], general=True) for name, right in (("dense", 60), ("pruned", 150))}
    assert not verdicts.has_learnt({name: Evaluation({"t": task}) for name, task in tasks.items()}, "pruned")


def test_likelihood_that_fell_is_told_beside_equal_accuracy(tmp_path: Path) -> None:
    scored = {"dense": choices(60), "tuned": choices(180, nll=0.5), "pruned": choices(180, nll=0.6)}
    answer = quality(tmp_path, **scored)
    assert answer.answer == "partly"
    assert answer.explanation.endswith("But right answers became less likely (NLL per token) in t.")


def test_change_without_spread_has_a_verdict() -> None:
    for ours, verdict in ((0, "worse"), (1, "within noise")):
        reference, pruned = task("t", [1] * 50), task("t", [ours] * 50)
        (row,) = metric_rows({"tuned": Evaluation({"t": reference}), "pruned": Evaluation({"t": pruned})})
        assert row.verdict == verdict


@pytest.mark.parametrize("order", [("zero", "wide"), ("wide", "zero")])
def test_task_without_recovery_hides_no_other_loss(order: tuple[str, str], tmp_path: Path) -> None:
    """A reference score of 0 has no recovery; a loss on the other task is still reported, in either order."""
    results = {"zero": (task("zero", [0] * 20), task("zero", [0] * 20))}
    results["wide"] = (task("wide", [1, 0, 1, 1] * 5), task("wide", [1, 1, 0, 1] * 5))
    scored = {
        model: Evaluation({name: results[name][n] for name in order}) for n, model in enumerate(("tuned", "pruned"))
    }
    run = replace(read_run(make_run(tmp_path / "run")), evaluations=scored)
    answer = verdicts.run_verdicts(run, headline_score(scored), metric_rows(scored))[2]
    assert answer.answer == "unknown"
    assert "of wide may be lost" in answer.explanation


def test_last_column_names_the_reference_of_the_share(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert "recovery" in render_run(folder)
    (folder / "evaluation" / "tuned.json").unlink()
    assert "of dense" in render_run(folder)
    assert "recovery" not in render_run(folder)


def test_recovery_has_the_error_of_the_paired_change() -> None:
    reference, pruned = task("t", [1, 0] * 50), task("t", [1, 0] * 49 + [0, 0])
    (row,) = metric_rows({"tuned": Evaluation({"t": reference}), "pruned": Evaluation({"t": pruned})})
    assert row.recovery_with_se == pytest.approx((0.98, 0.02))


def test_heatmap_ends_with_the_plan(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"))
    assert run.plan is not None
    columns = decision_heatmap.heatmap_columns(run.metrics, run.plan, CHANNELS)
    assert 2 < len(columns) <= decision_heatmap.MAX_COLUMNS + 1
    assert columns[-1].step == 700
    assert columns[-1].shares[0] == len(run.plan.kept["model.layers.0.mlp"]) / 1536
    assert decision_heatmap.heatmap_columns([], run.plan, CHANNELS) == []
    malformed = [
        {"step": 1, "widths": {"model.layers.0.mlp": "x", "other": 3}},
        {"step": None, "widths": {}},
        {"widths": 3},
    ]
    assert decision_heatmap.heatmap_columns(malformed, run.plan, CHANNELS)[1].shares == {}


def test_heatmap_and_table_of_cuts_show_what_each_cut_left(tmp_path: Path) -> None:
    plan = Plan({"layers.0.attn": (0,), "layers.0.mlp": (0, 2, 5)}, {"layers.0.attn": 3, "layers.0.mlp": 8})
    metrics = [{"step": step, "phase": "prune" if step < 4 else "tune", "loss": 9.0 - step} for step in range(1, 7)]
    for step, kept, widths in ((1, 0.8, (3, 6)), (4, 0.4, (1, 3))):
        metrics[step - 1] |= {"kept": kept, "widths": {"layers.0.attn": widths[0], "layers.0.mlp": widths[1]}}
    validation = [{"step": step, "nll": float(step)} for step in (0, 2, 3, 6)]
    run = replace(read_run(make_run(tmp_path / "run")), plan=plan, metrics=tuple(metrics), validation=tuple(validation))
    columns = decision_heatmap.heatmap_columns(run.metrics, plan, CHANNELS)
    assert [(column.step, column.shares[0]) for column in columns] == [(0, 1.0), (1, 6 / 8), (4, 3 / 8)]
    first, last = cuts.cut_rows(run)
    assert (first.step, first.kept, first.removed) == (1, 0.8, {"KV groups": 0, "MLP channels": 2})
    assert (first.loss_before, first.loss_after, first.loss_at_end, first.validation) == (None, 8.0, 7.0, 3.0)
    assert (last.step, last.kept, last.removed) == (4, 0.4, {"KV groups": 2, "MLP channels": 3})
    assert (last.loss_before, last.loss_after, last.loss_at_end, last.validation) == (7.0, 5.0, 4.0, 6.0)


def test_proposals_of_a_generator_are_no_cuts() -> None:
    searched = {"step": 1, "phase": "search", "widths": {"layers.0.mlp": 3}}
    assert cuts.cut_lines([searched, searched | {"step": 2, "phase": "tune"}]) == [
        searched | {"step": 2, "phase": "tune"}
    ]


@pytest.mark.parametrize(("count", "expected"), [(None, 0), (0, 0), (3, 2)])
def test_data_notes_count_rows_left_out(count: int | None, expected: int) -> None:
    notes = run_details.data_notes(DataFacts.from_dict({"too_long": count, "dropped": count}))
    assert len(notes) == expected
    assert all(note.startswith("3 rows") for note in notes)
