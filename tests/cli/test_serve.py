"""`serve`: which server is started and how, the line for curl, and what is refused before a model is loaded."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.cli import serve as transformers_serve
from transformers.cli.serving import model_manager

from prunetune.cli import serve as serve_module
from prunetune.export.formats import export_run
from support.endpoint import unused_port
from support.finished_run import copied_run, finished_run

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How transformers' server was started; it is installed, and ends at once."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(transformers_serve, "Serve", lambda **options: calls.append(options))
    monkeypatch.setattr(transformers.utils.import_utils, "is_serve_available", lambda: True)
    monkeypatch.setattr(serve_module, "is_installed", lambda _: False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    return calls


def request_of(line: str) -> tuple[str, dict[str, Any]]:
    """The address and the body of a line for curl."""
    curl, url, *options = shlex.split(line)
    assert (curl, options[:3]) == ("curl", ["-H", "Content-Type: application/json", "-d"])
    return url, json.loads(options[3])


def test_transformers_serves_a_run_on_this_computer_only(say: Say, started: list[dict[str, Any]]) -> None:
    port = unused_port()
    code, out, err = say("serve", finished_run(), "--port", port, "--device", "cpu")
    folder = str(finished_run() / "model")
    assert (code, err) == (0, "")
    assert started == [{"force_model": folder, "host": "127.0.0.1", "port": port, "device": "cpu"}]
    url, body = request_of(out)
    assert url == f"http://127.0.0.1:{port}/v1/chat/completions"
    assert (body["model"], body["messages"][0]["role"]) == (folder, "user")
    name = json.loads((finished_run() / "model" / "config.json").read_text())["architectures"][0]
    assert getattr(model_manager.transformers, name).__name__ == name  # where that server looks for the class


def test_model_without_a_chat_template_is_asked_to_continue(
    say: Say, started: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished_run().parent / "dense", tmp_path / "plain"))
    (folder / "chat_template.jinja").unlink()
    code, out, _ = say("serve", folder, "--port", unused_port())
    url, body = request_of(out)
    assert (code, url.endswith("/v1/completions"), body["prompt"]) == (0, True, "Hello")


def test_address_that_others_reach_is_warned_of(
    say: Say, started: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    assert say("serve", finished_run(), "--host", "0.0.0.0", "--port", unused_port())[0] == 0
    assert "without a password" in caplog.text
    assert started[0]["host"] == "0.0.0.0"


def test_what_cannot_be_served_is_refused_before_a_model_is_loaded(
    say: Say, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(serve_module, "load_config", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases: list[tuple[tuple[object, ...], str]] = [
            ((finished_run(), "--port", taken.getsockname()[1]), "cannot be listened on"),
            ((finished_run(), "--port", 0), "from 1 to 65535"),
            ((finished_run(), "--port", unused_port(), "--host", "no such host"), "cannot be listened on"),
            ((finished_run(), "--port", unused_port(), "--server", "llama.cpp"), "prunetune export"),
            ((tmp_path / "absent.gguf",), "no such file"),
            ((tmp_path / "absent", "--port", unused_port()), "not a model folder"),
        ]
        for arguments, message in cases:
            code, out, err = say("serve", *arguments)
            assert (code, out, message in err) == (2, "", True), err
    shutil.move(copied_run(tmp_path), tmp_path / "run@2")
    code, _, err = say("serve", tmp_path / "run@2", "--port", unused_port())
    assert (code, "move or link the folder" in err) == (2, True)
    monkeypatch.setattr(transformers.utils.import_utils, "is_serve_available", lambda: False)
    code, _, err = say("serve", finished_run(), "--port", unused_port())
    assert (code, "pip install 'transformers[serving]" in err) == (2, True)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    code, _, err = say("serve", tmp_path / "a.gguf", "--port", unused_port())
    assert (code, "put llama-server on PATH" in err) == (2, True)
    assert started == []


def test_llama_server_on_the_path_serves_an_export(
    say: Say, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = copied_run(tmp_path)
    (run / "exports").mkdir()
    (run / "exports" / "support.gguf").write_bytes(b"GGUF")
    executed: list[list[str]] = []

    def execute(program: str, arguments: list[str]) -> None:
        executed.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(os, "execv", execute)
    port = unused_port()
    assert say("serve", run, "--server", "llama.cpp", "--port", port)[0] == 0
    file = str(run / "exports" / "support.gguf")
    assert executed == [
        ["/bin/llama-server", "-m", file, "--alias", "support", "--host", "127.0.0.1", "--port", str(port)]
    ]
    monkeypatch.setattr(transformers.utils.import_utils, "is_serve_available", lambda: False)
    assert say("serve", run, "--port", port)[0] == 0  # auto: the only server that is here
    assert len(executed) == 2
    assert started == []


def test_printed_line_is_answered_by_llama_cpp(say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    import httpx2

    monkeypatch.setattr(shutil, "which", lambda _: None)
    run, replies = copied_run(tmp_path), list[Any]()
    export_run(run, "gguf")
    port = unused_port()

    def ask(_: Any) -> None:
        url, body = f"http://127.0.0.1:{port}/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}
        replies.append(httpx2.post(url, json=body | {"max_tokens": 4}, timeout=60).json())
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Event, "wait", ask)
    code, out, _ = say("serve", run, "--server", "llama.cpp", "--port", port)
    assert code == 130
    assert request_of(out)[1]["model"] == "gguf-f16"
    assert replies[0]["model"] == "gguf-f16"
    assert replies[0]["choices"][0]["message"]["role"] == "assistant"
