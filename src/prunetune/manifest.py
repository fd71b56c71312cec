"""manifest.json of a run folder as frozen dataclasses: environment, data, models, limits, timings and speed of a run.

The module stands beside `plan`, below all packages that read or write a run folder (report, export, runs, pipeline,
compare, cli), so that each of them can import it. Reading never fails on a value: what is missing or of another type
is None or empty. Writing keeps what was read, in its order: keys that this version does not know, and odd values.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Self, get_args, get_origin, get_type_hints

from prunetune.utils.untrusted import parse_json


def finite_number(value: Any) -> Any:
    """The value where it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) <= sys.float_info.max else None  # integers of JSON have no bound


def json_key(name: str, *, read: Callable[[Any], Any] | None = None, **default: Any) -> Any:
    """A dataclass field with another key in the JSON; a function given as `read` parses its value."""
    return field(metadata={"key": name, "read": read}, **default)


@dataclass(frozen=True, kw_only=True)
class ManifestPart:
    """A JSON object of the manifest. Fields without a default are always written, others unless they are None."""

    source: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)  # as it was read

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read a JSON object; of anything else, and of what is missing, the fields are None or empty."""
        source = values if isinstance(values, Mapping) else {}
        return cls(source=source, **{item.name: read(source.get(name)) for item, name, read in _json_fields(cls)})

    @classmethod
    def empty(cls) -> Self:
        """A part of which nothing is known; it is false."""
        return cls.from_dict({})

    def to_dict(self) -> dict[str, Any]:
        """The JSON object: as it was read but for the fields that were replaced since."""
        values = dict(self.source or {})
        for item, name, read in _json_fields(type(self)):
            value = getattr(self, item.name)
            if self.source is not None:
                is_written = value != read(self.source.get(name))
            else:
                is_written = item.default is MISSING or value is not None
            if is_written:
                values[name] = _to_json(value)
        return values

    def __bool__(self) -> bool:
        return bool(self.to_dict())


def _json_fields(part: type[ManifestPart]) -> list[tuple[Field[Any], str, Callable[[Any], Any]]]:
    """(field, its key in the JSON, how it is read)."""
    types = get_type_hints(part)
    return [
        (
            item,
            item.metadata.get("key", item.name),
            item.metadata.get("read") or (lambda value, kind=types[item.name]: _read(kind, value)),
        )
        for item in fields(part)
        if item.name != "source"
    ]


def _read(kind: Any, value: Any) -> Any:
    """The value as that type; None or empty where it is absent or of another type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Mapping:
        items = value.items() if isinstance(value, Mapping) else ()
        return {str(name): _read(arguments[1], entry) for name, entry in items}
    if origin is tuple:
        entries, entry_kind = value if isinstance(value, list) else (), arguments[0]
        readable = (entry for entry in entries if isinstance(entry, Mapping) or not _is_part(entry_kind))
        return tuple(_read(entry_kind, entry) for entry in readable)
    if _is_part(kind):
        return kind.from_dict(value)
    if kind is bool:
        return value is True
    if bool in arguments:
        return value if isinstance(value, bool) else None
    if kind is str or str in arguments:
        absent = None if arguments else ""
        return str(value) if isinstance(value, str) or finite_number(value) is not None else absent
    return finite_number(value)


def _is_part(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, ManifestPart)


def _to_json(value: Any) -> Any:
    if isinstance(value, ManifestPart):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {name: _to_json(entry) for name, entry in value.items()}
    return [_to_json(entry) for entry in value] if isinstance(value, tuple | list) else value


# -- what went in ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EnvironmentFacts(ManifestPart):
    """Software and machine of one process of a run, or of several in which they were the same."""

    commit: str | None  # of prunetune; "" where that is not known
    versions: Mapping[str, str]
    device: str | None
    dtype: str | None

    def changes_since(self, before: EnvironmentFacts) -> str:
        """What differs from an earlier environment, in words; "" where nothing does."""
        pairs = [("commit", before.commit, self.commit), ("device", before.device, self.device)]
        pairs += [("dtype", before.dtype, self.dtype)]
        names = {**before.versions, **self.versions}
        pairs += [(name, before.versions.get(name), self.versions.get(name)) for name in names]
        return ", ".join(f"{name} {old or 'none'} is now {new or 'none'}" for name, old, new in pairs if old != new)


@dataclass(frozen=True, kw_only=True)
class DataFacts(ManifestPart):
    """The rows of a run, by split: train, search, texts, guard, valid, test."""

    hashes: Mapping[str, str]  # SHA-256 of the rows
    counts: Mapping[str, int | None]  # rows
    too_long: int | None  # rows longer than the limit, cut or left out
    dropped: int | None  # rows that were in two splits


@dataclass(frozen=True, kw_only=True)
class DenseModelFacts(ManifestPart):
    """The model that the run began with."""

    name: str
    params: int | None
    decoder_params: int | None  # of the decoder's blocks
    identity: Mapping[str, str]  # SHA-256 of each of its files by name; of a hub model {"commit": its commit}
    bytes: int | None = None  # of weights, in the type in which the pruned model is written
    tokens: int | None = None  # rows of its embedding; this and the next two only where `budget.vocab` prunes them
    kept_tokens: int | None = None
    reduced_params: int | None = None  # with the kept tokens only, as units are pruned from and "dense" scores are of


@dataclass(frozen=True, kw_only=True)
class SizeFacts(ManifestPart):
    """Which of several sizes a folder holds."""

    keep: float | None
    larger: float | None  # `budget.keep` of the size it was cut out of


# -- what came out -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PrunedModelFacts(ManifestPart):
    """The written checkpoint."""

    folder: str
    architecture: str  # class that opens it
    layout: str
    needs_code: bool  # opens with trust_remote_code only
    params: int | None
    bytes: int | None
    note: str  # why another class than the dense model's
    class_name: str = json_key("class")  # the architecture, once more
    decoder_params: int | None
    dtype: str


@dataclass(frozen=True, kw_only=True)
class SelfCheckFacts(ManifestPart):
    """The checkpoint, opened again in a fresh process, against the masked model."""

    max_relative: float | None  # largest difference of logits over the largest logit
    tokens: int | None
    limit: float | None
    ok: bool | None


@dataclass(frozen=True, kw_only=True)
class QuantisedFacts(ManifestPart):
    """The merged model against the one that was tuned on a base in 4 bits."""

    scheme: str
    error: float | None  # root mean square of logits, relative
    same: float | None  # share of tokens with the same first choice


@dataclass(frozen=True, kw_only=True)
class BudgetFacts(ManifestPart):
    """A budget other than `budget.keep`, and what the finished model takes of it."""

    budget: str  # kind
    limit: float | None
    dense: float | None
    counted: float | None
    words: str
    measured: float | None = None  # times only
    error: float | None = None  # measured / counted - 1


# -- validation and limits ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ValidationFacts(ManifestPart):
    """What validation during the run scored, and its cost."""

    every: int | None  # steps
    seconds: float | None
    share: float | None  # of the tuning time
    dense: Mapping[str, float | None]  # scores of the dense model as the run began
    last: Mapping[str, float | None]  # scores at the end


@dataclass(frozen=True, kw_only=True)
class LimitFacts(ManifestPart):
    """A limit on a score or on the gain, and how it stood at the end."""

    condition: str = json_key("gate")
    limit: float | None
    # Finite or not: errors quote a score that is not finite.
    measured: float | None = json_key(
        "found", read=lambda value: value if isinstance(value, float) else finite_number(value)
    )
    is_met: bool = json_key("held")
    figure: str | None = None  # of a speed-up: the speed that counts
    explanation: str | None = json_key("says", default=None)  # why it was missed


@dataclass(frozen=True, kw_only=True)
class LimitActionFacts(ManifestPart):
    """What a broken limit did during the run."""

    step: int | None
    conditions: tuple[str, ...] = json_key("gates")
    action: str = json_key("did")


@dataclass(frozen=True, kw_only=True)
class LimitsFacts(ManifestPart):
    """All limits on scores: their state at the end, what they did, and the budget that they allowed."""

    limits: tuple[LimitFacts, ...]
    actions: tuple[LimitActionFacts, ...] = json_key("events")
    requested_keep: float | None = json_key("keep_asked")
    allowed_keep: float | None = json_key("keep_allowed")
    kept: float | None  # share of the prunable parameters


@dataclass(frozen=True, kw_only=True)
class CutFacts(ManifestPart):
    """A real cut of the run."""

    step: int | None  # the first step of the cut model
    kept: float | None  # share of the prunable parameters


@dataclass(frozen=True, kw_only=True)
class RateTrialFacts(ManifestPart):
    """A learning rate that was tried."""

    rate: float | None
    valid_nll: float | None  # at the end; None if it was not finite


@dataclass(frozen=True, kw_only=True)
class LearningRateFacts(ManifestPart):
    """What `train.learning_rate: auto` has chosen, and its cost."""

    rate: float | None
    trials: tuple[RateTrialFacts, ...]
    steps: int | None  # of each trial
    seconds: float | None  # of all trials

    @property
    def description(self) -> str:
        """The choice in one line; "" where nothing was chosen."""
        if self.rate is None:
            return ""
        nlls = ", ".join(
            f"{trial.rate:g} ({'not finite' if trial.valid_nll is None else f'{trial.valid_nll:.3f}'})"
            for trial in self.trials
        )
        return f"{self.rate:g}: chosen on valid from {nlls} (loss after {self.steps} steps each)"


# -- speed -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SpeedupFacts(ManifestPart):
    """Pruned over dense speed, measured in turns, run by run."""

    median: float | None
    min: float | None
    max: float | None

    @property
    def is_significant(self) -> bool:
        """Whether all rounds agree on which model is faster, as far as their range is known."""
        return self.min is None or self.max is None or not self.min <= 1 <= self.max


@dataclass(frozen=True, kw_only=True)
class FigureFacts(ManifestPart):
    """A figure of both models, measured in turns: seconds, or tokens a second."""

    dense: float | None
    pruned: float | None


@dataclass(frozen=True, kw_only=True)
class GainFacts(ManifestPart):
    """What was gained over the dense model, against the gain that was required."""

    smaller: float | None  # share of all parameters that is gone
    speedups: Mapping[str, SpeedupFacts] = json_key("speed")  # by throughput, prefill, decode
    figures: Mapping[str, FigureFacts]
    counted: Mapping[str, float | None]  # bounds by FLOPs and bytes
    limits: tuple[LimitFacts, ...]
    misaligned_widths: tuple[str, ...] = json_key("uneven")


# -- the whole ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Manifest(ManifestPart):
    """All that is known of a run so far, in the order in which a run learns it."""

    status: str | None  # "running", and how the run ended: see `runs.history`
    started: str | None  # ISO 8601, UTC
    ended: str | None  # "" while it works
    host: str | None  # the computer that worked last
    begun_in: str | None  # the working folder of the run's command, seen from the run folder: paths start there
    command: str | None = json_key(
        "command",  # as it could be typed; some manifests list its words
        read=lambda value: shlex.join(map(str, value)) if isinstance(value, list) else _read(str | None, value),
    )
    commit: str | None  # this and the next three: of the process that wrote last
    versions: Mapping[str, str]
    device: str | None
    dtype: str | None
    environments: tuple[EnvironmentFacts, ...]  # all, in the order in which they worked on the run
    seeds: Mapping[str, int | None]
    data: DataFacts
    model: DenseModelFacts
    sizes: tuple[str, ...]  # folders of a run of several sizes
    size: SizeFacts
    timings: Mapping[str, float | None]  # seconds by stage
    learning_rate: LearningRateFacts
    cuts: tuple[CutFacts, ...]
    validation: ValidationFacts
    limits: LimitsFacts = json_key("gates")
    cost_limits: Mapping[str, float | None]  # of budgets other than keep, by kind: FLOPs, bytes, or seconds
    quantised: QuantisedFacts
    pruned: PrunedModelFacts
    selfcheck: SelfCheckFacts
    budgets: tuple[BudgetFacts, ...]
    peak_memory_mb: float | None
    gain: GainFacts
    failed: str | None  # the limits that were missed, in words; "" of a run that ended well

    @property
    def known_environments(self) -> tuple[EnvironmentFacts, ...]:
        """`environments`, or the one that is known of a run of 0.1.0."""
        if self.environments or not self.versions:
            return self.environments
        facts = EnvironmentFacts(commit=self.commit, versions=self.versions, device=self.device, dtype=self.dtype)
        return (facts,)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read the text of a manifest.json; raises `ValueError` where it is no JSON object."""
        values = parse_json(text, nan=True)
        if not isinstance(values, dict):
            raise ValueError("manifest.json is no JSON object")
        return cls.from_dict(values)

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"
