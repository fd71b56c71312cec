"""What a run watches beside its own loss: general knowledge, and rows with choices; and the decisions it validates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prunetune.config.recipe import EvaluateConfig
from prunetune.config.score_limits import ScoreLimit
from prunetune.cost.parameters import prunable_params
from prunetune.data.records import Record as Row
from prunetune.errors import ConfigError, DataError
from prunetune.evaluation.results import Evaluation, Item
from prunetune.evaluation.score_records import evaluate, stable_sample
from prunetune.manifest import LimitActionFacts, LimitFacts, LimitsFacts, ValidationFacts
from prunetune.pipeline.prepare import RunContext
from prunetune.plan import Plan
from prunetune.pruning.sites import kept_params
from prunetune.runs.folder import TUNING_STAGE
from prunetune.search.nested_sites import NestedSites
from prunetune.search.plan_rules import block_size
from prunetune.search.select import min_params
from prunetune.train.checkpoints import Checkpoints, CheckpointStore
from prunetune.train.job import StepRecord
from prunetune.train.parallel.distributed_passes import distribute_checkpoints
from prunetune.train.schedule import build_schedule
from prunetune.train.validation import perplexity
from prunetune.utils.files import write_text


@dataclass(frozen=True)
class ValidationMonitor:
    """Scores the model as the loop hands it over, and keeps what was decided in the run folder."""

    context: RunContext
    limits: tuple[ScoreLimit, ...]
    good_checkpoints: CheckpointStore
    choice_rows: tuple[Row, ...]  # rows of valid with choices, where their accuracy is wanted
    guard_rows: tuple[Row, ...]

    @property
    def needs_dense_scores(self) -> bool:
        """The dense model is scored first where something is held against it."""
        return bool(self.limits or self.choice_rows or self.guard_rows)

    def score(self, model: Any) -> dict[str, float]:
        """Accuracy on valid, and NLL, perplexity and accuracy on the guard, as far as there are rows for them."""
        found = {
            f"valid.{name}": value for name, value in self._score_rows(model, self.choice_rows) if name == "accuracy"
        }
        return found | {f"guard.{name}": value for name, value in self._score_rows(model, self.guard_rows)}

    def record_decision(self, record: StepRecord, plan: Plan) -> None:
        """Keep the plan with its scores: `decisions/step-0000040.json`."""
        if not self.context.ranks.is_main:
            return
        folder = self.context.folder.path / "decisions"
        folder.mkdir(exist_ok=True)
        write_text(
            folder / f"step-{record['step']:07d}.json", json.dumps({**record, "kept_units": pack_plan(plan)}) + "\n"
        )

    def _score_rows(self, model: Any, rows: Sequence[Row]) -> list[tuple[str, float]]:
        if not rows:
            return []
        config = EvaluateConfig(limit=0, generate_limit=0, max_tokens=self.context.config.evaluate.max_tokens)
        # Adapters are float32 and compute in the base's dtype, as in training.
        mixed = torch.autocast(self.context.device.type, model.dtype, enabled=model.dtype != torch.float32)
        with mixed:
            return list(
                aggregate_scores(
                    evaluate(model, self.context.tokenizer, rows, self.context.config.data, config)
                ).items()
            )


def aggregate_scores(evaluation: Evaluation) -> dict[str, float]:
    """One number a metric over all items: accuracy of those with choices; NLL per token of the others, or of all."""
    items = [item for result in evaluation.tasks.values() for item in result.items]
    asked, others = _split_by_choices(items)
    found = {"accuracy": math.fsum(item.scores["accuracy"] for item in asked) / len(asked)} if asked else {}
    weighed = others or asked
    tokens = math.fsum(item.scores["tokens"] for item in weighed)
    nll = math.fsum(item.scores["nll"] * item.scores["tokens"] for item in weighed) / tokens
    return found | {"nll": nll, "perplexity": perplexity(nll)}


def _split_by_choices(items: Iterable[Item]) -> tuple[list[Item], list[Item]]:
    listed = list(items)
    return (
        [item for item in listed if "accuracy" in item.scores],
        [item for item in listed if "accuracy" not in item.scores],
    )


def make_monitor(context: RunContext) -> ValidationMonitor:
    """The watcher of a run; raises `ConfigError` or `DataError` where a gate could never act."""
    gates = tuple(ScoreLimit.parse(text) for text in context.config.limits)
    rows = tuple(row for row in context.splits.valid if row.choices)
    if gates and not context.encoded["valid"].examples:
        raise DataError(
            "gates are looked at where valid is scored, and no row of valid is there or fits data.max_length: "
            "name data.valid or a data.valid_share, raise the length or set data.too_long=truncate"
        )
    wanted = context.config.validate.accuracy or any(gate.metric == "valid.accuracy" for gate in gates)
    if wanted and not rows:
        raise DataError("validate.accuracy and gates on valid.accuracy need rows with choices in valid: there are none")
    if context.config.data.guard and not context.splits.guard:
        raise DataError("data.guard has no row of its own in these sources: name others")
    if any(gate.metric == "guard.accuracy" for gate in gates) and not any(row.choices for row in context.splits.guard):
        raise DataError("a gate on guard.accuracy needs rows with choices in data.guard: there are none")
    _raise_if_limit_never_acts(context, gates)
    _raise_if_gain_unreachable(context)
    most = context.config.validate.limit
    chosen, guard = stable_sample(rows if wanted else (), most), stable_sample(context.splits.guard, most)
    good = distribute_checkpoints(Checkpoints(context.folder.good_checkpoints), context.ranks)
    return ValidationMonitor(context, gates, good, tuple(chosen), tuple(guard))


def _raise_if_limit_never_acts(context: RunContext, limits: Sequence[ScoreLimit]) -> None:
    every, search = context.config.train.validate_every, build_schedule(context.config).search
    if every > search and any(gate.action != "stop" for gate in limits):
        raise ConfigError(
            f"limits: no validation comes before the search ends at step {search}, so there is nothing to go back to; "
            f"lower train.validate_every ({every}) below it"
        )


def _raise_if_gain_unreachable(context: RunContext) -> None:
    """Raises `ConfigError` where no plan of this budget is as much smaller as `require.smaller` asks."""
    asked, keep, shape = context.config.require.smaller, context.config.budget.keep, context.constraints
    if not asked or shape.limits:  # other budgets say nothing of the share that stays
        return
    prunable, nest = prunable_params(context.sites), NestedSites(context.sites)
    whole = {site.name: site.units for site in context.sites}
    block = max(block_size(site, shape) * nest.params_with_children(site, whole) for site in context.sites)
    if shape.layout == "uniform":  # a step is taken in all layers
        block *= len({site.layer for site in context.sites})
    most = (prunable - max(min_params(context.sites, shape), keep * prunable - block)) / context.dense_params
    if most < asked:
        raise ConfigError(
            f"require.smaller {asked:g}: under budget.keep {keep:g} at most {most:.1%} of all parameters can go "
            f"({1 - prunable / context.dense_params:.0%} are embeddings, head and norms, which stay): lower one of the two"
        )


# -- decisions in few bytes --------------------------------------------------------------------------------------------


def pack_plan(plan: Plan) -> dict[str, dict[str, Any]]:
    """A plan as one hexadecimal number a site: bit i is set where unit i stays."""
    return {
        site: {"units": plan.units[site], "mask": f"{sum(1 << unit for unit in kept):x}"}
        for site, kept in plan.kept.items()
    }


def unpack_plan(sites: dict[str, dict[str, Any]]) -> Plan:
    """Read what `packed` wrote."""
    masks = {site: int(value["mask"], 16) for site, value in sites.items()}
    units = {site: int(value["units"]) for site, value in sites.items()}
    return Plan({site: tuple(u for u in range(units[site]) if mask >> u & 1) for site, mask in masks.items()}, units)


# -- what a manifest says ----------------------------------------------------------------------------------------------


def tuning_facts(context: RunContext) -> dict[str, Any]:
    """Time, validation and gates of a run that is tuned, for the manifest."""
    state, timings = Checkpoints(context.folder.checkpoints).latest(), context.folder.read_manifest().timings
    if state is None:
        return {}
    seconds = max(timings.get(TUNING_STAGE) or 0.0, state.seconds)  # a process that was killed noted none
    timed = {"timings": {**timings, TUNING_STAGE: seconds}}
    if not state.validation_history:
        return timed
    seen, config = state.validation_history, context.config
    gates = [ScoreLimit.parse(text) for text in config.limits]
    limits = tuple(
        LimitFacts(
            condition=str(gate),
            limit=gate.threshold(seen["dense"]),
            measured=seen["last"].get(gate.metric),
            is_met=gate.is_met(seen["last"], seen["dense"]),
        )
        for gate in gates
        if seen["last"]
    )
    kept = kept_params(context.sites, state.plan) / prunable_params(context.sites) if state.plan else None
    # Under budgets of another kind, no share of parameters was asked for: only a gate can have raised it.
    asked = kept if context.constraints.limits and not seen["events"] else config.budget.keep
    return timed | {
        "validation": ValidationFacts(
            every=config.train.validate_every * max(1, seen["stride"]),
            seconds=seen["seconds"],
            share=seen["seconds"] / seconds if seconds else None,
            dense=seen["dense"],
            last=seen["last"],
        ),
        "limits": LimitsFacts(
            limits=limits,
            actions=tuple(LimitActionFacts.from_dict(event) for event in seen["events"]),
            requested_keep=asked,
            allowed_keep=seen["schedule"]["keep"],
            kept=kept,
        ),
    }
