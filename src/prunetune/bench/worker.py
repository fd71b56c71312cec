"""A model in a process of its own, so that its memory is counted alone while models take turns."""

import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any

from prunetune.bench.models import ModelSpec
from prunetune.bench.options import BenchOptions
from prunetune.bench.runner_protocol import BenchSample, ModelFacts, Runner, WorkEstimate
from prunetune.errors import ModelError, PrunetuneError

RunnerFactory = Callable[[ModelSpec, BenchOptions], Runner]
EXIT_TIMEOUT_S = 5.0  # seconds after which a process that does not end is killed


def open_runner(model: ModelSpec, options: BenchOptions) -> Runner:
    """Open the model in this process: a .gguf file in llama.cpp, everything else in transformers."""
    if model.llama_cpp:
        from prunetune.bench.llamacpp import LlamaCppRunner

        return LlamaCppRunner(model, options)
    from prunetune.bench.local import LocalRunner

    return LocalRunner(model, options)


# Not a process of multiprocessing, which would import the caller's script again and so run a short one twice.
START = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which closes the pipe
sys.path[:] = sys.argv[2:]
from prunetune.bench.worker import serve
serve(int(sys.argv[1]))
"""


class Worker:
    """A `Runner` in a new process; its errors are raised here, bugs with their traceback."""

    def __init__(self, model: ModelSpec, options: BenchOptions, opener: RunnerFactory = open_runner) -> None:
        self.label = model.label
        self.pipe, their_pipe = Pipe()
        self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and text
            [sys.executable, "-P", "-c", START, str(their_pipe.fileno()), *sys.path],
            pass_fds=(their_pipe.fileno(),), stdin=subprocess.DEVNULL,
        )  # fmt: skip
        their_pipe.close()  # so that the pipe closes when the process ends
        try:
            self._facts: ModelFacts = self._ask((opener, model, options), "opening")
        except BaseException:
            self.close()
            raise

    def facts(self) -> ModelFacts:
        return self._facts

    def warm_up(self, batch: int) -> WorkEstimate:
        return self._ask(("warm_up", batch), f"batch {batch}")  # type: ignore[no-any-return]

    def run(self, batch: int) -> BenchSample:
        return self._ask(("run", batch), f"batch {batch}")  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the process; may be called twice."""
        self.pipe.close()
        self._end()

    def _ask(self, request: tuple[Any, ...], during: str) -> Any:
        """Send a request and return its result; `during` says in an error what the process was doing."""
        try:
            self.pipe.send(request)
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionResetError, BrokenPipeError) as gone:
            raise ModelError(
                f"model {self.label}: its process ended at {during} (exit code {self._end()}; -9 is mostly "
                "the system out of memory); lower --batch or --prompt, or name fewer models"
            ) from gone
        if kind == "error":
            raise value
        if kind == "bug":
            raise RuntimeError(f"in the process of {self.label}:\n{value}")
        return value

    def _end(self) -> int:
        """Exit code of the process; it is killed if it does not end by itself."""
        try:
            return self.process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def serve(handle: int) -> None:
    """The process: open the model that is read from the pipe, then answer requests until the pipe is closed."""
    pipe = Connection(handle)
    try:
        opener, model, options = pipe.recv()
        runner: Runner = opener(model, options)
        pipe.send(("result", runner.facts()))
        while True:
            request, batch = pipe.recv()
            try:
                pipe.send(("result", runner.warm_up(batch) if request == "warm_up" else runner.run(batch)))
            except PrunetuneError as error:  # the model remains open: a smaller batch may fit
                pipe.send(("error", error))
    except (EOFError, BrokenPipeError):
        return
    except PrunetuneError as error:
        pipe.send(("error", error))
    except Exception:
        pipe.send(("bug", traceback.format_exc()))
