"""What a run watches beside its own loss: general knowledge, and rows with choices; and the decisions it validates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prunetune.config.limits import Gate
from prunetune.config.recipe import EvaluateConfig
from prunetune.cost.parameters import total
from prunetune.data.records import Record as Row
from prunetune.errors import ConfigError, DataError
from prunetune.evaluation.results import Evaluation, Item
from prunetune.evaluation.score_records import evaluate, sample
from prunetune.pipeline.prepare import Setting
from prunetune.plan import Plan
from prunetune.pruning.sites import kept_params
from prunetune.runs.folder import TUNING
from prunetune.search.nested_sites import Nest
from prunetune.search.plan_rules import step
from prunetune.search.select import floor
from prunetune.train.checkpoints import Checkpoints, Keeper
from prunetune.train.job import Record
from prunetune.train.parallel.distributed_passes import shared
from prunetune.train.schedule import schedule_of
from prunetune.train.validation import perplexity
from prunetune.utils.files import write_text


@dataclass(frozen=True)
class Watcher:
    """Scores the model as the loop hands it over, and keeps what was decided in the run folder."""

    setting: Setting
    gates: tuple[Gate, ...]
    good: Keeper
    chosen: tuple[Row, ...]  # rows of valid with choices, where their accuracy is wanted
    guard: tuple[Row, ...]

    @property
    def reference(self) -> bool:
        """The dense model is scored first where something is held against it."""
        return bool(self.gates or self.chosen or self.guard)

    def scores(self, model: Any) -> dict[str, float]:
        """Accuracy on valid, and NLL, perplexity and accuracy on the guard, as far as there are rows for them."""
        found = {f"valid.{name}": value for name, value in self._scored(model, self.chosen) if name == "accuracy"}
        return found | {f"guard.{name}": value for name, value in self._scored(model, self.guard)}

    def decided(self, record: Record, plan: Plan) -> None:
        """Keep the plan with its scores: `decisions/step-0000040.json`."""
        if not self.setting.ranks.is_main:
            return
        folder = self.setting.folder.path / "decisions"
        folder.mkdir(exist_ok=True)
        write_text(
            folder / f"step-{record['step']:07d}.json", json.dumps({**record, "kept_units": packed(plan)}) + "\n"
        )

    def _scored(self, model: Any, rows: Sequence[Row]) -> list[tuple[str, float]]:
        if not rows:
            return []
        config = EvaluateConfig(limit=0, generate_limit=0, max_tokens=self.setting.config.evaluate.max_tokens)
        # Adapters are float32 and compute in the base's dtype, as in training.
        mixed = torch.autocast(self.setting.device.type, model.dtype, enabled=model.dtype != torch.float32)
        with mixed:
            return list(summed(evaluate(model, self.setting.tokenizer, rows, self.setting.config.data, config)).items())


def summed(evaluation: Evaluation) -> dict[str, float]:
    """One number a metric over all items: accuracy of those with choices; NLL per token of the others, or of all."""
    items = [item for result in evaluation.tasks.values() for item in result.items]
    asked, others = _split(items)
    found = {"accuracy": math.fsum(item.scores["accuracy"] for item in asked) / len(asked)} if asked else {}
    weighed = others or asked
    tokens = math.fsum(item.scores["tokens"] for item in weighed)
    nll = math.fsum(item.scores["nll"] * item.scores["tokens"] for item in weighed) / tokens
    return found | {"nll": nll, "perplexity": perplexity(nll)}


def _split(items: Iterable[Item]) -> tuple[list[Item], list[Item]]:
    listed = list(items)
    return (
        [item for item in listed if "accuracy" in item.scores],
        [item for item in listed if "accuracy" not in item.scores],
    )


def watcher_of(setting: Setting) -> Watcher:
    """The watcher of a run; raises `ConfigError` or `DataError` where a gate could never act."""
    gates = tuple(Gate.parse(text) for text in setting.config.gates)
    rows = tuple(row for row in setting.splits.valid if row.choices)
    if gates and not setting.encoded["valid"].examples:
        raise DataError(
            "gates are looked at where valid is scored, and no row of valid is there or fits data.max_length: "
            "name data.valid or a data.valid_share, raise the length or set data.too_long=truncate"
        )
    wanted = setting.config.validate.accuracy or any(gate.metric == "valid.accuracy" for gate in gates)
    if wanted and not rows:
        raise DataError("validate.accuracy and gates on valid.accuracy need rows with choices in valid: there are none")
    if setting.config.data.guard and not setting.splits.guard:
        raise DataError("data.guard has no row of its own in these sources: name others")
    if any(gate.metric == "guard.accuracy" for gate in gates) and not any(row.choices for row in setting.splits.guard):
        raise DataError("a gate on guard.accuracy needs rows with choices in data.guard: there are none")
    _refuse_idle(setting, gates)
    _refuse_out_of_reach(setting)
    most = setting.config.validate.limit
    chosen, guard = sample(rows if wanted else (), most), sample(setting.splits.guard, most)
    good = shared(Checkpoints(setting.folder.good), setting.ranks)
    return Watcher(setting, gates, good, tuple(chosen), tuple(guard))


def _refuse_idle(setting: Setting, gates: Sequence[Gate]) -> None:
    every, search = setting.config.train.validate_every, schedule_of(setting.config).search
    if every > search and any(gate.action != "stop" for gate in gates):
        raise ConfigError(
            f"gates: no validation comes before the search ends at step {search}, so there is nothing to go back to; "
            f"lower train.validate_every ({every}) below it"
        )


def _refuse_out_of_reach(setting: Setting) -> None:
    """Raises `ConfigError` where no plan of this budget is as much smaller as `gain.smaller` asks."""
    asked, keep, shape = setting.config.gain.smaller, setting.config.budget.keep, setting.shape
    if not asked or shape.limits:  # other budgets say nothing of the share that stays
        return
    prunable, nest = total(setting.sites), Nest(setting.sites)
    whole = {site.name: site.units for site in setting.sites}
    block = max(step(site, shape) * nest.span(site, whole) for site in setting.sites)
    if shape.layout == "uniform":  # a step is taken in all layers
        block *= len({site.layer for site in setting.sites})
    most = (prunable - max(floor(setting.sites, shape), keep * prunable - block)) / setting.params
    if most < asked:
        raise ConfigError(
            f"gain.smaller {asked:g}: under budget.keep {keep:g} at most {most:.1%} of all parameters can go "
            f"({1 - prunable / setting.params:.0%} are embeddings, head and norms, which stay): lower one of the two"
        )


# -- decisions in few bytes --------------------------------------------------------------------------------------------


def packed(plan: Plan) -> dict[str, dict[str, Any]]:
    """A plan as one hexadecimal number a site: bit i is set where unit i stays."""
    return {
        site: {"units": plan.units[site], "mask": f"{sum(1 << unit for unit in kept):x}"}
        for site, kept in plan.kept.items()
    }


def unpacked(sites: dict[str, dict[str, Any]]) -> Plan:
    """Read what `packed` wrote."""
    masks = {site: int(value["mask"], 16) for site, value in sites.items()}
    units = {site: int(value["units"]) for site, value in sites.items()}
    return Plan({site: tuple(u for u in range(units[site]) if mask >> u & 1) for site, mask in masks.items()}, units)


# -- what a manifest says ----------------------------------------------------------------------------------------------


def outcome(setting: Setting) -> dict[str, Any]:
    """Time, validation and gates of a run that is tuned, for the manifest."""
    state, timings = Checkpoints(setting.folder.checkpoints).latest(), setting.folder.manifest().get("timings", {})
    if state is None:
        return {}
    seconds = max(timings.get(TUNING, 0.0), state.seconds)  # a process that was killed noted none
    timed = {"timings": timings | {TUNING: seconds}}
    if not state.seen:
        return timed
    seen, config = state.seen, setting.config
    gates = [Gate.parse(text) for text in config.gates]
    limits = [
        {
            "gate": str(gate), "limit": gate.limit(seen["dense"]), "found": seen["last"].get(gate.metric),
            "held": gate.holds(seen["last"], seen["dense"]),
        }
        for gate in gates if seen["last"]
    ]  # fmt: skip
    kept = kept_params(setting.sites, state.plan) / total(setting.sites) if state.plan else None
    # Under budgets of another kind, no share of parameters was asked for: only a gate can have raised it.
    asked = kept if setting.shape.limits and not seen["events"] else config.budget.keep
    return timed | {
        "validation": {
            "every": config.train.validate_every * max(1, seen["stride"]),
            "seconds": seen["seconds"], "share": seen["seconds"] / seconds if seconds else None,
            "dense": seen["dense"], "last": seen["last"],
        },
        "gates": {
            "limits": limits, "events": seen["events"],
            "keep_asked": asked, "keep_allowed": seen["schedule"]["keep"], "kept": kept,
        },
    }  # fmt: skip
