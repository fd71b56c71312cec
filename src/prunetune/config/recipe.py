"""The recipe of a run: every option as one field, which is its YAML key, its flag and its check."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prunetune.config.budget import (
    BUDGET_KINDS,
    BudgetConfig,
    UnitName,
    WorkloadConfig,
    check_distinct_names,
    with_keep,
)
from prunetune.config.data import ColumnsConfig, DataConfig
from prunetune.config.fields import (
    merge_mappings,
    option,
    read_options,
    section,
    with_current_names,
)
from prunetune.config.recipe_paths import start_from_recipe
from prunetune.config.score_limits import normalize_limit
from prunetune.config.training import DistillConfig, LoraSettings, SearchConfig, TrainConfig
from prunetune.config.yaml_file import read_yaml
from prunetune.errors import ConfigError
from prunetune.utils.redaction import Redaction, parse_pattern

__all__ = [
    "BUDGET_KINDS", "TRACKERS", "BudgetConfig", "ColumnsConfig", "CompareConfig", "DataConfig", "DistillConfig",
    "EvaluateConfig", "LoraSettings", "ReportConfig", "RequireConfig", "RunConfig", "SearchConfig", "TrainConfig",
    "UnitName", "ValidateConfig", "WorkloadConfig", "from_mapping", "load_recipe", "load_saved_recipe", "to_mapping",
]  # fmt: skip

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Validations, every train.validate_every steps: they score the sub-network decided so far as if it were cut."""

    limit: int = option(64, "Most items that a validation scores of valid, and of data.guard.", ge=1)
    accuracy: bool = option(False, "Also score accuracy on rows of valid that have choices; implied by a limit on it.")
    share: float = option(
        1.0, "Largest share of the tuning time that validations may take; beyond it, some are skipped. 1: none.",
        gt=0, le=1,
    )  # fmt: skip
    back_off: float = option(0.05, "Share that each back-off of a limit adds to the budget.", gt=0, le=1)
    back_to: Literal["last", "best"] = option(
        "last",
        "Where roll-back returns to: the last validation within all limits, or the best on valid of the smallest such.",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """The scores at the end of a run."""

    limit: int = option(200, "Most test items per task; 0: all.", ge=0)
    generate_limit: int = option(
        50, "Most test items per task whose answers are generated (ROUGE-L, exact match, samples); 0: none.", ge=0
    )
    max_new_tokens: int = option(128, "Longest generated answer in tokens.", ge=1)
    max_tokens: int = option(16384, "Most tokens in one scoring pass.", ge=1)
    dense_tuned: bool = option(
        True, "Also tune the dense model (same data and steps, lora.dense_rank) for comparison; kept in the run folder."
    )
    drift: bool = option(
        True,
        "Measure how far the pruned and the dense tuned model moved from the untuned one on 48 general prompts of "
        "prunetune's own: KL, token agreement, requests still declined. Costs at most 48 short answers of the untuned "
        "model, a pass over them by each other one, and loading each once more.",
    )


@dataclass(frozen=True, kw_only=True)
class RequireConfig:
    """What the pruned model has to gain over the dense one, in interleaved measurements; else the exit code is 1."""

    smaller: float = option(
        0.0, "Smallest share of all parameters, with embeddings, that must be removed; 0: no requirement.", ge=0, le=1
    )
    faster: float = option(0.0, "Smallest speed-up over the dense model, such as 1.3; 0: no requirement.", ge=0)
    speed: Literal["throughput", "prefill", "decode"] = option(
        "throughput", "The speed that counts: tokens per second over prompt and answer, or over one of the two."
    )
    prompt: int = option(512, "Tokens of the prompt; fewer if the model's context is shorter.", ge=1)
    generate: int = option(64, "Tokens generated.", ge=2)
    batch: int = option(1, "Prompts in one batch.", ge=1)
    runs: int = option(7, "Measured rounds, after one warm-up.", ge=1)

    @property
    def has_requirements(self) -> bool:
        """Whether a run can fail by these requirements."""
        return bool(self.smaller or self.faster)


StoredFormat = Literal["q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_0", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What reports, scores, logs and errors show of rows of data; see docs/guides/security.md."""

    samples: Literal["on", "off"] = option(
        "on", "Show rows and answers to them; off: nothing that is written or logged holds a text or an id of a row."
    )
    redact: tuple[str, ...] = option(
        (),
        r"Regular expressions, such as '\b\d{3}-\d{2}-\d{4}\b': what they match is [redacted] wherever rows are shown.",
        parse=parse_pattern,
        entry_name="pattern",
    )

    @property
    def redaction(self) -> Redaction:
        """What decides it, for all that shows rows."""
        return Redaction(self.samples == "on", self.redact)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What `prunetune compare` compares: all with the same data, steps and budget."""

    methods: tuple[str, ...] = option(
        (  # a baseline that is added later is named, so that the default comparison costs what it did
            "dense", "dense-equal-help", "wanda-sp", "taylor", "fisher", "gate-gradients", "obs", "progressive",
        ),
        "dense: tuned by LoRA, not pruned; dense-equal-help: the same with the recipe's help; untuned: the dense model "
        "as loaded; progressive: the recipe; a baseline: its plan, then tuning (also random, magnitude, flap, "
        "block-influence, generator, evolution); or a name from compare.variants (all of them if none is named).",
        entry_name="name",
    )  # fmt: skip
    help: Literal["equal", "as-published"] = option(
        "equal",
        "What baselines are tuned with. equal: the recipe's teacher, texts, weights, optimizer and rank; as-published: "
        "no teacher, adapters of rank lora.dense_rank by AdamW.",
    )
    keeps: tuple[float, ...] = option((), "Values of budget.keep; default: that of the recipe.", gt=0, le=1)
    seeds: tuple[int, ...] = option((0,), "Seeds of tuning and pruning; splits are those of the recipe's seed.", ge=0)
    learning_rates: tuple[float, ...] = option(
        (),
        "Learning rates; default: train.learning_rate. Of several, each method gets its best, chosen on valid; "
        "train.weights_rate, if it is set, is scaled by the same factor.",
        gt=0,
    )
    split: Literal["test", "valid"] = option("test", "The split that is scored.")
    variants: str = option("", "A YAML file of further methods: name -> changes of the recipe.", is_path=True)
    recipes: tuple[str, ...] = option(
        (),
        "Further recipes of the same model, data and budget, each a method with the name of its file; also named after "
        "the first: `prunetune compare a.yaml b.yaml`.",
        entry_name="recipe",
        is_path=True,
    )
    rivals: tuple[str, ...] = option(
        (),
        "Other models, such as a smaller one of the family, tuned on the same data by LoRA and not pruned, as rows of "
        "their own. Their losses are given per token of the model's tokenizer.",
        entry_name="model",
        is_path=True,
    )
    formats: tuple[StoredFormat, ...] = option(
        (),
        "Types of a .gguf file, such as q8_0 or q4_k_m, or int8 and int4 of `export --quantize`: dense and progressive "
        "models are also scored with the weights that such a file would hold, as rows of their own.",
        entry_name="name",
    )
    keep_best: bool = option(
        False,
        "Keep the model of the smallest weights within compare.within of the dense tuned model's loss, as the run "
        "folder best/, and its file if it is in a format; also `prunetune compare RECIPE --keep-best`.",
    )
    within: float = option(0.02, "How much above the dense tuned model's loss, as a share, is as good.", ge=0)
    measure: bool = option(
        False,
        "At the end, time all models of the table in turns, one prompt at a time (require.prompt, require.generate, "
        "require.runs). They are all written to disk and opened at once, so leave it off for large grids.",
    )
    jobs: int = option(1, "Runs at the same time, each on its own CUDA stream; 1 on other devices.", ge=1)

    def __post_init__(self) -> None:
        check_distinct_names("compare.keeps", self.keeps)
        check_distinct_names("compare.learning_rates", self.learning_rates)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options of a whole run; model and data in, smaller model and report out."""

    model: str = option(
        "demo",
        "A folder, a hub name (owner/name, owner/name@revision), a .gguf file, or 'demo' (SmolLM2-135M-Instruct from a "
        "package).",
        is_path=True,
    )
    out: str = option("runs/latest", "The run folder to make.")
    seed: int = option(0, "Seed of everything random.", ge=0)
    deterministic: bool = option(
        False, "Use deterministic kernels: the same seed gives the same bits on the same machine, on a GPU too; slower."
    )
    layout: Literal["per-layer", "uniform"] = option(
        "per-layer", "per-layer: widths differ by layer; uniform: one width, a stock architecture."
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Arithmetic of the frozen weights; adapters are always float32. In float16 small gradients of large batches "
        "vanish: losses are not scaled.",
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    limits: tuple[str, ...] = option(
        (),
        "Limits on the scores of every validation, and the action if one is broken (stop, back-off, roll-back), "
        "such as 'guard.nll <= 1.2x -> roll-back'; x: times the dense model's.",
        parse=normalize_limit,
        entry_name="limit",
        formerly="gates",
    )
    report_to: tuple[str, ...] = option(
        (),
        "Trackers that every step is logged to: tensorboard, wandb, mlflow, trackio; each is a package.",
        entry_name="tracker",
        formerly="track",
    )
    data: DataConfig = section(DataConfig)
    budget: BudgetConfig = section(BudgetConfig)
    workload: WorkloadConfig = section(WorkloadConfig)
    train: TrainConfig = section(TrainConfig)
    lora: LoraSettings = section(LoraSettings)
    search: SearchConfig = section(SearchConfig)
    distill: DistillConfig = section(DistillConfig)
    validate: ValidateConfig = section(ValidateConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)
    require: RequireConfig = section(RequireConfig, formerly="gain")
    report: ReportConfig = section(ReportConfig)
    compare: CompareConfig = section(CompareConfig)

    def __post_init__(self) -> None:
        if self.data.distill_texts and self.distill.teacher == "none":
            raise ConfigError(
                "data.distill_texts needs a teacher to match: "
                "set distill.teacher to base or dense, or leave data.distill_texts out"
            )
        guard_limits = [limit for limit in self.limits if limit.startswith("guard.")]
        if guard_limits and not self.data.guard:
            raise ConfigError(f"limits: {guard_limits[0]!r} needs something to score: name texts or rows in data.guard")
        unknown = [name for name in self.report_to if name not in TRACKERS]
        if unknown:
            raise ConfigError(f"report_to: unknown tracker {unknown[0]!r}; known are {', '.join(TRACKERS)}")
        if self.search.share + self.search.settle > 1:
            raise ConfigError(
                f"search.share + search.settle is {self.search.share + self.search.settle:g}: "
                "together they may be 1 at most; lower one of them"
            )
        if self.budget.sizes:
            self._validate_sizes()
        if self.budget.quality_of and not self.budget.quality:
            raise ConfigError("budget.quality_of says what budget.quality is of: set budget.quality, such as 0.98")
        if self.budget.has_quality and self.search.method == "generator":
            raise ConfigError("budget.quality is found cut by cut: leave search.method at progressive")

    def _validate_sizes(self) -> None:
        """Raise `ConfigError` for options that exclude several sizes."""
        more, shares = len(self.budget.sizes), self.train.size_share
        if self.budget.has_quality:
            raise ConfigError("budget.quality finds one size itself: leave budget.sizes out, or budget.quality")
        if not 0 < len(shares) <= more:
            raise ConfigError(f"train.size_share has {len(shares)} numbers for {more} further sizes: give 1 to {more}")
        moving = [limit for limit in self.limits if not limit.endswith("-> stop")]
        if moving:
            raise ConfigError(
                f"limits: {moving[0]!r} would move the budget, and several sizes (budget.sizes) fix it: "
                "let it stop, or name one size"
            )


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """The config as plain values that can be written as YAML; `from_mapping` reads them."""

    def with_lists(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in pairs}

    return dataclasses.asdict(config, dict_factory=with_lists)


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a YAML recipe, in which `overrides` (nested, as the recipe) replaces values; raises `ConfigError`.

    Relative paths of the recipe start from its folder, those of `overrides` from the working folder.
    """
    values = read_yaml(path, "the recipe", "name a YAML file, see recipes/, or with --resume a run folder") or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe maps keys to values, this is a {type(values).__name__}; see recipes/")
    values, overrides = (with_current_names(RunConfig, mapping) for mapping in (values, overrides or {}))
    values = start_from_recipe(RunConfig, values, path, has_root=_has_root(values) or _has_root(overrides))
    return from_mapping(merge_options(values, overrides), where=str(path))


def merge_options(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a recipe in which `overrides` replaces values; its steps or epochs replace either of the two."""
    train, changes = values.get("train"), overrides.get("train")
    if isinstance(train, Mapping) and isinstance(changes, Mapping) and {"steps", "epochs"} & changes.keys():
        values = {**values, "train": {name: train[name] for name in train if name not in ("steps", "epochs")}}
    return merge_mappings(values, overrides)


def load_saved_recipe(file: Path) -> RunConfig:
    """Read the recipe that a run folder keeps, with paths as the working folder sees them; raises `ConfigError`."""
    values = read_yaml(file, "this run's recipe", "put it back, or name another run") or {}
    values = with_current_names(RunConfig, values, quiet=True)
    if isinstance(values, Mapping):
        values = start_from_recipe(RunConfig, values, file, has_root=_has_root(values))
    return from_mapping(values, where=str(file))


def _has_root(values: Mapping[str, Any]) -> bool:
    return isinstance(values.get("data"), Mapping) and bool(values["data"].get("root"))


def from_mapping(values: Mapping[str, Any], *, where: str = "recipe") -> RunConfig:
    """Check keys, types and bounds, and build the config; raises `ConfigError` with the offending key's path."""
    budget = values.get("budget") if isinstance(values, Mapping) else None
    if isinstance(budget, Mapping):
        values = {**values, "budget": with_keep(budget, where)}
    return read_options(RunConfig, values, where=where)
