"""What a model under test is asked, and whoever answers: weights in this process, or a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from prunetune.data.records import Record
from prunetune.errors import PrunetuneError

# loglikelihood: of every choice; generate: an answer; nll: of a text, or of the right answer.
RequestKind = Literal["loglikelihood", "generate", "nll"]
OnRequestsDone = Callable[[int], None]  # called with how many more requests are done


class BackendError(PrunetuneError):
    """A model or a server that cannot be asked this, or does not answer."""


@dataclass(frozen=True)
class GenerationSettings:
    """How the records of a task are asked, all the same."""

    template: Literal["auto", "chat", "raw"] = "auto"
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()  # a written answer ends before the first of these


class Backend(Protocol):
    """A model under test."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def fingerprint(self) -> str:
        """Changes when an answer could; "" where that cannot be known, and nothing may be kept."""

    def run_requests(
        self, kind: RequestKind, records: Sequence[Record], settings: GenerationSettings, tick: OnRequestsDone
    ) -> list[Any]:
        """One plain value a record, in order.

        loglikelihood: [[log-likelihood in nats, tokens] of each choice]; generate: the text; nll: [negative
        log-likelihood in nats, tokens, UTF-8 bytes] of the answer or text. Raises `BackendError`.
        """

    def model_and_tokenizer(self) -> tuple[Any, Any]:
        """Model and tokenizer, for lm-eval; raises `CannotAnswer` where there are none in this process."""


@dataclass(frozen=True)
class Prompt:
    """One record as it is asked, with what the row said beside."""

    record: Record
    choice_texts: tuple[str, ...]  # the choices as people read them: those of a lettered question are letters
    fields: Mapping[str, Any]

    @property
    def expected(self) -> str:
        """The right answer as people read it."""
        return self.record.completion if self.record.answer is None else self.choice_texts[self.record.answer]


@dataclass(frozen=True)
class Response:
    """One record with what came back."""

    prompt: Prompt
    text: str = ""
    correct: bool | None = None  # of a choice; None where a likelihood is nan
    nll: float = 0.0  # negative log-likelihood
    n_tokens: int = 0
    n_bytes: int = 0
