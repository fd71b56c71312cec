"""`watch --web`: the page follows a run to its end, shows texts of others as text, and answers nobody else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunetune.cli.watch_server import make_server
from prunetune.errors import ConfigError, RunFolderError
from prunetune.report import write_report
from support.chromium import PROGRAMS, browser, said
from support.data import pairs
from support.evaluation import characters, speaker
from support.page import ATTACK
from support.report import make_run, write_lines

HOSTILE = f"run {ATTACK}".replace("/", "")
CHROMIUM = next(filter(None, map(shutil.which, PROGRAMS)), None)
Get = Callable[..., tuple[int, dict[str, str], str]]


@pytest.fixture
def serve() -> Iterator[Callable[[Path], tuple[str, int]]]:
    """Serve a run; (address, port)."""
    servers = []

    def start(run: Path) -> tuple[str, int]:
        server, address = make_server(run, 0)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return address, server.server_port

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of two runs, one of a hostile name, beside a folder that is none."""
    make_run(tmp_path / "runs" / "good")
    hostile = make_run(tmp_path / "runs" / HOSTILE)
    config = yaml.safe_load((hostile / "config.yaml").read_text())
    (hostile / "config.yaml").write_text(yaml.safe_dump({**config, "model": ATTACK}))
    (tmp_path / "runs" / "secret.txt").write_text("secret")
    return tmp_path / "runs"


@pytest.fixture
def get(serve: Callable[[Path], tuple[str, int]], runs: Path) -> Get:
    """Ask for a path behind the key: (status, headers, text)."""
    address, port = serve(runs / "good")
    key = address.split("/")[3]

    def ask(
        path: str, method: str = "GET", host: str = "", key: str = key, **headers: str
    ) -> tuple[int, dict[str, str], str]:
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        connection.putrequest(method, f"/{key}/{path}", skip_host=True)
        for name, value in {"Host": host or f"127.0.0.1:{port}", **headers}.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, dict(answer.headers.items()), text

    return ask


def test_report_is_the_one_that_would_be_written_and_changes_with_the_run(get: Get, runs: Path) -> None:
    status, _, page = get("runs/good/report.html")
    assert status == 200
    (runs / "good" / "plan.json").unlink()
    (runs / "good" / "manifest.json").write_text("{}")
    changed = get("runs/good/report.html")[2]
    assert changed != page
    assert changed == write_report(runs / "good").read_text(encoding="utf-8")


def test_state_lists_the_runs_of_the_folder_and_the_steps_of_one(get: Get) -> None:
    state = json.loads(get("state/good")[2])
    assert {run["name"] for run in state["runs"]} >= {"good"}
    assert len(state["runs"]) == 2
    assert (state["step"], state["steps"]) == (700, 700)
    assert "step" not in json.loads(get("state/other")[2])
    path = next(run["path"] for run in state["runs"] if run["name"] != "good")
    assert get(f"runs/{path}/report.html")[0] == 200
    assert json.loads(get(f"state/{path}")[2])["step"] == 700


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example:80", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "[", "10.0.0.1"],
)
def test_other_names_of_this_computer_are_refused(host: str, get: Get) -> None:
    """Else a foreign page whose name was bound to 127.0.0.1 could read reports."""
    for path in ("", "state/good", "runs/good/report.html"):
        status, _, text = get(path, host=host)
        assert (status, text) == (403, "only pages of this address may ask")


def test_own_names_at_any_port_are_answered(get: Get) -> None:
    """ssh -L gives the page another port."""
    for host in ("localhost:9999", "127.0.0.1", "[::1]:7"):
        assert get("", host=host, Origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
    ids=str,
)
def test_requests_of_other_origins_are_refused(headers: dict[str, str], get: Get) -> None:
    assert get("state/good", **headers)[0] == 403


def test_without_the_key_nothing_is_answered(get: Get) -> None:
    for key in ("", "x", "%C3%A9"):
        assert get("runs/good/report.html", key=key)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "x"])
def test_only_get_is_answered(method: str, get: Get) -> None:
    assert get("", method=method)[0] == 501


@pytest.mark.parametrize(
    "path",
    [
        "runs/../secret.txt", "runs/good/../../secret.txt/report.html", "runs/%2e%2e/report.html", "runs/./report.html",
        "runs/good/config.yaml", "runs/secret.txt", "runs/good/sizes/0.6/report.html", "runs/good%00/report.html",
        "runs/link/report.html", "runs", "state", "secret.txt", "runs/%ff/report.html", "runs//etc/report.html",
    ],
)  # fmt: skip
def test_no_path_leads_out_of_the_runs_or_to_their_files(path: str, get: Get, runs: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "elsewhere")
    (runs / "link").symlink_to(tmp_path / "elsewhere")
    status, _, text = get(path)
    assert status == 404 or (path == "state" and status == 200)
    assert "secret" not in text


def test_every_answer_has_a_strict_policy(get: Get) -> None:
    for path in ("", "state/good", "runs/good/report.html", "none"):
        _, headers, _ = get(path)
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'")
        assert "script-src" not in policy or "script-src 'nonce-" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"


def test_no_run_folder_and_a_port_in_use_are_refused(
    tmp_path: Path, runs: Path, serve: Callable[[Path], tuple[str, int]]
) -> None:
    with pytest.raises(RunFolderError, match="is no run folder"):
        make_server(tmp_path, 0)
    with pytest.raises(ConfigError, match=r"port \d+ cannot be had .* --port"):
        make_server(runs / "good", serve(runs / "good")[1])


# -- in a browser ----------------------------------------------------------------------------------------------------

PROBE = """JSON.stringify({
  progress: document.getElementById("progress").textContent,
  runs: [...document.querySelectorAll("#runs a")].map(link => link.firstChild.textContent),
  title: document.getElementById("report").contentDocument?.querySelector("h1")?.textContent ?? "",
  elements: document.querySelectorAll("nav script, nav img").length
    + (document.getElementById("report").contentDocument?.querySelectorAll("script, img, iframe").length ?? 0),
})"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_page_follows_a_run_from_start_to_end(tmp_path: Path, serve: Callable[[Path], tuple[str, int]]) -> None:
    """No console message, no request but to itself, and a hostile neighbour shown as text."""
    assert CHROMIUM is not None
    speaker().save_pretrained(tmp_path / "dense")
    characters().save_pretrained(tmp_path / "dense")
    write_lines(tmp_path / "rows.jsonl", pairs(40))
    make_run(tmp_path / "runs" / HOSTILE)
    run = tmp_path / "runs" / "tiny"
    flags = {
        "model": tmp_path / "dense", "out": run, "device": "cpu", "data.train": tmp_path / "rows.jsonl",
        "train.steps": 40, "train.log_every": 1, "evaluate.drift": "false", "evaluate.dense_tuned": "false",
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in flags.items()]
    with subprocess.Popen(
        [sys.executable, "-m", "prunetune", "run", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (run / "config.yaml").exists():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.01)
        address, _ = serve(run)
        with browser(CHROMIUM) as chromium:
            target = chromium.ask("Target.createTarget", url="about:blank")["targetId"]
            session = chromium.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network", "Security"):
                chromium.ask(f"{domain}.enable", session)
            chromium.ask("Page.navigate", session, url=address)

            def look_until(condition: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
                seen: list[dict[str, Any]] = []
                for _ in range(600):
                    answer = chromium.ask("Runtime.evaluate", session, expression=PROBE)["result"]
                    seen += [json.loads(answer["value"])] if "value" in answer else []  # else the page is not there yet
                    if seen and condition(seen[-1]):
                        return seen
                    time.sleep(0.1)
                raise AssertionError(seen[-1])

            seen = look_until(lambda page: "ended; the report is written" in page["progress"] and page["title"] != "")
            assert process.wait() == 0
            assert any("ended" not in page["progress"] and " of 40" in page["progress"] for page in seen), (
                "it was followed"
            )
            assert seen[-1]["progress"].startswith("step 40 of 40: ended")
            assert len(seen[-1]["runs"]) == 2
            assert any("<script>alert(1)" in name for name in seen[-1]["runs"]), "shown as text"
            click = (
                "[...document.querySelectorAll('#runs a')].find(link => link.textContent.includes('script')).click()"
            )
            chromium.ask("Runtime.evaluate", session, expression=click)
            seen += look_until(lambda page: "of 700" in page["progress"] and page["title"] != seen[-1]["title"])
            assert not any(page["elements"] for page in seen)
            assert said(chromium.events) == []
            sent = [event["params"] for event in chromium.events if event.get("method") == "Network.requestWillBeSent"]
            urls = [params["request"]["url"] for params in sent]
            assert len(urls) > 5
            assert [url for url in urls if not url.startswith((address, "data:,"))] == []
