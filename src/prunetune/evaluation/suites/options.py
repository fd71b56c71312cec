"""The options of `prunetune eval` and `prunetune check`; their flags are derived from these fields.

Nothing heavy is imported: the command line reads this module for `--help`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prunetune.config.fields import option
from prunetune.config.recipe import ReportConfig

if TYPE_CHECKING:
    from prunetune.evaluation.suites.scorers import Permission
    from prunetune.evaluation.suites.suite import Suite


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ReportConfig):
    """How a suite is read, how a model is opened and asked, and what scorers may do. A new field is a new flag."""

    root: str = option("", "Folder that the suite's relative sources start from; default: as the suite says.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Arithmetic of a model that transformers opens; auto: bfloat16 where the hardware has it, else float32."
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    max_tokens: int = option(16384, "Most tokens in one scoring pass.", ge=1)
    cache: bool = option(True, "Keep answers by model and item, and reuse them instead of asking again.")
    model_name: str = option("", "The model's name at the endpoint.")
    key_env: str = option("", "The environment variable with the endpoint's key.")
    timeout: float = option(60.0, "Seconds to wait for one reply of an endpoint.", gt=0)
    allow_code: bool = option(False, "Let the suite run Python functions, and your own lm-eval tasks, of this machine.")
    allow_judge: bool = option(False, "Let the suite send answers to a judge's endpoint.")

    @property
    def permissions(self) -> frozenset[Permission]:
        """What scorers may do besides comparing texts."""
        allowed: dict[Permission, bool] = {"code": self.allow_code, "judge": self.allow_judge}
        return frozenset(name for name, is_allowed in allowed.items() if is_allowed)

    def open_suite(self, suite: Suite | Path | str) -> Suite:
        """The suite in a file; a task that cannot be run keeps its `error`. Raises `ConfigError` for all else."""
        from prunetune.evaluation.suites.suite import Suite, load_suite

        return suite if isinstance(suite, Suite) else load_suite(suite, strict=False, root=self.root or None)


@dataclass(frozen=True, kw_only=True)
class CheckOptions(EvalOptions):
    """The options of `eval`, and those that only `check` has."""

    against: str = option(
        "", "The reference model, named as MODEL is; default: the run's dense tuned model, or its untuned one."
    )
