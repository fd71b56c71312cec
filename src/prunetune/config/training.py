"""The options of the sections train, lora, distill and search; data.py has those of data, recipe.py all others."""

from dataclasses import dataclass
from typing import Any, Literal

from prunetune.config.fields import option, parse_number
from prunetune.errors import ConfigError
from prunetune.utils.untrusted import short_repr


def parse_learning_rate(value: Any, name: str) -> float:
    """A learning rate, or 0 for auto; raises `ConfigError`."""
    rate = 0.0 if value == "auto" else parse_number(value, name)
    if rate < 0:
        raise ConfigError(f"{name} must lie in [0, inf), where 0 is auto, got {short_repr(value)}")
    return rate


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The tuning of the weights; options are named as in transformers' TrainingArguments if they mean the same."""

    steps: int = option(700, "Steps in all; the model is pruned within them.", ge=1)
    epochs: float = option(
        0.0,
        "Passes over the rows of train, in place of train.steps, which then follow from rows and train.batch_size; a "
        "dry run says them, and the run folder keeps them.",
        ge=0,
    )
    batch_size: int = option(16, "Examples a step.", ge=1)
    micro_tokens: int = option(
        16384, "Most tokens, padding included, that one forward pass holds; larger batches are split.", ge=1
    )
    packing: Literal["auto", "off"] = option(
        "auto", "auto: examples are packed and passes recorded as CUDA graphs, if GPU and model allow it; off: padded."
    )
    compile: Literal["auto", "on", "off"] = option(
        "auto",
        "Compile norms, rotary embeddings and losses of recorded passes to single kernels: half a minute more at the "
        "start, a third less per step; auto: in runs of 1,000 steps or more, of 300 if at least 1e9 parameters can be "
        "pruned.",
    )
    checkpointing: Literal["auto", "on", "off"] = option(
        "auto",
        "Activation checkpointing: layers keep only their inputs and are computed again in the backward pass, a third "
        "slower in far less memory; auto: with lora.quantize, and if a single example runs out of GPU memory.",
    )
    size_share: tuple[float, ...] = option(
        (0.18,),
        "With several sizes (budget.sizes): steps of each size after the first, from where the larger one was cut, as "
        "a share of train.steps and in addition to them; the last number holds for all further sizes.",
        gt=0,
        le=1,
    )
    learning_rate: float = option(
        1e-3,
        "Peak learning rate of what is tuned. auto, or 0, tries 5e-4, 1e-3 and 2e-3 on a tenth of the steps each, and "
        "takes the one with the lowest loss on valid. It costs 30% more tuning time.",
        ge=0,
        parse=parse_learning_rate,
        flag_type=str,
    )
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "Optimizer of the adapters; Muon needs twice AdamW's learning rate."
    )
    weights: Literal["auto", "all", "adapters"] = option(
        "auto",
        "What is tuned after the cut: all weights of the linears (Muon, 12 bytes a weight), or the adapters; auto: all "
        "for models of fewer than 1e9 prunable parameters.",
    )
    weights_rate: float = option(0.0, "Peak learning rate of all weights; 0: train.learning_rate.", ge=0)
    warmup: float = option(0.03, "Share of the steps with a rising learning rate.", ge=0, le=1)
    decay: Literal["cosine", "linear", "constant"] = option("cosine", "Shape of the learning rate after its warm-up.")
    decay_to: float = option(0.1, "Final learning rate, as a share of its peak.", ge=0, le=1)
    weight_decay: float = option(0.0, "Decoupled weight decay of the adapters with AdamW; Muon has none.", ge=0)
    clip: float = option(1.0, "Largest gradient norm; longer gradients are scaled down to it.", gt=0)
    max_skipped: int = option(
        5, "Most batches with a loss or gradient that is not finite; each is skipped and halves learning rates.", ge=0
    )
    checkpoint_every: int = option(100, "Steps between checkpoints; one is also written at the end of a phase.", ge=1)
    validate_every: int = option(100, "Steps between validations of the decided sub-network.", ge=1)
    keep_best: bool = option(
        False,
        "Export the weights of the validation with the lowest loss on valid after the last cut, not those of the last "
        "step; limits then roll back to it, too.",
    )
    patience: int = option(
        0,
        "Stop after so many validations in a row, after the last cut, without a lower loss on valid; 0: never. Set "
        "train.keep_best, too, to export the best of them.",
        ge=0,
    )
    log_every: int = option(10, "Steps between lines of a plain log.", ge=1)

    def __post_init__(self) -> None:
        if self.epochs and self.steps != TrainConfig.steps:
            raise ConfigError(
                f"train.steps {self.steps} and train.epochs {self.epochs:g} both say how long to tune: leave one out"
            )


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The adapters, on all linears of attention and MLP."""

    rank: int = option(128, "Rank of the adapters. Recovery after pruning needs a higher one than plain tuning.", ge=1)
    dense_rank: int = option(32, "Rank of the dense model's adapters, if tuned for comparison or as a teacher.", ge=1)
    dense_learning_rate: float = option(5e-4, "Peak learning rate of the dense model's adapters.", gt=0)
    alpha: float = option(0.0, "Scale alpha / rank; 0: twice the rank.", ge=0)
    dropout: float = option(0.0, "Dropout on the adapters' input.", ge=0, le=0.9)
    quantize: Literal["off", "nf4"] = option(
        "off", "Format of the frozen linears under the adapters: as loaded, or 4 bits (QLoRA; needs bitsandbytes)."
    )


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Knowledge distillation: a teacher whose outputs the student matches token by token, in all that is minimised."""

    teacher: Literal["auto", "none", "base", "dense"] = option(
        "auto",
        "base: the untuned dense model, on tokens without a label; dense: the dense model, first tuned with the same "
        "data and steps. auto: dense for models of fewer than 1e9 prunable parameters, else base, which needs neither "
        "tuning time nor memory.",
    )
    logits: float = option(20.0, "Weight of KL(teacher || student) over next tokens, mean over tokens.", ge=0)
    hidden: float = option(
        10.0, "Weight of the relative squared error of hidden states, mean over layers and tokens.", ge=0
    )
    share: float = option(
        0.0,
        "Share of a batch's examples that are distilled, those without a label first. 0: all for models of fewer than "
        "1e9 prunable parameters, else half, so that a step after the cut costs less than a step of the dense model.",
        ge=0,
        le=1,
    )


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """When units are removed, and what decides which; the generator's defaults are those of ATP's authors' code."""

    method: Literal["progressive", "generator"] = option(
        "progressive",
        "progressive: several cuts while the model tunes, each decided by scores on the weights as they then are; "
        "generator: one cut, decided by a generator that is trained beside the adapters (ATP).",
    )
    cuts: int = option(
        4, "Number of cuts (progressive); each removes an equal share of what the budget asks for.", ge=1
    )
    span: float = option(0.2, "Share of the steps over which the cuts are spread, from step 0 on.", gt=0, le=1)

    init_batches: int = option(
        16, "Batches of search whose gate gradients give the scores of a cut (progressive).", ge=1, formerly="evidence"
    )
    attention_weight: float = option(
        0.33,
        "Multiplies the scores of attention (KV groups, query heads, attention blocks) before all units are ranked "
        "(progressive). Below 1 attention goes earlier: tuning makes up for more of it, and the KV cache shrinks.",
        gt=0,
    )
    share: float = option(0.1, "Share of the steps in which the generator searches.", gt=0, le=1)
    settle: float = option(
        0.05,
        "Share of the steps, after the generator's search, in which the adapters of removed units shrink to zero.",
        ge=0,
        le=1,
    )
    learning_rate: float = option(
        1e-3, "Learning rate of the generator (AdamW); a fifth of it in the last fifth of the search.", gt=0
    )
    batch_size: int = option(16, "Examples in a batch that a decision is made on.", ge=1)
    ratio_weight: float = option(5.0, "Weight of |log(kept / target)| in the generator's loss.", ge=0)
    temperature: float = option(0.4, "Temperature of the gates' sigmoid.", gt=0)
    offset: float = option(3.0, "Added to every logit, so that training starts dense.")
    sparsity: Literal["lasso", "off"] = option(
        "lasso", "Of removed units' adapters: a group lasso in the loss, or nothing."
    )
