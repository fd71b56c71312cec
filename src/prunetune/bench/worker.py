"""Every model in a process of its own: its memory is then its own, and the models can still take turns."""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any

from prunetune.bench.models import ModelSpec
from prunetune.bench.options import BenchOptions
from prunetune.bench.runner import BenchSample, ModelFacts, Runner, WorkEstimate
from prunetune.errors import ModelError, PrunetuneError

RunnerFactory = Callable[[ModelSpec, BenchOptions], Runner]
EXIT_TIMEOUT_S = 5.0  # seconds that a process gets to end by itself


def open_runner(model: ModelSpec, options: BenchOptions) -> Runner:
    """The model in this process, in the runtime that its files are for."""
    if model.llama_cpp:
        from prunetune.bench.llamacpp import LlamaCppRunner

        return LlamaCppRunner(model, options)
    from prunetune.bench.local import LocalRunner

    return LocalRunner(model, options)


# Not one of multiprocessing's processes: these run the caller's script once more, and a short one would start again.
START = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which closes the pipe
sys.path[:] = sys.argv[2:]
from prunetune.bench.worker import serve
serve(int(sys.argv[1]))
"""


class Worker:
    """A `Runner` in a fresh process. Its `PrunetuneError`s are raised here, its bugs with their traceback."""

    def __init__(self, model: ModelSpec, options: BenchOptions, opener: RunnerFactory = open_runner) -> None:
        self.label = model.label
        self.pipe, theirs = Pipe()
        self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and text
            [sys.executable, "-c", START, str(theirs.fileno()), *sys.path],
            pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()  # so that the pipe ends with the process
        try:
            self._facts: ModelFacts = self._ask((opener, model, options), "opening")
        except BaseException:
            self.close()
            raise

    def facts(self) -> ModelFacts:
        """See `Runner`."""
        return self._facts

    def warm_up(self, batch: int) -> WorkEstimate:
        """See `Runner`."""
        return self._ask(("warm", batch), f"batch {batch}")  # type: ignore[no-any-return]

    def run(self, batch: int) -> BenchSample:
        """See `Runner`."""
        return self._ask(("run", batch), f"batch {batch}")  # type: ignore[no-any-return]

    def close(self) -> None:
        """See `Runner`."""
        self.pipe.close()
        self._end()

    def _ask(self, request: tuple[Any, ...], during: str) -> Any:
        try:
            self.pipe.send(request)
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionResetError, BrokenPipeError) as gone:
            raise ModelError(
                f"model {self.label}: its process ended at {during} (exit code {self._end()}; -9 is mostly "
                "the system out of memory); lower --batch or --prompt, or name fewer models"
            ) from gone
        if kind == "mistake":
            raise value
        if kind == "bug":
            raise RuntimeError(f"in the process of {self.label}:\n{value}")
        return value

    def _end(self) -> int:
        """The exit code of the process, which is killed where it does not end by itself."""
        try:
            return self.process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def serve(handle: int) -> None:
    """Open the model that the pipe names and do as it says, until it is closed."""
    pipe = Connection(handle)
    try:
        opener, model, options = pipe.recv()
        runner = opener(model, options)
        pipe.send(("fine", runner.facts()))
        while True:
            what, batch = pipe.recv()
            _send_result(pipe, runner.warm_up if what == "warm" else runner.run, batch)
    except (EOFError, BrokenPipeError):
        return
    except PrunetuneError as mistake:
        pipe.send(("mistake", mistake))
    except Exception:
        pipe.send(("bug", traceback.format_exc()))


def _send_result(pipe: Connection, job: Callable[[int], Any], batch: int) -> None:
    """A mistake leaves the model open: a batch that does not fit says nothing about a smaller one."""
    try:
        pipe.send(("fine", job(batch)))
    except PrunetuneError as mistake:
        pipe.send(("mistake", mistake))
