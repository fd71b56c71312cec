"""What was removed at which step: one row for every real cut of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prunetune.plan import Plan
from prunetune.report.kept_layers import parse_site
from prunetune.report.run_folder import RunFiles, get_mapping, get_number
from prunetune.utils.json_lines import JsonObject, is_cut

NEIGHBOURS = 5  # steps whose mean stands for the loss before a cut and at the end of its stage


@dataclass(frozen=True)
class CutRow:
    """One cut, the steps until the next one, and the losses around it; None where the log does not hold it."""

    step: int  # the first step of the cut model
    kept: float | None  # share of the prunable parameters
    removed: Mapping[str, int]  # units by kind, in this cut alone
    loss_before: float | None  # mean over the last steps of the stage before
    loss_after: float | None  # at the first step
    loss_at_end: float | None  # mean over the last steps of this stage
    validation: float | None  # the last validation of this stage


def cut_lines(metrics: Sequence[JsonObject]) -> list[JsonObject]:
    """The log's lines that follow a real cut, by step; a generator's proposals also have widths, and are left out."""
    lines = {int(step): line for line in metrics if is_cut(line) and (step := get_number(line, "step")) is not None}
    return [lines[step] for step in sorted(lines)]


def cut_rows(run: RunFiles) -> list[CutRow]:
    """A row for every cut in the log; empty where there is no plan."""
    if run.plan is None:
        return []
    lines, rows = cut_lines(run.metrics), []
    widths: Mapping[str, float] = run.plan.units
    starts = [int(line["step"]) for line in lines]
    for index, (line, step) in enumerate(zip(lines, starts, strict=True)):
        end = starts[index + 1] if index + 1 < len(starts) else None
        previous = starts[index - 1] if index else 0
        after = {site: width for site in widths if (width := get_number(get_mapping(line, "widths"), site)) is not None}
        rows.append(
            CutRow(
                step=step,
                kept=get_number(line, "kept"),
                removed=_removed_by_kind(run.plan, widths, after),
                loss_before=_last_mean(run.metrics, "loss", previous, step, NEIGHBOURS),
                loss_after=get_number(line, "loss"),
                loss_at_end=_last_mean(run.metrics, "loss", step, end, NEIGHBOURS),
                validation=_last_mean(run.validation, "nll", step, end, 1),
            )
        )
        widths = {**widths, **after}
    return rows


def _removed_by_kind(plan: Plan, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, int]:
    removed: dict[str, int] = {}
    for site in (name for name in plan.units if name in after):
        kind = site.partition(":")[2] or (parse_site(site) or (0, ""))[1]
        if kind:
            kind = kind.replace("-", " ")
            removed[kind] = removed.get(kind, 0) + int(before[site] - after[site])
    return removed


def _last_mean(lines: Sequence[JsonObject], key: str, first: int, end: int | None, count: int) -> float | None:
    """Mean of a key over the last so many lines of the steps in [first, end); None where there are none."""
    values = {
        step: value
        for line in lines
        if (step := get_number(line, "step")) is not None and (value := get_number(line, key)) is not None
        if first <= step and (end is None or step < end)
    }
    last = [values[step] for step in sorted(values)[-count:]]
    return sum(last) / len(last) if last else None
