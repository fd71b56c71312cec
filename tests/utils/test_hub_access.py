"""A hub that is not there costs one try: names are then read from its cache, or refused in one line."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from prunetune.errors import ModelError
from prunetune.model.loading import load_config, resolve_model_path
from prunetune.utils import hub_access
from prunetune.utils.hub_access import hub_failure


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("all_proxy", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    hub_failure.cache_clear()
    yield
    hub_failure.cache_clear()


def test_hub_that_refuses_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert hub_failure() == "127.0.0.1: Connection refused"
    assert constants.HF_HUB_OFFLINE
    with pytest.raises(ModelError, match=r"^model owner/name: no configuration found: We couldn't connect to"):
        load_config("owner/name")


def test_name_without_an_address_is_waited_for_so_long_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no name server answers."""
    monkeypatch.setattr(hub_access, "CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(hub_access.Thread, "run", lambda _: time.sleep(0.5))
    assert hub_failure().endswith("no answer within 0.1 s")


def test_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_failure() == ""
        assert resolve_model_path("owner/name") == "owner/name"


def test_proxy_is_left_to_say_what_it_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert hub_failure() == ""


def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_failure() == "HF_HUB_OFFLINE is set"
