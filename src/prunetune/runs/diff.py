"""Comparison of finished runs (`compare-runs`): options, scores, kept units, items that flipped."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.config.recipe import to_mapping
from prunetune.errors import DataError, PlanError, RunFolderError
from prunetune.evaluation.results import Evaluation, Score, common_items
from prunetune.evaluation.statistics import is_same_question, keep_same_questions, paired_difference
from prunetune.plan import Plan
from prunetune.runs.folder import flatten_options, open_run
from prunetune.utils.tables import table_lines
from prunetune.utils.untrusted import read_text

MAX_FLIPS = 10  # that the text lists by name
IGNORED_OPTIONS = {"out"}  # of every run another


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison; what its folder lacks is None."""

    name: str
    options: Mapping[str, Any]
    plan: Plan | None
    evaluation: Evaluation | None
    hashes: Mapping[str, str]  # of the splits


@dataclass(frozen=True)
class FlippedItem:
    """A test item that one run got right and the other wrong."""

    task: str
    id: str
    gained: bool
    before: str
    after: str


def load_compared_run(path: Path) -> ComparedRun:
    """Read a run folder; raises `RunFolderError` where it is none, or a file of it is broken."""
    folder, config = open_run(path)
    try:
        plan = Plan.load(folder.plan_file) if folder.plan_file.exists() else None
        file = folder.evaluation_file("pruned")
        evaluation = Evaluation.from_json(read_text(file)) if file.exists() else None
        hashes = folder.read_manifest().data.hashes
    except (PlanError, DataError, OSError, ValueError, AttributeError) as broken:
        raise RunFolderError(f"{path} cannot be read ({broken}): run it again, or leave it out") from broken
    return ComparedRun(path.resolve().name, flatten_options(to_mapping(config)), plan, evaluation, hashes)


def diff_runs(paths: Sequence[Path]) -> str:
    """The first run compared with each of the others, as text; raises `RunFolderError`."""
    if len(paths) < 2:
        raise RunFolderError("compare-runs needs two run folders or more: name another")
    runs = [load_compared_run(path) for path in paths]
    sections = [_option_differences(runs), _score_table(runs)]
    for other in runs[1:]:
        sections += [_overlap(runs[0], other), _flips(runs[0], other)]
    return "\n\n".join(sections)


def _option_differences(runs: Sequence[ComparedRun]) -> str:
    first = runs[0]
    rows = []
    for name, option in first.options.items():
        values = [run.options.get(name) for run in runs]
        if name not in IGNORED_OPTIONS and any(value != option for value in values):
            texts = [", ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values]
            rows.append((name, *(text if len(text) <= 22 else f"…{text[-21:]}" for text in texts)))
    changed = [split for split in first.hashes if any(run.hashes.get(split) != first.hashes[split] for run in runs)]
    lines = table_lines(("options that differ", *(f">{run.name}" for run in runs)), rows)
    lines += [f"rows of {split} differ" for split in changed]
    return "\n".join(lines if len(lines) > 1 else ["options that differ: none"])


def _score_table(runs: Sequence[ComparedRun]) -> str:
    """Each score of the first run in all runs, and how the last run differs from it; which tasks cannot be paired."""
    first, last = runs[0].evaluation, runs[-1].evaluation
    if first is None:
        return f"{runs[0].name} has no scores"
    rows, reasons = [], []
    tasks_by_run = [run.evaluation.tasks if run.evaluation else {} for run in runs]
    for task, result in first.tasks.items():
        theirs = tasks_by_run[-1].get(task) if last else None
        for metric in result.scores:
            scores = [tasks[task].scores.get(metric) if task in tasks else None for tasks in tasks_by_run]
            cells = ["–" if score is None else f"{score.value:.3f} ± {score.se:.3f}" for score in scores]
            change = Score(math.nan, math.nan, 0)
            if theirs:
                with suppress(DataError, KeyError):
                    change = paired_difference(theirs, result, metric)
            paired = f"{change.value:+.3f} ± {change.se:.3f}" if math.isfinite(change.value) else "–"
            rows.append((f"{task} {metric}", *cells, paired))
        try:
            keep_same_questions(task, common_items(result, theirs) if theirs else [])
        except DataError as other_questions:  # the same ids belong to other questions
            reasons.append(str(other_questions))
    lines = table_lines(("score", *(f">{run.name}" for run in runs), ">last - first (paired)"), rows)
    return "\n".join([*lines, *reasons])


def _overlap(first: ComparedRun, other: ComparedRun) -> str:
    title = f"units kept, {first.name} and {other.name}"
    if first.plan is None or other.plan is None:
        return f"{title}: a run has no plan"
    if first.plan.units != other.plan.units:
        return f"{title}: plans of different models"
    rows = []
    for kind, (in_first, in_other, in_both) in count_kept_units(first.plan, other.plan).items():
        in_either = in_first + in_other - in_both
        overlap = in_both / in_either if in_either else 1.0
        rows.append((kind, f"{in_first:,}", f"{in_other:,}", f"{in_both:,}", f"{overlap:.1%}"))
    return "\n".join(table_lines((title, ">first", ">second", ">in both", ">overlap"), rows))


def count_kept_units(first: Plan, other: Plan) -> dict[str, tuple[int, int, int]]:
    """Units kept by (the first plan, the other, both), by kind of site, which is the last word of its name."""
    counts: dict[str, tuple[int, int, int]] = {}
    for site, kept in first.kept.items():
        kind, others = site.rpartition(".")[2], other.kept[site]
        in_first, in_other, in_both = counts.get(kind, (0, 0, 0))
        counts[kind] = (in_first + len(kept), in_other + len(others), in_both + len(set(kept) & set(others)))
    return counts


def _flips(first: ComparedRun, other: ComparedRun) -> str:
    title = f"items, {first.name} to {other.name}"
    if first.evaluation is None or other.evaluation is None:
        return f"{title}: a run has no scores"
    flips, common = find_flips(first.evaluation, other.evaluation)
    lost = sum(not flip.gained for flip in flips)
    lines = [f"{title}: of {common:,} that both answered, {lost:,} lost and {len(flips) - lost:,} gained"]
    for flip in sorted(flips, key=lambda flip: flip.gained)[:MAX_FLIPS]:
        answers = f"{_quote_line(flip.before)} -> {_quote_line(flip.after)}"
        lines.append(f"  {'gained' if flip.gained else 'lost':<7}{flip.task} {flip.id}: {answers}".replace("\n", " "))
    if len(flips) > MAX_FLIPS:
        lines.append(f"  and {len(flips) - MAX_FLIPS:,} more")
    return "\n".join(lines)


def find_flips(first: Evaluation, other: Evaluation) -> tuple[list[FlippedItem], int]:
    """Items that one got right and the other wrong, and how many both answered: same id and same question."""
    flips, common = [], 0
    for task in (name for name in first.tasks if name in other.tasks):
        for after, before in common_items(other.tasks[task], first.tasks[task]):
            if None not in (before.correct, after.correct) and is_same_question(before, after):
                common += 1
                if before.correct != after.correct:
                    flips.append(FlippedItem(task, after.id, bool(after.correct), before.got, after.got))
    return flips, common


def _quote_line(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 40 else f"{line[:39]}…")
