"""A headless Chromium on a pipe, by its DevTools protocol: no driver and no port."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """A Chromium on a pipe; keeps every event that it sends."""

    def __init__(self, program: str, profile: str) -> None:
        to_us, from_browser = os.pipe()
        to_browser, from_us = os.pipe()
        self.reader, self.writer = os.fdopen(to_us, "rb"), os.fdopen(from_us, "wb")
        self.buffer, self.count, self.events = b"", 0, []  # type: ignore[var-annotated]
        # Chromium reads file descriptor 3 and writes to 4.
        shell = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")
        self.process = subprocess.Popen(
            ["/bin/bash", "-c", shell, program, *flags, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)

    def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Call a method and wait for its answer."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self.writer.write(json.dumps(message).encode() + b"\0")
        self.writer.flush()
        while True:
            heard = self._read()
            if heard.get("id") == self.count:
                if "error" in heard:
                    raise RuntimeError(f"{method}: {heard['error']}")
                return heard["result"]  # type: ignore[no-any-return]
            self.events.append(heard)

    def wait_for(self, method: str) -> None:
        """Until such an event has come."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.reader.fileno(), 2**16)
            if not part:
                raise RuntimeError("the browser has gone")
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)  # type: ignore[no-any-return]


@contextmanager
def browser(program: str) -> Iterator[Browser]:
    """A browser with a profile of its own, for the length of the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        made = Browser(program, profile)
        try:
            yield made
        finally:
            made.process.terminate()
            made.process.wait()
            made.reader.close()
            made.writer.close()


def said(events: list[dict[str, Any]]) -> list[str]:
    """Everything on the console, dialogs included."""
    kinds = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening"}
    return [json.dumps(event["params"])[:300] for event in events if event.get("method") in kinds]
