"""A small OpenAI-compatible server for tests, which can be slow, busy or reply with anything."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = dict[str, Any] | bytes | int | tuple[int, str]  # tuple: a redirect
Answer = Callable[[str, dict[str, Any]], Reply]  # path, request


class RecordingServer:
    """The server's address, and the requests that it received."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []


@contextmanager
def serving(
    answer: Answer, *, wait: float = 0.0, drip: float = 0.0, drip_headers: bool = False, error: str = ""
) -> Iterator[RecordingServer]:
    """Answer every request by `answer`, or with `error`, after `wait` seconds, and `drip` seconds between bytes."""
    closed = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            recording.requests.append((self.path, body, dict(self.headers)))
            closed.wait(wait)
            reply = answer(self.path, body)
            redirect = reply if isinstance(reply, tuple) else None
            status, location = redirect or (reply if isinstance(reply, int) else 200, "")
            data = reply if isinstance(reply, bytes) else error.encode() or json.dumps(reply).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if location:
                    self.send_header("Location", location)
                if drip_headers:
                    data = b"".join(self._headers_buffer) + b"\r\n" + data  # type: ignore[attr-defined]
                    self._headers_buffer = []
                else:
                    self.end_headers()
                for chunk in [data] if not drip else [data[n : n + 1] for n in range(len(data))]:
                    self.wfile.write(chunk)
                    self.wfile.flush()
                    closed.wait(drip)
            except OSError:
                pass  # the client closed the connection

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    recording = RecordingServer(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield recording
    finally:
        closed.set()
        server.shutdown()
        thread.join()
        server.server_close()


def unused_port() -> int:
    """A free port that nothing listens on."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    port = server.server_port
    server.server_close()
    return port


def characters_model(path: str, body: dict[str, Any], *, echo: bool = True) -> Reply:
    """Tokens are characters; each has log-probability -(code point % 7) / 10, and the first of a text has none."""
    if path.endswith("/chat/completions"):
        return {"choices": [{"message": {"role": "assistant", "content": f"re: {body['messages'][-1]['content']}"}}]}
    if not body.get("echo"):
        return {"choices": [{"text": f" to {body['prompt']}"}]}
    text = body["prompt"] + "!"
    logprobs = {
        "token_logprobs": [None, *(-(ord(letter) % 7) / 10 for letter in text[1:])],
        "text_offset": list(range(len(text))),
    }
    return {"choices": [{"text": text, "logprobs": logprobs} if echo else {"text": "!"}]}


def now() -> float:
    """Seconds."""
    return time.monotonic()
