"""`prunetune watch --web`: reports of runs, made anew as they go, on this computer's own address.

Answers GET only, to whoever has the key in the address, by a name of this computer (so that no foreign name can be
bound to it), and to no request that another site's page makes. Runs are found by their names in a list, never by paths.
"""

from __future__ import annotations

import math
import secrets
import socket
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from json import dumps
from os import fsdecode, fsencode
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urlsplit

from prunetune.errors import ConfigError, PrunetuneError
from prunetune.report import render_report
from prunetune.runs.folder import open_run
from prunetune.runs.history import RunEntry, read_entries
from prunetune.runs.watch import describe_phase, take_snapshot
from prunetune.utils.untrusted import printable

ADDRESS = "127.0.0.1"
OWN_NAMES = ("127.0.0.1", "localhost", "::1")
LIST_SECONDS = 5.0  # for which a list of runs is kept
REPORT_FILES = ("config.yaml", "plan.json", "metrics.jsonl", "validation.jsonl", "manifest.json", "bench.json")
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
PAGE_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; frame-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class WatchedRuns:
    """The runs of a folder, and their reports; each report is rendered again if a file of its run changed."""

    def __init__(self, run: Path) -> None:
        open_run(run)  # raises where there is none
        self.run = run.resolve()
        self.folder = self.run.parent.parent.parent if self.run.parent.name == "sizes" else self.run.parent
        self.lock = Lock()
        self.listed, self.entries = -math.inf, list[RunEntry]()
        self.reports: dict[str, tuple[str, str]] = {}

    def by_name(self) -> dict[str, RunEntry]:
        """Runs by their paths from the folder; those that links put elsewhere are left out."""
        with self.lock:
            if time.monotonic() - self.listed > LIST_SECONDS:
                self.entries, self.listed = read_entries([self.folder]), time.monotonic()
            inside = [entry for entry in self.entries if entry.path.resolve() == entry.path]
            return {str(entry.path.relative_to(self.folder)): entry for entry in inside}

    def state(self, selected: str) -> dict[str, Any]:
        """The list of runs and the progress of one of them, as values for JSON."""
        runs = self.by_name()
        listed = [
            {
                "name": printable(key),
                "path": quote(fsencode(key)),
                "detail": printable(f"{entry.status}, {entry.model}"),
            }
            for key, entry in runs.items()
        ]
        if selected not in runs:
            return {"runs": listed}
        snapshot = take_snapshot(runs[selected].path)
        left = snapshot.seconds_left
        return {
            "runs": listed,
            "phase": printable(describe_phase(snapshot)),
            "step": snapshot.step,
            "steps": snapshot.total_steps,
            "seconds_left": round(left) if left is not None and math.isfinite(left) else None,
            "is_over": snapshot.is_finished or snapshot.is_stopped,
            "version": self.version(runs[selected].path),
        }

    def version(self, path: Path) -> str:
        """Changes when a file does that the report shows."""
        files = [path / name for name in REPORT_FILES]
        files += [*path.glob("evaluation/*.json"), *path.glob("sizes/*/manifest.json")]
        return str(max((file.stat().st_mtime_ns for file in files if file.exists()), default=0))

    def report(self, name: str) -> str | None:
        """The page of a run; None where there is none of this name."""
        entry = self.by_name().get(name)
        if entry is None:
            return None
        version = self.version(entry.path)
        with self.lock:
            if self.reports.get(name, ("", ""))[0] != version:
                self.reports[name] = (version, render_report(entry.path))
            return self.reports[name][1]


class WatchHandler(BaseHTTPRequestHandler):
    """Answers /KEY/ (the page), /KEY/state/NAME (its JSON) and /KEY/runs/NAME/report.html."""

    timeout = 20  # seconds, for a client that sends nothing
    server_version, sys_version = "prunetune", ""

    def __init__(self, runs: WatchedRuns, key: str, *args: Any) -> None:
        self.runs, self.key = runs, key
        super().__init__(*args)

    def do_GET(self) -> None:
        """Answer a request from this computer's own page."""
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        try:
            is_own = len(hosts) == 1 and urlsplit(f"//{hosts[0]}").hostname in OWN_NAMES
        except ValueError:
            is_own = False
        is_own = is_own and all(origin == f"http://{hosts[0]}" for origin in origins)
        if not is_own or self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            self._answer(403, "only pages of this address may ask")
            return
        _, key, *parts = self.path.partition("?")[0].split("/")
        if not secrets.compare_digest(key.encode("utf-8", "replace"), self.key.encode()):
            self._answer(404, "no such page: use the address that prunetune watch printed")
            return
        name = fsdecode(unquote_to_bytes("/".join(parts[1:])))
        try:
            if parts == [""]:
                self._answer_page()
            elif parts[:1] == ["state"]:
                self._answer(200, dumps(self.runs.state(name)), "application/json")
            elif (
                parts[:1] == ["runs"]
                and parts[-1] == "report.html"
                and (page := self.runs.report(name.removesuffix("/report.html")))
            ):
                self._answer(200, page, "text/html", f"{REPORT_POLICY}; frame-ancestors 'self'")
            else:
                self._answer(404, "no such page")
        except (PrunetuneError, OSError) as gone:  # a run that is being removed
            self._answer(404, printable(str(gone)))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no GET, or no HTTP, in the same way: in plain text."""
        self._answer(code, message or "GET only")

    def log_message(self, *_: Any) -> None:
        """Log nothing: the address holds the key."""

    def _answer_page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        page = resources.files("prunetune.cli").joinpath("watch.html").read_text(encoding="utf-8")
        selected = quote(fsencode(str(self.runs.run.relative_to(self.runs.folder))))
        page = page.replace("NONCE", nonce).replace("SELECTED", selected)
        self._answer(200, page, "text/html", PAGE_POLICY.format(nonce=nonce))

    def _answer(self, status: int, text: str, kind: str = "text/plain", policy: str = "default-src 'none'") -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)), "Cache-Control": "no-store",
            "Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
        }.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def make_server(run: Path, port: int) -> tuple[ThreadingHTTPServer, str]:
    """A server of a run and its neighbours, and its address; raises `ConfigError` where the port is taken."""
    key = secrets.token_urlsafe(16)
    handler = partial(WatchHandler, WatchedRuns(run), key)
    try:
        server = ThreadingHTTPServer((ADDRESS, port), handler)
    except (OSError, OverflowError) as taken:
        raise ConfigError(f"port {port} cannot be had ({taken}): name another with --port, or 0 for any") from taken
    return server, f"http://{ADDRESS}:{server.server_port}/{key}/"


def serve_run(run: Path, port: int, *, announce: Callable[[str], None]) -> None:
    """Serve until Ctrl-C; raises `RunFolderError` for no run folder."""
    server, address = make_server(run, port)
    with server:
        announce(
            f"{address}\nfrom another computer: ssh -L {server.server_port}:{ADDRESS}:{server.server_port} "
            f"{socket.gethostname()}, then open it there; Ctrl-C ends it"
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
