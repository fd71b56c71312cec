"""Whether the Hugging Face hub can be asked: found out once, within seconds, instead of by retries of every request."""

import socket
import urllib.request
from functools import cache
from threading import Thread
from urllib.parse import urlsplit

CONNECT_SECONDS = 3.0


@cache
def hub_failure() -> str:
    """Why the hub cannot be asked, "" if it can; where it cannot, this process reads the hub's cache only.

    Where a proxy is set it is not tried: only the proxy could say.
    """
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if urllib.request.getproxies().keys() & {"all", address.scheme}:
        return ""
    outcome = [f"no answer within {CONNECT_SECONDS:g} s"]

    def connect() -> None:
        port = address.port or (80 if address.scheme == "http" else 443)
        try:
            socket.create_connection((address.hostname or "", port), timeout=CONNECT_SECONDS).close()
            outcome[0] = ""
        except OSError as refused:
            outcome[0] = refused.strerror or str(refused)

    # In a thread, as the search for the address knows no time limit.
    thread = Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    constants.HF_HUB_OFFLINE = bool(outcome[0])  # read at every request, those of transformers and datasets too
    return f"{address.hostname}: {outcome[0]}" if outcome[0] else ""
