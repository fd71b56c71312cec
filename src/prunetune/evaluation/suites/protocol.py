"""The interface between scorers and models: requests, responses, and the backends that answer them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from prunetune.data.records import Record
from prunetune.errors import PrunetuneError

# loglikelihood: of every choice; generate: an answer; nll: of a text, or of the right answer.
RequestKind = Literal["loglikelihood", "generate", "nll"]
OnRequestsDone = Callable[[int], None]  # called with how many more requests are done


class BackendError(PrunetuneError):
    """A backend cannot answer this kind of request, or does not answer."""


@dataclass(frozen=True)
class GenerationSettings:
    """Prompt template, length and stop texts, the same for all requests of a task."""

    template: Literal["auto", "chat", "raw"] = "auto"
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()  # a generated answer ends before the first of these


class Backend(Protocol):
    """A model under test: weights in this process, or a server."""

    @property
    def name(self) -> str:
        """Its name in reports and errors."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever answers could; "" where that cannot be known, so that no answer may be cached."""

    def run_requests(
        self, kind: RequestKind, records: Sequence[Record], settings: GenerationSettings, tick: OnRequestsDone
    ) -> list[Any]:
        """One value for each record, in order, of types that JSON can hold.

        loglikelihood: [[log-likelihood in nats, tokens] of each choice]; generate: the text; nll: [negative
        log-likelihood in nats, tokens, UTF-8 bytes] of the answer or text. Raises `BackendError`.
        """

    def model_and_tokenizer(self) -> tuple[Any, Any]:
        """Model and tokenizer, for lm-eval; raises `BackendError` where the weights are not in this process."""


@dataclass(frozen=True)
class Prompt:
    """One record as the model sees it, with the fields of its row."""

    record: Record
    choice_texts: tuple[str, ...]  # the choices as people read them; those of `record` may be letters
    fields: Mapping[str, Any]

    @property
    def expected(self) -> str:
        """The right answer as people read it; "" where there is none."""
        return self.record.completion if self.record.answer is None else self.choice_texts[self.record.answer]


@dataclass(frozen=True)
class Response:
    """The model's answer to one prompt: the text or choice, or its NLL."""

    prompt: Prompt
    text: str = ""
    correct: bool | None = None  # of a choice; None where a likelihood is nan
    nll: float = 0.0  # negative log-likelihood
    n_tokens: int = 0
    n_bytes: int = 0
