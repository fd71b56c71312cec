"""The client of an OpenAI-compatible endpoint: bounded time and size, no redirects, one-line errors without secrets."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, urlsplit
from urllib.request import getproxies, proxy_bypass

from prunetune.errors import ConfigError
from prunetune.evaluation.suites.protocol import BackendError
from prunetune.utils.untrusted import parse_json, printable

if TYPE_CHECKING:
    from ssl import SSLContext

    from httpx2 import Response

T = TypeVar("T")
R = TypeVar("R")
RETRY_STATUS_CODES = frozenset({408, 425, 429, 500, 502, 503, 504})
MAX_REPLY_BYTES = 64 * 2**20
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs the whole URL of every request


def public_url(text: str) -> str:
    """A URL without user, password and query, where secrets may stand; any other text as it is."""
    scheme, mark, _ = text.partition("://")
    if not mark:
        return text
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises where secrets may be in the wrong part
    except ValueError:
        return f"{scheme}://***"
    return f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{'?***' if parts.query else ''}"


@dataclass(frozen=True)
class EndpointClient:
    """An address with its deadline and retries. A request takes `max_attempts` times `timeout` at most, and delays.

    A user and a password in the address are sent as basic authentication. Only `address` is shown, without secrets.
    Requests go through the proxy of the environment, those to this machine do not. Redirects are not followed.
    """

    url: str  # http://127.0.0.1:8000/v1
    key_env: str = ""  # the environment variable with the key
    timeout: float = 60.0  # seconds for one complete reply, from the connection to the last byte
    max_attempts: int = 3
    retry_delay: float = 0.5  # seconds before the second try; doubles
    concurrency: int = 4

    def __post_init__(self) -> None:
        from httpx2 import URL, InvalidURL

        try:
            url, port = URL(self.url), urlsplit(self.url).port
        except (InvalidURL, ValueError):
            url, port = URL(), None
        if url.scheme not in ("http", "https") or not url.host or port == 0:
            shown = self.address.rpartition("@")[2]
            raise ConfigError(f"endpoint {shown!r} is no URL; write it as http://host:port/v1")
        if url.userinfo and self.key_env:
            raise ConfigError(
                f"endpoint {self.address} names a user, and {self.key_env} a key; a request holds one: leave one out"
            )
        if not self.timeout > 0:
            raise ConfigError(f"the timeout must be above 0 seconds, got {self.timeout:g}")

    @property
    def address(self) -> str:
        """The URL without secrets."""
        return public_url(self.url)

    def chat(self, model: str, messages: Sequence[Mapping[str, Any]], *, max_tokens: int, **options: Any) -> str:
        """The greedy reply to a chat; raises `BackendError`."""
        body = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0, **options}
        return self._read(self.post("/chat/completions", body), lambda choice: choice["message"]["content"] or "")

    def complete(self, model: str, prompt: str, *, max_tokens: int, **options: Any) -> str:
        """The greedy completion of a prompt; raises `BackendError`."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **options}
        return self._read(self.post("/completions", body), lambda choice: choice["text"])

    def _read(self, reply: Any, text: Callable[[Any], Any]) -> str:
        with suppress(KeyError, IndexError, TypeError):
            answer = text(reply["choices"][0])
            if isinstance(answer, str):
                return answer
        shown = self._shown(json.dumps(reply, default=str))
        raise BackendError(f"endpoint {self.address} did not reply with a completion: {shown}", quoted=shown)

    def map_concurrently(self, items: Sequence[T], call: Callable[[T], R]) -> list[R]:
        """`call` on every item, `concurrency` at once; results are in order. The first failure stops the rest."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                return list(pool.map(call, items))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON of the reply; raises `BackendError` after the last attempt."""
        from httpx2 import TimeoutException, TransportError

        content, failure, shown = json.dumps(body).encode(), "", ""
        for attempt in range(self.max_attempts):
            if attempt:
                time.sleep(self.retry_delay * 2 ** (attempt - 1))
            try:
                with ThreadPoolExecutor(1) as thread:  # of its own, because a notebook's has an event loop already
                    reply, data = thread.submit(asyncio.run, self._send(path, content)).result()
            except (TimeoutError, TimeoutException):
                failure = f"no complete reply within {self.timeout:g} s"
                continue
            except (TransportError, UnicodeError) as broken:  # UnicodeError: a host that no name can be
                failure = f"{type(broken).__name__}: {self._shown(str(broken))}".removesuffix(": ")
                continue
            text = data.decode("utf-8", "replace")
            if reply.is_success:
                try:
                    return parse_json(bytes(data))
                except ValueError as garbage:
                    shown = repr(self._shown(text)[:80])
                    problem = f"endpoint {self.address} did not reply with JSON: {shown}"
                    raise BackendError(problem, quoted=shown) from garbage
            if 300 <= reply.status_code < 400:
                target = self._shown(public_url(reply.headers.get("Location", "").partition("?")[0]) or "nowhere")
                raise BackendError(
                    f"endpoint {self.address}{path} redirects to {target} (HTTP {reply.status_code}); no redirect is "
                    "followed, because keys and prompts would go along: name the address that answers"
                )
            shown = self._shown(text or reply.reason_phrase)
            failure = f"HTTP {reply.status_code}: {shown}"
            if reply.status_code not in RETRY_STATUS_CODES:
                break
        raise BackendError(
            f"endpoint {self.address}{path} does not answer ({failure}); is it up, and the address right?",
            quoted=shown,
        )

    async def _send(self, path: str, content: bytes) -> tuple[Response, bytearray]:
        """The reply and its body. Raises `TimeoutError`, httpx2's errors of transport, and `BackendError`."""
        from httpx2 import AsyncClient, InvalidURL

        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **self._authorization()}
        parts, data = urlsplit(self.url), bytearray()
        url = parts._replace(path=parts.path.rstrip("/") + path, fragment="").geturl()
        proxy = getproxies().get(parts.scheme)
        if parts.hostname in LOOPBACK or proxy_bypass(parts.netloc.rpartition("@")[2]):
            proxy = None
        elif proxy and "://" not in proxy:
            proxy = f"http://{proxy}"
        try:
            client = AsyncClient(verify=self._tls, timeout=None, proxy=proxy, trust_env=False)
        except (ImportError, ValueError, InvalidURL) as unusable:
            raise BackendError(
                f"endpoint {self.address}: {parts.scheme.upper()}_PROXY cannot be used ({type(unusable).__name__}): "
                "name an http proxy there, or add the host to NO_PROXY"
            ) from unusable
        # The deadline holds for the whole, also for headers that come byte by byte; httpx2's are for each read.
        async with (
            asyncio.timeout(self.timeout),
            client,
            client.stream("POST", url, content=content, headers=headers) as reply,
        ):
            async for chunk in reply.aiter_raw():
                data += chunk
                if len(data) > MAX_REPLY_BYTES:
                    raise BackendError(f"endpoint {self.address}{path}: a reply of more than 64 MiB is refused")
        return reply, data

    @cached_property
    def _tls(self) -> SSLContext:
        from httpx2 import create_ssl_context

        return create_ssl_context()

    def _authorization(self) -> dict[str, str]:
        if not self.key_env:
            return {}
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise BackendError(f"endpoint {self.address}: the environment variable {self.key_env} is not set")
        if not (key.isascii() and key.isprintable()):
            raise BackendError(f"endpoint {self.address}: {self.key_env} holds characters that no key can have")
        return {"Authorization": f"Bearer {key}"}

    def _shown(self, text: str) -> str:
        """A server's text for an error: short, in one line, and without the secrets that it may repeat."""
        parts = urlsplit(self.url)
        secrets = [os.environ.get(self.key_env), parts.password, *(value for _, value in parse_qsl(parts.query))]
        for secret in (secret.strip() for secret in secrets if secret):
            text = text.replace(secret, "***") if len(secret) > 3 else text
        return printable(" ".join(text[:2000].split())[:200])
