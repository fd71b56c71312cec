"""Validation during a run: scores of valid and guard rows, limits that can act, and a record of every decision."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from prunetune.config.recipe import EvaluateConfig, RunConfig
from prunetune.config.score_limits import QUALITY, STAGE_SCORE, ScoreLimit
from prunetune.data.records import Record
from prunetune.errors import ConfigError, DataError, LimitBroken
from prunetune.evaluation.item_subset import stable_sample
from prunetune.evaluation.kept_quality import absolute_quality, kept_quality
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.score_records import evaluate
from prunetune.evaluation.statistics import perplexity
from prunetune.manifest import CutFacts, LimitActionFacts, LimitFacts, LimitsFacts, ValidationFacts
from prunetune.pipeline.prepare import RunContext
from prunetune.plan import Plan
from prunetune.pruning.units import dense_plan, prunable_params
from prunetune.runs.folder import TUNING_STAGE
from prunetune.search.plan_rules import block_size, budget_params, budget_share
from prunetune.search.select import min_params
from prunetune.train.checkpoints import Checkpoints
from prunetune.train.schedule import build_schedule
from prunetune.utils.files import write_text
from prunetune.utils.json_lines import JsonObject, is_cut, read_json_lines

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationMonitor:
    """Scores the model that the loop validates, and writes each decision to the run folder."""

    context: RunContext
    limits: tuple[ScoreLimit, ...]
    choice_rows: tuple[Record, ...]  # of valid, if their accuracy is wanted
    guard_rows: tuple[Record, ...]
    reference: Evaluation | None = None  # of the tuned dense model on valid, if `budget.quality` asks for it

    @property
    def needs_dense_scores(self) -> bool:
        """Whether the dense model is scored before the first step, for comparison."""
        return bool(self.limits or self.choice_rows or self.guard_rows)

    def score(self, model: Any, *, is_judged: bool = False) -> dict[str, float]:
        """`valid.accuracy`, and NLL, perplexity and accuracy of guard rows, as far as there are rows for them.

        A model that is judged also gets `valid.quality`, the least that it keeps of the tuned dense model's scores, and
        those scores that have absolute limits.
        """
        valid, guard = self._score_rows(model, self.choice_rows), self._score_rows(model, self.guard_rows)
        scores = {"valid.accuracy": valid["accuracy"]} if "accuracy" in valid else {}
        scores |= {f"guard.{name}": value for name, value in guard.items()}
        return scores | (self._quality(self.score_valid(model)) if is_judged and self.reference is not None else {})

    def _quality(self, evaluation: Evaluation) -> dict[str, float]:
        budget, scores = self.context.config.budget, {}
        if budget.quality and self.reference is not None:
            shares = kept_quality(evaluation, self.reference, budget.quality_of)
            least = min(shares, key=lambda name: (not math.isnan(shares[name]), shares[name]))
            log.info("quality %.3f, of %s: %s", shares[least], least, _listed(shares))
            scores[QUALITY] = shares[least]
        return scores | self._limited_scores(evaluation)

    def _limited_scores(self, evaluation: Evaluation) -> dict[str, float]:
        """The scores that have absolute limits."""
        limits = map(ScoreLimit.of_stages, self.context.config.budget.quality_limits)
        scores = absolute_quality(evaluation, [limit.metric.removeprefix(STAGE_SCORE) for limit in limits])
        return {f"{STAGE_SCORE}{name}": value for name, value in scores.items()}

    def score_valid(self, model: Any) -> Evaluation:
        """The scores of valid that `budget.quality` is of: as many items of each task as at the end of a run."""
        return self._evaluate(model, self.context.splits.valid, self.context.config.evaluate.limit)

    def with_reference(self, load_tuned: Callable[[], Any]) -> ValidationMonitor:
        """The same with the scores of the tuned dense model, if the budget names a quality.

        Raises `LimitBroken` where that model itself is outside an absolute limit.
        """
        if not self.context.config.budget.has_quality:
            return self
        reference = self.score_valid(load_tuned())
        scores = self._limited_scores(reference)
        for limit in map(ScoreLimit.of_stages, self.context.config.budget.quality_limits):
            if not limit.is_met(scores, {}):
                raise LimitBroken(
                    f"budget.quality_limits: of the tuned dense model {limit.describe(scores, {})}, so no smaller one "
                    "is looked for: loosen the limit, or give more train.steps or another lora.dense_learning_rate"
                )
        return replace(self, reference=reference)

    def record_decision(self, record: JsonObject, plan: Plan) -> None:
        """Write the plan with its scores, such as `decisions/step-0000040.json`; rank 0 only."""
        if not self.context.ranks.is_main:
            return
        folder = self.context.folder.path / "decisions"
        folder.mkdir(exist_ok=True)
        text = json.dumps({**record, "kept_units": pack_plan(plan)})
        write_text(folder / f"step-{record['step']:07d}.json", text + "\n")

    def _score_rows(self, model: Any, rows: Sequence[Record]) -> dict[str, float]:
        return aggregate_scores(self._evaluate(model, rows, 0)) if rows else {}

    def _evaluate(self, model: Any, rows: Sequence[Record], limit: int) -> Evaluation:
        config = EvaluateConfig(limit=limit, generate_limit=0, max_tokens=self.context.config.evaluate.max_tokens)
        # Adapters are float32 and compute in the base's dtype, as in training.
        with torch.autocast(self.context.device.type, model.dtype, enabled=model.dtype != torch.float32):
            return evaluate(model, self.context.tokenizer, rows, self.context.config.data, config)


def score_limits(config: RunConfig) -> tuple[ScoreLimit, ...]:
    """The limits of a recipe; those of `budget.quality` and `budget.quality_limits` are among them."""
    limits = (*map(ScoreLimit.parse, config.limits), *map(ScoreLimit.of_stages, config.budget.quality_limits))
    if not config.budget.quality:
        return limits
    return (*limits, ScoreLimit(QUALITY, ">=", config.budget.quality, is_relative=False, action="roll-back"))


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.3f}" for name, share in shares.items())


def aggregate_scores(evaluation: Evaluation) -> dict[str, float]:
    """Over all items: accuracy of those with choices; NLL per token and perplexity of the others, or else of all."""
    items = [item for result in evaluation.tasks.values() for item in result.items]
    with_choices = [item for item in items if "accuracy" in item.scores]
    scored_by_nll = [item for item in items if "accuracy" not in item.scores] or items
    tokens = math.fsum(item.scores["tokens"] for item in scored_by_nll)
    nll = math.fsum(item.scores["nll"] * item.scores["tokens"] for item in scored_by_nll) / tokens
    scores = {"nll": nll, "perplexity": perplexity(nll)}
    if not with_choices:
        return scores
    return {"accuracy": math.fsum(item.scores["accuracy"] for item in with_choices) / len(with_choices)} | scores


def make_monitor(context: RunContext) -> ValidationMonitor:
    """The monitor of a run; raises `ConfigError` or `DataError` for a limit that could never act."""
    limits = score_limits(context.config)
    choice_rows = tuple(row for row in context.splits.valid if row.choices)
    if limits and not context.encoded["valid"].examples:
        raise DataError(
            "limits are checked when valid is scored, and valid has no row, or none that fits data.max_length: "
            "name data.valid or a data.valid_share, raise the length or set data.too_long=truncate"
        )
    needs_accuracy = context.config.validate.accuracy or any(limit.metric == "valid.accuracy" for limit in limits)
    if needs_accuracy and not choice_rows:
        raise DataError("validate.accuracy and limits on valid.accuracy need rows with choices in valid: there is none")
    if context.config.data.guard and not context.splits.guard:
        raise DataError("data.guard has no row of its own in these sources: name others")
    limits_guard_accuracy = any(limit.metric == "guard.accuracy" for limit in limits)
    if limits_guard_accuracy and not any(row.choices for row in context.splits.guard):
        raise DataError("a limit on guard.accuracy needs rows with choices in data.guard: there are none")
    every, schedule = context.config.train.validate_every, build_schedule(context.config)
    last_cut = schedule.search or schedule.cuts[-1].step  # a generator's decision is final where its search ends
    is_resumed = (context.folder.path / "config.yaml").exists()  # it was checked when the run began, maybe by 0.1.0
    moving = any(limit.action != "stop" and not limit.is_of_stages for limit in limits)
    if every > last_cut and not is_resumed and moving:
        raise ConfigError(
            f"limits: no validation comes before the last decision at step {last_cut}, so there is nothing to go back "
            f"to; lower train.validate_every ({every}) to that at most, or raise search.span"
        )
    _raise_if_gain_unreachable(context)
    max_rows = context.config.validate.limit
    return ValidationMonitor(
        context,
        limits,
        choice_rows=tuple(stable_sample(choice_rows if needs_accuracy else (), max_rows)),
        guard_rows=tuple(stable_sample(context.splits.guard, max_rows)),
    )


def _raise_if_gain_unreachable(context: RunContext) -> None:
    """Raises `ConfigError` where no plan of this budget is as much smaller as `require.smaller` asks."""
    required, keep, constraints = context.config.require.smaller, context.config.budget.keep, context.constraints
    if not required or constraints.limits:  # budgets of other kinds do not fix the share of parameters
        return
    counted = budget_params(context.sites, dense_plan(context.sites).widths(), constraints)
    block = max(block_size(site, constraints) * constraints.unit_price(site) for site in context.sites)
    if constraints.layout == "uniform":  # a block is pruned in all layers at once
        block *= len({site.layer for site in context.sites})
    asked = keep * (constraints.original_params or counted)
    outer = sum(site.units * site.outer_params for site in context.sites)
    prunable = prunable_params(context.sites) + outer
    uncounted = outer if constraints.budget_of == "decoder" else 0  # which leaves with hidden channels all the same
    fewest_params = max(min_params(context.sites, constraints), asked - block)
    reachable = (counted - fewest_params + uncounted) / context.dense_params
    if reachable < required:
        raise ConfigError(
            f"require.smaller {required:g}: under budget.keep {keep:g} at most {reachable:.1%} of all parameters can "
            f"be pruned ({1 - prunable / context.dense_params:.0%} are embeddings, head and norms, which are kept): "
            "lower one of the two"
        )


# -- plans packed into JSON --------------------------------------------------------------------------------------------


def pack_plan(plan: Plan) -> dict[str, dict[str, Any]]:
    """A plan as one hexadecimal number per site: bit i is set if unit i is kept."""
    return {
        site: {"units": plan.units[site], "mask": f"{sum(1 << unit for unit in kept):x}"}
        for site, kept in plan.kept.items()
    }


# -- facts for the manifest --------------------------------------------------------------------------------------------


def tuning_facts(context: RunContext) -> dict[str, Any]:
    """Time, validation and limits of a tuned run, for the manifest."""
    state, timings = Checkpoints(context.folder.checkpoints).latest(), context.folder.read_manifest().timings
    if state is None:
        return {}
    seconds = max(timings.get(TUNING_STAGE) or 0.0, state.seconds)  # a process that was killed recorded none
    log = context.folder.path / "metrics.jsonl"
    records = read_json_lines(log)[0] if log.exists() else []
    cuts = tuple(CutFacts(step=line["step"], kept=line["kept"]) for line in records if is_cut(line))
    timed: dict[str, Any] = {"timings": {**timings, TUNING_STAGE: seconds}} | ({"cuts": cuts} if cuts else {})
    if not state.validation_history:
        return timed
    history, config = state.validation_history, context.config
    dense, last = history["dense"], history["last"]
    limits = tuple(
        LimitFacts(
            condition=str(limit),
            limit=limit.threshold(dense),
            measured=last.get(limit.metric),
            is_met=limit.is_met(last, dense),
        )
        for limit in (score_limits(config) if last else ())
    )
    kept = budget_share(context.sites, state.plan.widths(), context.constraints) if state.plan else None
    # Under budgets of other kinds no share of parameters was requested: only a limit can have raised it.
    requested_keep = kept if context.constraints.limits and not history["events"] else config.budget.keep
    return timed | {
        "validation": ValidationFacts(
            every=config.train.validate_every * max(1, history["stride"]),
            seconds=history["seconds"],
            share=history["seconds"] / seconds if seconds else None,
            dense=dense,
            last=last,
        ),
        "limits": LimitsFacts(
            limits=limits,
            actions=tuple(LimitActionFacts.from_dict(event) for event in history["events"]),
            requested_keep=requested_keep,
            allowed_keep=history["schedule"]["keep"],
            kept=kept,
        ),
    }
