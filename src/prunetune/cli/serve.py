"""`prunetune serve`: the OpenAI-compatible server of transformers or of llama.cpp, started for a run's model."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import socket
import sys
import threading
from ipaddress import ip_address
from typing import Literal

from prunetune.errors import ConfigError, MissingPackage
from prunetune.evaluation.suites.llamacpp import start_server
from prunetune.evaluation.suites.open_model import check_gguf_file, resolve_checkpoint
from prunetune.model.loading import load_config, load_tokenizer, pick_device, resolve_model_path
from prunetune.model.per_layer_classes import per_layer_classes
from prunetune.pruning.families import MODEL_TYPE_PREFIX
from prunetune.utils.files import expand_path
from prunetune.utils.optional import install_command, is_installed
from prunetune.utils.untrusted import printable

log = logging.getLogger(__name__)
Server = Literal["auto", "transformers", "llama.cpp"]


def serve(
    run: str, *, server: Server = "auto", host: str = "127.0.0.1", port: int = 8000, device: str = "auto"
) -> None:
    """Serve a run, model folder, hub name or .gguf file until Ctrl-C, and print a line for curl first.

    `auto`: llama.cpp for a .gguf file, and for a run with one in exports/ where transformers' server is not installed;
    else transformers. Raises a `PrunetuneError` for what cannot be served, and where no server is installed.
    """
    from transformers.utils.import_utils import is_serve_available

    path, program = expand_path(run), shutil.which("llama-server")
    exports = sorted((path / "exports").glob("*.gguf"), key=lambda file: file.stat().st_mtime)
    file = check_gguf_file(path) if path.suffix == ".gguf" else exports[-1] if exports else None
    has_llama = bool(program) or is_installed("xllamacpp")
    if server == "auto":
        server = (
            "llama.cpp"
            if path.suffix == ".gguf" or (file and has_llama and not is_serve_available())
            else "transformers"
        )
    if server == "llama.cpp" and file is None:
        raise ConfigError(f"llama.cpp serves .gguf files, and {run} is none: prunetune export {run} --to gguf")
    if server == "llama.cpp" and not has_llama:
        raise MissingPackage(f"llama.cpp is not here: put llama-server on PATH, or run: {install_command('llamacpp')}")
    if server == "transformers" and not is_serve_available():
        raise MissingPackage(
            f"transformers' server needs packages that are not here; run: {install_command('serve')}, or "
            f"prunetune export {run} --to gguf for llama.cpp's"
        )
    _raise_if_taken(host, port)
    if server == "llama.cpp":
        assert file is not None
        _print_curl(host, port, file.stem, is_chat=True)
        if program:
            sys.stdout.flush()
            arguments = ["-m", str(file), "--alias", file.stem, "--host", host, "--port", str(port)]
            os.execv(program, [program, *arguments])  # noqa: S606 - no shell is wanted
        running = start_server(file, host=host, port=port)
        log.info("llama.cpp serves %s at %s", file, running.listening_address)
        threading.Event().wait()
    name = resolve_checkpoint(run)
    device = str(pick_device(device))
    folder = resolve_model_path(name)
    if "@" in folder or ":" in folder:
        raise ConfigError(f"{folder}: transformers' server reads @ and : as signs of its own: move or link the folder")
    config = load_config(name)
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    if config.model_type.startswith(MODEL_TYPE_PREFIX):  # its class is looked up there, by its name in transformers
        causal = per_layer_classes(config.model_type.removeprefix(MODEL_TYPE_PREFIX))[-1]
        setattr(model_manager.transformers, causal.__name__, causal)
    _print_curl(host, port, folder, is_chat=bool(load_tokenizer(name).chat_template))
    Serve(force_model=folder, host=host, port=port, device=device)


def _raise_if_taken(host: str, port: int) -> None:
    """Raise `ConfigError` where the port cannot be listened on, before a model is loaded for it."""
    if not 0 < port < 2**16:
        raise ConfigError(f"--port {port}: a port is a number from 1 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as refused:
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({refused}): name another by --port or --host"
        ) from refused
    if not ip_address(str(address[0])).is_loopback:
        log.warning("%s is not this computer alone: whoever reaches it can use the model, without a password", host)


def _print_curl(host: str, port: int, model: str, *, is_chat: bool) -> None:
    """Print a request that works as it stands once the model is loaded."""
    body: dict[str, object] = {"model": model, "max_tokens": 64}
    body |= {"messages": [{"role": "user", "content": "Hello"}]} if is_chat else {"prompt": "Hello"}
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1/{'chat/' if is_chat else ''}completions"
    command = ["curl", url, "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    sys.stdout.write(printable(f"{shlex.join(command)}\n"))
    sys.stdout.flush()
