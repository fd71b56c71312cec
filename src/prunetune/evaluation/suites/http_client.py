"""The client of an OpenAI-compatible endpoint: requests with a deadline, retries, and one-line errors."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from prunetune.errors import ConfigError
from prunetune.evaluation.suites.protocol import BackendError

T = TypeVar("T")
R = TypeVar("R")
RETRY_STATUS_CODES = frozenset({408, 425, 429, 500, 502, 503, 504})
MAX_REPLY_BYTES = 64 * 2**20
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class EndpointClient:
    """An address with its deadline and retries. A request takes `max_attempts` times `timeout` at most, and delays."""

    url: str  # http://127.0.0.1:8000/v1
    key_env: str = ""  # the environment variable with the key
    timeout: float = 60.0  # seconds for one complete reply
    max_attempts: int = 3
    retry_delay: float = 0.5  # seconds before the second try; doubles
    concurrency: int = 4

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise ConfigError(f"endpoint {self.url!r} is no URL; write it as http://host:port/v1")
        if not self.timeout > 0:
            raise ConfigError(f"the timeout must be above 0 seconds, got {self.timeout:g}")

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], *, max_tokens: int, **options: Any) -> str:
        """The greedy reply to a chat; raises `BackendError`."""
        body = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0, **options}
        return self._read(self.post("/chat/completions", body), lambda choice: choice["message"]["content"] or "")

    def complete(self, model: str, prompt: str, *, max_tokens: int, **options: Any) -> str:
        """The greedy completion of a prompt; raises `BackendError`."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **options}
        return self._read(self.post("/completions", body), lambda choice: choice["text"])

    def _read(self, reply: Any, text: Callable[[Any], Any]) -> str:
        try:
            answer = text(reply["choices"][0])
        except (KeyError, IndexError, TypeError) as missing:
            raise self._unexpected_reply(reply) from missing
        if not isinstance(answer, str):
            raise self._unexpected_reply(reply)
        return answer

    def _unexpected_reply(self, reply: Any) -> BackendError:
        shown = " ".join(json.dumps(reply, default=str).split())[:120]
        return BackendError(f"endpoint {self.url} did not reply with a completion: {shown}")

    def map_concurrently(self, items: Sequence[T], call: Callable[[T], R]) -> list[R]:
        """`call` every every item, `concurrency` at once; results are in order. The first failure stops the rest."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                return list(pool.map(call, items))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON of the reply; raises `BackendError` after the last attempt."""
        failure = ""
        for attempt in range(self.max_attempts):
            if attempt:
                time.sleep(self.retry_delay * 2 ** (attempt - 1))
            try:
                return self._decoded(self._send(path, body))
            except urllib.error.HTTPError as refused:
                failure = f"HTTP {refused.code}: {_error_body(refused)}"
                if refused.code not in RETRY_STATUS_CODES:
                    break
            except TimeoutError:
                failure = f"no complete reply within {self.timeout:g} s"
            except (OSError, http.client.HTTPException) as broken:
                reason = getattr(broken, "reason", broken)
                failure = (
                    f"no complete reply within {self.timeout:g} s"
                    if isinstance(reason, TimeoutError)
                    else f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"
                )
        raise BackendError(f"endpoint {self.url}{path} does not answer ({failure}); is it up, and the address right?")

    def _send(self, path: str, body: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.key_env:
            headers["Authorization"] = f"Bearer {self._key()}"
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url.rstrip("/") + path, data, headers, method="POST")  # noqa: S310 - http(s), see above
        deadline = time.monotonic() + self.timeout
        chunks: list[bytes] = []
        with self._opener().open(request, timeout=self.timeout) as reply:
            # Each read has its own timeout, so a server that sends byte by byte needs the deadline.
            while chunk := reply.read1(2**16):
                chunks.append(chunk)
                if time.monotonic() > deadline or sum(map(len, chunks)) > MAX_REPLY_BYTES:
                    raise TimeoutError
        return b"".join(chunks)

    def _opener(self) -> urllib.request.OpenerDirector:
        # Requests to this machine do not go through a proxy of the environment.
        proxies: dict[str, str] | None = {} if urlsplit(self.url).hostname in LOOPBACK else None
        return urllib.request.build_opener(urllib.request.ProxyHandler(proxies))

    def _key(self) -> str:
        key = os.environ.get(self.key_env, "")
        if not key:
            raise BackendError(f"endpoint {self.url}: the environment variable {self.key_env} is not set")
        return key

    def _decoded(self, data: bytes) -> Any:
        try:
            return json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as garbage:
            shown = " ".join(data[:80].decode("utf-8", "replace").split())
            raise BackendError(f"endpoint {self.url} did not reply with JSON: {shown!r}") from garbage


def _error_body(refused: urllib.error.HTTPError) -> str:
    try:
        with refused:
            return " ".join(refused.read(2000).decode("utf-8", "replace").split())[:200]
    except (OSError, http.client.HTTPException):
        return str(refused.reason)
