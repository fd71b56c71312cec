"""A model behind an OpenAI-compatible endpoint, so that what is deployed is what is tested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from prunetune.data.records import Record
from prunetune.data.templates import is_chat
from prunetune.evaluation.suites.http_client import Server
from prunetune.evaluation.suites.local import ended
from prunetune.evaluation.suites.protocol import Ask, CannotAnswer, Manner, Tick


@dataclass(frozen=True)
class Endpoint:
    """Written answers come from any server; likelihoods only from one that gives the log-probabilities of a prompt."""

    server: Server
    model: str
    fingerprint: str = ""  # what a server serves may change under the same name

    @property
    def name(self) -> str:
        """The address, and the model's name there."""
        return f"{self.server.url} {self.model}".strip()

    def loaded(self) -> tuple[Any, Any]:
        """Never: the weights are elsewhere."""
        raise CannotAnswer(f"{self.name}: lm-eval tasks need the weights in this process; name a model folder")

    def answers(self, ask: Ask, records: Sequence[Record], manner: Manner, tick: Tick) -> list[Any]:
        """See `Respondent`; the first request that fails for good ends the task."""
        one: Callable[[Record, Manner], Any] = {"choose": self._choose, "write": self._write, "weigh": self._weigh}[ask]

        def answered(record: Record) -> Any:
            answer = one(record, manner)
            tick(1)
            return answer

        return self.server.each(records, answered)

    def _write(self, record: Record, manner: Manner) -> str:
        stop = {"stop": list(manner.stop)} if manner.stop else {}
        send = partial(self._chat if is_chat(record, manner.template) else self._complete, record)
        return ended(send(max_tokens=manner.max_new_tokens, **stop), manner.stop)

    def _chat(self, record: Record, **options: Any) -> str:
        messages = record.messages or (("user", record.prompt),)
        turns = [{"role": role, "content": content} for role, content in messages]
        return self.server.chat(self.model, turns, **options)

    def _complete(self, record: Record, **options: Any) -> str:
        return self.server.complete(self.model, self._prompt(record), **options)

    def _choose(self, record: Record, manner: Manner) -> list[list[float]]:
        prompt = self._plain(record, manner)
        return [[-nats, tokens] for nats, tokens, _ in (self._continued(prompt, choice) for choice in record.choices)]

    def _weigh(self, record: Record, manner: Manner) -> list[float]:
        prompt = "" if record.kind == "text" else self._plain(record, manner)
        return list(self._continued(prompt, record.completion))

    def _plain(self, record: Record, manner: Manner) -> str:
        if is_chat(record, manner.template):
            raise CannotAnswer(
                f"{self.name}: likelihoods of a chat are not to be had from an endpoint, which hides its chat "
                "template; set template: raw, or test the model folder"
            )
        return self._prompt(record)

    def _prompt(self, record: Record) -> str:
        if record.kind != "chat":
            return record.prompt
        return "".join([*(f"{role}: {content}\n" for role, content in record.messages), "assistant:"])

    def _continued(self, prompt: str, text: str) -> tuple[float, int, int]:
        """NLL in nats, tokens and bytes of `text` after `prompt`; the server's first token has no likelihood."""
        body = {"model": self.model, "prompt": prompt + text, "max_tokens": 1, "temperature": 0, "logprobs": 1}
        reply = self.server.post("/completions", {**body, "echo": True})
        try:
            found = reply["choices"][0]
            values, offsets = found["logprobs"]["token_logprobs"], found["logprobs"]["text_offset"]
            echoed = found["text"].startswith(prompt + text) and len(values) == len(offsets)
        except (KeyError, IndexError, TypeError, AttributeError) as missing:
            raise self._no_likelihood() from missing
        if not echoed:
            raise self._no_likelihood()
        whole = len(prompt + text)
        scored = [
            (float(value), int(offset))
            for value, offset in zip(values, offsets, strict=True)
            if value is not None and len(prompt) <= offset < whole
        ]
        if not scored:
            raise CannotAnswer(f"{self.name}: no token of {text[:40]!r} stands by itself after its prompt")
        size = len((prompt + text)[scored[0][1] :].encode())
        return -sum(value for value, _ in scored), len(scored), size

    def _no_likelihood(self) -> CannotAnswer:
        return CannotAnswer(
            f"{self.name}: likelihoods are not possible here, because the server does not give the log-probabilities "
            "of a prompt (completions with echo and logprobs); test the model folder, or use scorers of written answers"
        )
