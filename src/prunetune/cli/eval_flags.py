"""The flags by which `eval` and `check` open and ask a model; nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

if TYPE_CHECKING:
    from prunetune.evaluation.suites.open_model import BackendOptions
    from prunetune.evaluation.suites.suite import Suite


@dataclass(frozen=True, kw_only=True)
class EvalFlags:
    """How the model is opened, and what a suite may do."""

    root: Annotated[Path | None, Parameter(help="Where the suite's relative sources start; default: as it says.")] = (
        None
    )
    device: Annotated[str, Parameter(help="auto, cpu, cuda, cuda:1, mps.")] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: Annotated[bool, Parameter(negative=(), help="Run code that comes with the model.")] = False
    max_tokens: Annotated[int, Parameter(help="Most tokens of one scoring pass.")] = 16384
    cache: Annotated[bool, Parameter(help="Keep answers, by model and item, and do not ask again.")] = True
    model_name: Annotated[str, Parameter(help="The model's name at the endpoint.")] = ""
    key_env: Annotated[str, Parameter(help="The environment variable with the endpoint's key.")] = ""
    timeout: Annotated[float, Parameter(help="Seconds for one reply of an endpoint.")] = 60.0
    allow_code: Annotated[bool, Parameter(negative=(), help="Let the suite run Python functions of this machine.")] = (
        False
    )
    allow_judge: Annotated[bool, Parameter(negative=(), help="Let the suite send answers to a judge's endpoint.")] = (
        False
    )

    def open_suite(self, path: Path) -> Suite:
        """The suite; a task that cannot be run keeps its fault."""
        from prunetune.evaluation.suites.suite import load_suite

        return load_suite(path, strict=False, root=self.root)

    def target_options(self) -> BackendOptions:
        """The same for `prunetune.evaluation.suites`."""
        from prunetune.evaluation.suites.open_model import BackendOptions

        return BackendOptions(
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            max_tokens=self.max_tokens,
            cache=self.cache,
            model_name=self.model_name,
            key_env=self.key_env,
            timeout=self.timeout,
        )

    def allowed_features(self) -> set[Literal["code", "judge"]]:
        """What the suite may do beside asking the model."""
        told: dict[Literal["code", "judge"], bool] = {"code": self.allow_code, "judge": self.allow_judge}
        return {name for name, yes in told.items() if yes}

    @contextmanager
    def progress_console(self) -> Iterator[Callable[[str, int, int], None]]:
        """A console that hears how far an evaluation has come."""
        from prunetune.utils.console import make_console

        console = make_console(1)
        console.stage("evaluate", 1)
        try:
            yield console.evaluation_progress
        finally:
            console.close()


DEFAULT_EVAL_FLAGS = EvalFlags()
