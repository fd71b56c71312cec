"""Finished runs beside each other: what was set otherwise, what came out, which units stayed, which items flipped."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.config.recipe import to_mapping
from prunetune.errors import DataError, PlanError, RunFolderError
from prunetune.evaluation.results import Evaluation, Item, Score
from prunetune.evaluation.statistics import is_same_question, keep_same_questions, paired_difference
from prunetune.plan import Plan
from prunetune.runs.folder import flatten_options, open_run

SHOWN = 10  # flips that the text lists by name
IGNORED_OPTIONS = {"out"}  # differs always


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
    """Read a run folder; raises `RunFolderError` for what is none."""
    folder, config = open_run(path)
    try:
        plan = Plan.load(folder.plan_file) if folder.plan_file.exists() else None
        file = folder.evaluation_file("pruned")
        scores = Evaluation.from_json(file.read_text(encoding="utf-8")) if file.exists() else None
        hashes = folder.read_manifest().get("data", {}).get("hashes", {})
    except (PlanError, DataError, OSError, ValueError, AttributeError) as broken:
        raise RunFolderError(f"{path} cannot be read ({broken}); make it anew, or leave it out") from broken
    return ComparedRun(path.resolve().name, flatten_options(to_mapping(config)), plan, scores, hashes)


def diff_runs(paths: Sequence[Path]) -> str:
    """The first run beside each of the others, as text; raises `RunFolderError`."""
    if len(paths) < 2:
        raise RunFolderError("compare-runs needs two run folders or more: name another")
    sides = [load_compared_run(path) for path in paths]
    parts = [_differences(sides), _scores(sides)]
    for other in sides[1:]:
        parts += [_overlap(sides[0], other), _flips(sides[0], other)]
    return "\n\n".join(parts)


def _differences(sides: Sequence[ComparedRun]) -> str:
    lines = [f"{'set otherwise':<28}" + "".join(f"{side.name:>24}" for side in sides)]
    for key in sides[0].options:
        values = [side.options.get(key) for side in sides]
        if key not in IGNORED_OPTIONS and any(value != values[0] for value in values):
            lines.append(f"{key:<28}" + "".join(f"{_short(value):>24}" for value in values))
    changed = [name for name in sides[0].hashes if any(s.hashes.get(name) != sides[0].hashes[name] for s in sides)]
    lines += [f"rows of {name} differ" for name in changed]
    return "\n".join(lines if len(lines) > 1 else ["set otherwise: nothing"])


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 22 else f"…{text[-21:]}"


def _scores(sides: Sequence[ComparedRun]) -> str:
    first = sides[0].evaluation
    if first is None:
        return f"{sides[0].name} has no scores"
    lines = [f"{'score':<28}" + "".join(f"{side.name:>24}" for side in sides) + f"{'last - first (paired)':>28}"]
    for task, result in first.tasks.items():
        for metric in result.scores:
            cells = [_cell(side, task, metric) for side in sides]
            lines.append(
                f"{task + ' ' + metric:<28}" + "".join(cells) + f"{_change(sides[0], sides[-1], task, metric):>28}"
            )
    return "\n".join([*lines, *_unpaired_reasons(sides[0], sides[-1])])


def _cell(side: ComparedRun, task: str, metric: str) -> str:
    score = (
        side.evaluation.tasks[task].scores.get(metric) if side.evaluation and task in side.evaluation.tasks else None
    )
    return f"{'–' if score is None else f'{score.value:.3f} ± {score.se:.3f}':>24}"


def _change(first: ComparedRun, last: ComparedRun, task: str, metric: str) -> str:
    """Over the items that both scored, with the standard error of the paired difference."""
    try:
        assert first.evaluation is not None
        assert last.evaluation is not None
        found: Score = paired_difference(last.evaluation.tasks[task], first.evaluation.tasks[task], metric)
    except (AssertionError, DataError, KeyError):
        return "–"
    return f"{found.value:+.3f} ± {found.se:.3f}" if math.isfinite(found.value) else "–"


def _unpaired_reasons(first: ComparedRun, last: ComparedRun) -> list[str]:
    """Why tasks of both are not paired: their rows are others."""
    tasks = first.evaluation.tasks if first.evaluation else {}
    others = last.evaluation.tasks if last.evaluation else {}
    found = []
    for task in (name for name in tasks if name in others):
        items = {item.id: item for item in tasks[task].items}
        try:
            keep_same_questions(task, [(items[item.id], item) for item in others[task].items if item.id in items])
        except DataError as moved:
            found.append(str(moved))
    return found


def _overlap(first: ComparedRun, other: ComparedRun) -> str:
    title = f"units kept, {first.name} and {other.name}"
    if first.plan is None or other.plan is None:
        return f"{title}: a run has no plan"
    if first.plan.units != other.plan.units:
        return f"{title}: plans of different models"
    lines = [f"{title:<44}{'first':>10}{'second':>10}{'in both':>10}{'overlap':>10}"]
    for kind, (one, two, both) in count_kept_units(first.plan, other.plan).items():
        either = one + two - both
        lines.append(f"{kind:<44}{one:>10,}{two:>10,}{both:>10,}{both / either if either else 1.0:>10.1%}")
    return "\n".join(lines)


def count_kept_units(first: Plan, other: Plan) -> dict[str, tuple[int, int, int]]:
    """(units of the first, of the second, of both) by kind of site, which is the last word of its name."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for site, kept in first.kept.items():
        counts = (len(kept), len(other.kept[site]), len(set(kept) & set(other.kept[site])))
        found[site.rpartition(".")[2]] = [a + b for a, b in zip(found[site.rpartition(".")[2]], counts, strict=True)]
    return {kind: (one, two, both) for kind, (one, two, both) in found.items()}


def _flips(first: ComparedRun, other: ComparedRun) -> str:
    title = f"items, {first.name} to {other.name}"
    if first.evaluation is None or other.evaluation is None:
        return f"{title}: a run has no scores"
    flips, common = find_flips(first.evaluation, other.evaluation)
    lost = sum(not flip.gained for flip in flips)
    lines = [f"{title}: of {common:,} that both answered, {lost:,} lost and {len(flips) - lost:,} gained"]
    for flip in sorted(flips, key=lambda flip: flip.gained)[:SHOWN]:
        what = "gained" if flip.gained else "lost"
        lines.append(f"  {what:<7}{flip.task} {flip.id}: {_line(flip.before)} -> {_line(flip.after)}")
    if len(flips) > SHOWN:
        lines.append(f"  and {len(flips) - SHOWN:,} more")
    return "\n".join(lines)


def find_flips(first: Evaluation, other: Evaluation) -> tuple[list[FlippedItem], int]:
    """Items that one got right and the other wrong, and how many both answered: of the same question, not just id."""
    flips, common = [], 0
    for task in (name for name in first.tasks if name in other.tasks):
        before = {item.id: item for item in first.tasks[task].items if item.correct is not None}
        for item in other.tasks[task].items:
            if item.correct is not None and item.id in before and is_same_question(before[item.id], item):
                common += 1
                flips += _flip(task, before[item.id], item)
    return flips, common


def _flip(task: str, before: Item, after: Item) -> list[FlippedItem]:
    if before.correct == after.correct:
        return []
    return [FlippedItem(task, after.id, bool(after.correct), before.got, after.got)]


def _line(text: str) -> str:
    """Text of a model as one line without control characters: it is shown in a terminal."""
    plain = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return repr(plain if len(plain) <= 40 else f"{plain[:39]}…")
