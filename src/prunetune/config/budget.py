"""The options of the section budget: how large the model may be, and the deployment that budgets are of."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prunetune.config.fields import option, parse_number
from prunetune.config.quantities import Amount, parse_vocab_size
from prunetune.config.score_limits import normalize_quality_limit
from prunetune.errors import ConfigError
from prunetune.utils.untrusted import short_repr

BUDGET_KINDS = ("flops", "memory", "file", "latency", "throughput")  # other than keep
QUALITY_FLOOR = 0.2  # budget.keep where only a quality is asked for

UnitName = Literal[
    "kv-groups", "query-heads", "mlp-channels", "experts", "expert-channels", "attention-blocks", "mlp-blocks",
    "layers", "hidden-channels",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What may remain of the model: budgets, kinds of unit that may be pruned, and lower bounds."""

    keep: float = option(
        0.6,
        "Share of the attention and MLP parameters that may remain. Several, such as 0.8,0.6,0.4, give several models "
        "from one run: the largest is budget.keep, the others are budget.sizes. It is 1 if only another is given.",
        gt=0,
        le=1,
        flag_type=str,
        flag_alias="--keep",
    )
    of: Literal["decoder", "model"] = option(
        "decoder",
        "What budget.keep is a share of: the prunable parameters of the decoder's layers, or all parameters of the "
        "model, embedding and head included.",
    )
    quality: float = option(
        0.0,
        "Quality to keep, as a share of the tuned dense model's: 0.98. The run cuts a tenth at a time, judges each cut "
        "on valid once it has recovered, goes back one where the quality breaks, and tunes that model to the end; "
        "budget.keep is then the smallest that is tried (default: 0.2). 0: no such limit. A mapping of "
        "scores to absolute limits, {triage: 0.6, nll: 1.3}, becomes budget.quality_limits.",
        ge=0,
        le=1,
        flag_alias="--quality",
    )
    quality_of: tuple[str, ...] = option(
        (),
        "What budget.quality is of: nll (the mean loss of answers), tasks by name, or one metric of a task, such as "
        "triage.accuracy; default: the mean loss, and each task's accuracy or else loss.",
        entry_name="name",
    )
    quality_limits: tuple[str, ...] = option(
        (),
        "Absolute limits, judged as budget.quality is, beside it or instead of it: triage=0.6 (the least accuracy of a "
        "task), triage.nll=1.2 (its highest loss), accuracy=0.7 and nll=1.3 (means over tasks).",
        parse=normalize_quality_limit,
        entry_name="limit",
    )
    sizes: tuple[float, ...] = option(
        (), "Smaller budgets of one run, each model nested in the one before; budget.keep may name all.", gt=0, le=1
    )
    flops: str = option(
        "", "Most FLOPs of one request of the workload: 0.6 or 60% (of dense), or 1.2T.", accepts_number=True
    )
    memory: str = option(
        "", "Most memory of weights and KV cache under the workload: 0.6 or 1.5GB.", accepts_number=True
    )
    file: str = option(
        "", "Largest file of the weights, as workload.weights stores them: 0.6 or 800MB.", accepts_number=True
    )
    latency: str = option(
        "", "Longest time of the workload's phase on this device, as measured: 0.8 or 25ms.", accepts_number=True
    )
    throughput: str = option(
        "", "Fewest generated tokens per second over all requests: 1.3x or 300/s.", accepts_number=True
    )
    vocab: str = option(
        "off",
        "Prune the vocabulary: embedding and head, most of a small model, lose the rows of tokens that are not kept. "
        "auto keeps all that the data uses, and the quarter that the tokenizer learnt first, or 32,768 if those are "
        "more; 40000 keeps that many; 0.25 such a share; off all. Any text can still be encoded.",
        parse=parse_vocab_size,
        accepts_number=True,
    )
    table: str = option(
        "", "File with this device's latency table; default: the cache, measured if missing.", is_path=True
    )
    align: int = option(0, "MLP widths are multiples of this; 0: 128, or 32 if the MLP is narrower than 4,096.", ge=0)
    min_groups: int = option(
        0, "Fewest KV groups that a layer keeps; a layer with none skips attention (per-layer layout).", ge=0
    )
    tensor_parallel: int = option(
        1, "Devices that will share each layer: KV groups, heads and MLP widths are multiples of it.", ge=1
    )
    units: tuple[UnitName, ...] = option(
        ("kv-groups", "mlp-channels"),
        "Kinds of unit that may be pruned; `prunetune sites` lists those of a model.",
        entry_name="name",
    )
    min_queries: int = option(1, "Fewest query heads that a KV group keeps, if units has query-heads.", ge=1)
    min_experts: int = option(
        0, "Fewest experts that a layer keeps, if units has experts; never fewer than a token is routed to.", ge=0
    )
    min_share: float = option(
        0.0, "Smallest share of units that every site keeps: of a layer's KV groups, channels or experts.", ge=0, le=1
    )
    protect: str = option(
        "", "Layers that are not pruned, counted from 0: 0-1,29. With layout uniform: layers that are not removed."
    )

    def __post_init__(self) -> None:
        if not self.units:
            raise ConfigError("budget.units names no kind of unit, and nothing could go: leave it out, or name some")
        amounts = self.amounts()
        if self.sizes and amounts:
            raise ConfigError(
                "budget.sizes are shares of parameters, and budget names another amount: leave one of the two out"
            )
        if any(larger <= smaller for larger, smaller in itertools.pairwise(self.keeps)):
            raise ConfigError(
                f"budget.sizes {list(self.sizes)} have to fall from budget.keep {self.keep:g} on, each below the one "
                "before: list them in that order, each once"
            )
        check_distinct_names("budget.keep", self.keeps)

    @property
    def has_quality(self) -> bool:
        """Whether the run looks for the smallest model that keeps a quality."""
        return bool(self.quality or self.quality_limits)

    def amounts(self) -> dict[str, Amount]:
        """The budgets of other kinds than `keep` that are given; raises `ConfigError` for what is no amount."""
        texts = {kind: getattr(self, kind) for kind in BUDGET_KINDS}
        return {kind: Amount.parse(text, kind) for kind, text in texts.items() if text}

    @property
    def keeps(self) -> tuple[float, ...]:
        """The requested shares of parameters, the largest first: one for each model of the run."""
        return (self.keep, *self.sizes)

    def protected_layers(self) -> frozenset[int]:
        """The indices of the layers that `protect` names; raises `ConfigError`."""
        layers: set[int] = set()
        for entry in filter(None, (entry.strip() for entry in self.protect.split(","))):
            first, dash, last = entry.partition("-")
            last = last if dash else first
            is_short = all(text.isdecimal() and len(text) < 6 for text in (first, last))
            if not is_short or int(first) > int(last):
                raise ConfigError(
                    f"budget.protect: {short_repr(entry)} is no layer and no range of layers: write 0-1,29"
                )
            layers |= set(range(int(first), int(last) + 1))
        return frozenset(layers)


@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """The requests that the model will serve; budgets other than keep are counted for them."""

    prompt: int = option(512, "Tokens of a prompt.", ge=1)
    generate: int = option(128, "Tokens generated for a prompt; the first comes from the prefill.", ge=2)
    batch: int = option(1, "Requests in one batch.", ge=1)
    context: int = option(0, "Tokens of a request that the KV cache holds; 0: prompt + generate.", ge=0)
    dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "Type of weights and KV cache.")
    weights: Literal["plain", "int8", "int4", "q8_0"] = option(
        "plain", "Format of the weights: dtype, export --quantize int8 or int4, or a .gguf file in q8_0."
    )
    phase: Literal["mix", "prefill", "decode"] = option(
        "mix", "What budget.latency limits: the whole request, the time to its first token, or one decode step."
    )
    runtime: Literal["eager", "recorded"] = option(
        "eager", "How transformers runs a decode step: eagerly, or replayed from a CUDA graph over a static cache."
    )

    @property
    def cached_tokens(self) -> int:
        """Tokens of a request in the cache at its end."""
        return self.context or self.prompt + self.generate


def with_keep(budget: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The section `budget` with one number under `keep`: of several the largest, the others become `sizes`.

    Where only budgets of other kinds are given, `keep` is 1: they alone limit the model. Where only a quality is, it is
    the smallest share that is tried. A mapping under `quality` becomes `quality_limits`.
    """
    if isinstance(limits := budget.get("quality"), Mapping):
        more = budget.get("quality_limits") or []
        named = [f"{name}={value}" for name, value in limits.items()]
        budget = {**budget, "quality": 0.0, "quality_limits": [*named, *([more] if isinstance(more, str) else more)]}
    keep = budget.get("keep")
    shares = [share.strip() for share in keep.split(",")] if isinstance(keep, str) else keep
    if isinstance(shares, list):
        if not shares:
            raise ConfigError(f"{where}: budget.keep is an empty list: name one share or several, such as 0.8,0.6")
        name = f"{where}: {'each ' if len(shares) > 1 else ''}budget.keep"
        keeps = sorted((parse_number(share, name) for share in shares), reverse=True)
        # One flag over a recipe with several sizes means one size, so `sizes` is replaced too.
        return {**budget, "keep": keeps[0], "sizes": keeps[1:]}
    if "keep" not in budget and any(budget.get(kind) for kind in BUDGET_KINDS):
        return {**budget, "keep": 1.0}
    if "keep" not in budget and (budget.get("quality") or budget.get("quality_limits")):
        return {**budget, "keep": QUALITY_FLOOR}
    return budget


def check_distinct_names(option_name: str, values: Sequence[float]) -> None:
    """Raise `ConfigError` for two numbers that are the same in six digits, by which their files are named."""
    for first, second in itertools.combinations(dict.fromkeys(values), 2):
        if f"{first:g}" == f"{second:g}":
            raise ConfigError(
                f"{option_name} names {first!r} and {second!r}, which are both {first:g} in six digits and would share "
                "files of that name: leave one of them out"
            )
