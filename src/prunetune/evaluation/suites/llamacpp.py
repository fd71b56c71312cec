"""The backend of a .gguf file: the llama.cpp server that comes with the package xllamacpp."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from prunetune.data.encoding import uses_chat_template
from prunetune.data.records import Record
from prunetune.errors import ModelError
from prunetune.evaluation.suites.endpoint import Endpoint
from prunetune.evaluation.suites.http_client import EndpointClient
from prunetune.evaluation.suites.protocol import BackendError, GenerationSettings, OnRequestsDone, RequestKind
from prunetune.utils.failures import first_line
from prunetune.utils.optional import import_optional

ERRORS_ONLY = 1  # log level; by default llama.cpp logs several lines a reply
FORCED = 1e4  # added to the logit of a forced token; the reported log-probability does not include it


def start_server(
    file: Path, *, context: int = 0, slots: int = 1, threads: int = 0, on_cpu: bool = False,
    host: str = "127.0.0.1", port: int = 0,
) -> Any:  # fmt: skip
    """Start llama.cpp's server on a file; port 0 is any that is free. Raises `ModelError`.

    `context` is in tokens of all slots together, 0: the model's own. `threads`, 0: as many as PyTorch uses, since
    llama.cpp counts the machine's cores and not the container's.
    """
    llama = import_optional("xllamacpp", extra="llamacpp", use=f"model {file}")
    params = llama.CommonParams()
    params.model.path, params.verbosity = str(file), ERRORS_ONLY
    params.hostnames, params.port, params.model_alias = [host], port, {file.stem}
    params.n_ctx, params.n_parallel = context, slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or torch.get_num_threads()
    if on_cpu:
        params.n_gpu_layers = 0
    try:
        return llama.Server(params)
    except Exception as broken:  # llama.cpp's errors have no type of their own
        raise ModelError(f"model {file}: llama.cpp cannot open it ({first_line(broken)}); check the file") from broken


@dataclass(frozen=True)
class LlamaCpp:
    """A .gguf file, opened at the first request.

    Likelihoods are computed one forced token at a time: the server returns no log-probabilities of a prompt, but that
    of every token it generates.
    """

    file: Path
    fingerprint: str
    context: int = 0  # tokens; 0: the model's own
    timeout: float = 600.0

    @property
    def name(self) -> str:
        """The file."""
        return str(self.file)

    def model_and_tokenizer(self) -> tuple[Any, Any]:
        """Raises `BackendError`: the weights are in llama.cpp."""
        raise BackendError(f"{self.name}: lm-eval tasks need the weights in this process; name a model folder")

    def run_requests(
        self, kind: RequestKind, records: Sequence[Record], settings: GenerationSettings, tick: OnRequestsDone
    ) -> list[Any]:
        """See `Backend`."""
        if kind == "generate":
            return Endpoint(self._client("/v1"), "").run_requests(kind, records, settings, tick)
        answers: list[Any] = []
        for record in records:
            if record.kind == "text" or uses_chat_template(record, settings.template):
                raise BackendError(
                    f"{self.name}: llama.cpp's server gives no likelihood of texts and chats; "
                    "test the folder that the file was made from, or score generated answers"
                )
            prompt, text = self._tokens(record.prompt, special=True), record.completion
            if kind == "loglikelihood":
                scored = [self._forced_nll(prompt, choice) for choice in record.choices]
                answers.append([[-nats, tokens] for nats, tokens in scored])
            else:
                answers.append([*self._forced_nll(prompt, text), len(text.encode())])
            tick(1)
        return answers

    @cached_property
    def _server(self) -> Any:
        return start_server(self.file, context=self.context)

    def _client(self, path: str = "") -> EndpointClient:
        return EndpointClient(f"{self._server.listening_address}{path}", timeout=self.timeout, concurrency=1)

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        reply = self._client().post("/tokenize", {"content": text, "add_special": special})
        return [int(token) for token in reply["tokens"]]

    def _forced_nll(self, prompt: Sequence[int], text: str) -> tuple[float, int]:
        """NLL in nats and number of tokens of a text, generated one forced token at a time."""
        written: list[int] = []
        total = 0.0
        for token in self._tokens(text, special=False):
            body = {"prompt": [*prompt, *written], "logit_bias": [[token, FORCED]], "cache_prompt": True}
            reply = self._client().post("/completion", body | {"n_predict": 1, "temperature": 0, "n_probs": 1})
            try:
                probability = reply["completion_probabilities"][0]
                total -= float(probability["logprob"])
            except (KeyError, IndexError, TypeError) as missing:
                raise BackendError(f"{self.name}: llama.cpp's server gives no log-probabilities") from missing
            if probability.get("id") != token:
                raise BackendError(f"{self.name}: llama.cpp's server generated another token than the forced one")
            written.append(token)
        if not written:
            shown = repr(text[:40])
            raise BackendError(f"{self.name}: choice {shown} has no tokens", quoted=shown)
        return total, len(written)
