"""The backend of an OpenAI-compatible endpoint, so that the deployed model is the one that is tested."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prunetune.data.encoding import raw_prompt, uses_chat_template
from prunetune.data.records import Message, Record
from prunetune.evaluation.suites.http_client import EndpointClient
from prunetune.evaluation.suites.local import truncate_at_stop
from prunetune.evaluation.suites.protocol import BackendError, GenerationSettings, OnRequestsDone, RequestKind


@dataclass(frozen=True)
class Endpoint:
    """Any server generates answers; likelihoods need one that returns the log-probabilities of a prompt."""

    client: EndpointClient
    model: str
    fingerprint: str = ""  # a server can change its model under the same name

    @property
    def name(self) -> str:
        """The address without secrets, and the model's name there."""
        return f"{self.client.address} {self.model}".strip()

    def model_and_tokenizer(self) -> tuple[Any, Any]:
        """Raises `BackendError`: the weights are not in this process."""
        raise BackendError(f"{self.name}: lm-eval tasks need the weights in this process; name a model folder")

    def run_requests(
        self, kind: RequestKind, records: Sequence[Record], settings: GenerationSettings, tick: OnRequestsDone
    ) -> list[Any]:
        """See `Backend`; the first request whose retries are used up ends the task."""
        asks = {"loglikelihood": self._loglikelihood, "generate": self._generate, "nll": self._nll}

        def answered(record: Record) -> Any:
            answer = asks[kind](record, settings)
            tick(1)
            return answer

        return self.client.map_concurrently(records, answered)

    def _generate(self, record: Record, settings: GenerationSettings) -> str:
        options: dict[str, Any] = {"max_tokens": settings.max_new_tokens}
        options |= {"stop": list(settings.stop)} if settings.stop else {}
        if uses_chat_template(record, settings.template):
            messages = record.messages or (Message("user", record.prompt),)
            options |= {"tools": json.loads(record.tools)} if record.tools else {}
            answer = self.client.chat(self.model, [message.as_dict() for message in messages], **options)
        else:
            answer = self.client.complete(self.model, raw_prompt(record), **options)
        return truncate_at_stop(answer, settings.stop)

    def _loglikelihood(self, record: Record, settings: GenerationSettings) -> list[list[float]]:
        prompt = self._raw_prompt(record, settings)
        return [
            [-nats, tokens] for nats, tokens, _ in (self._continuation_nll(prompt, choice) for choice in record.choices)
        ]

    def _nll(self, record: Record, settings: GenerationSettings) -> list[float]:
        prompt = "" if record.kind == "text" else self._raw_prompt(record, settings)
        return list(self._continuation_nll(prompt, record.completion))

    def _raw_prompt(self, record: Record, settings: GenerationSettings) -> str:
        if uses_chat_template(record, settings.template):
            raise BackendError(
                f"{self.name}: an endpoint hides its chat template, so it cannot give the likelihoods of a chat; "
                "set template: raw, or test the model folder"
            )
        return raw_prompt(record)

    def _continuation_nll(self, prompt: str, text: str) -> tuple[float, int, int]:
        """NLL in nats, tokens and bytes of `text` after `prompt`; the server's first token has no likelihood."""
        body = {"model": self.model, "prompt": prompt + text, "max_tokens": 1, "temperature": 0, "logprobs": 1}
        reply = self.client.post("/completions", {**body, "echo": True})
        end = len(prompt + text)
        try:
            choice = reply["choices"][0]
            if not choice["text"].startswith(prompt + text):
                raise ValueError("the prompt is not echoed")
            pairs = zip(choice["logprobs"]["token_logprobs"], choice["logprobs"]["text_offset"], strict=True)
            in_text = [pair for pair in pairs if pair[0] is not None and len(prompt) <= pair[1] < end]
            scored = [(float(value), int(offset)) for value, offset in in_text]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as unusable:
            raise BackendError(
                f"{self.name}: likelihoods are not possible here, because the server does not give the "
                "log-probabilities of a prompt (completions with echo and logprobs); test the model folder, or score "
                "generated answers"
            ) from unusable
        if not scored:
            shown = repr(text[:40])
            raise BackendError(f"{self.name}: no token of {shown} starts after its prompt", quoted=shown)
        size = len((prompt + text)[scored[0][1] :].encode())
        return -sum(value for value, _ in scored), len(scored), size
