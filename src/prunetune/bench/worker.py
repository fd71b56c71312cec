"""Every model in a process of its own: its memory is then its own, and the models can still take turns."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from prunetune.bench.named import Named
from prunetune.bench.options import BenchOptions
from prunetune.bench.runner import Facts, Runner, Sample, Work
from prunetune.errors import ModelError, PrunetuneError

Opener = Callable[[Named, BenchOptions], Runner]
PATIENCE = 5.0  # seconds that a process gets to end by itself


def opened(model: Named, options: BenchOptions) -> Runner:
    """The model in this process, in the runtime that its files are for."""
    if model.llama_cpp:
        from prunetune.bench.llamacpp import LlamaCppRunner

        return LlamaCppRunner(model, options)
    from prunetune.bench.local import LocalRunner

    return LocalRunner(model, options)


class Worker:
    """A `Runner` in a fresh process. Its `PrunetuneError`s are raised here, its bugs with their traceback."""

    def __init__(self, model: Named, options: BenchOptions, opener: Opener = opened) -> None:
        self.label = model.label
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, opener, model, options), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the process
        try:
            self._facts: Facts = self._answer("opening")
        except BaseException:
            self.close()
            raise

    def facts(self) -> Facts:
        """See `Runner`."""
        return self._facts

    def warm(self, batch: int) -> Work:
        """See `Runner`."""
        return self._ask("warm", batch)  # type: ignore[no-any-return]

    def run(self, batch: int) -> Sample:
        """See `Runner`."""
        return self._ask("run", batch)  # type: ignore[no-any-return]

    def close(self) -> None:
        """See `Runner`."""
        self.pipe.close()
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()

    def _ask(self, what: str, batch: int) -> Any:
        self.pipe.send((what, batch))
        return self._answer(f"batch {batch}")

    def _answer(self, during: str) -> Any:
        try:
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionResetError) as gone:
            self.process.join(PATIENCE)
            raise ModelError(
                f"model {self.label}: its process ended at {during} (exit code {self.process.exitcode}; -9 is mostly "
                "the system out of memory); lower --batch or --prompt, or name fewer models"
            ) from gone
        if kind == "mistake":
            raise value
        if kind == "bug":
            raise RuntimeError(f"in the process of {self.label}:\n{value}")
        return value


def _serve(pipe: Connection, opener: Opener, model: Named, options: BenchOptions) -> None:
    """Open the model and do as the pipe says, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which closes the pipe
    try:
        runner = opener(model, options)
        pipe.send(("fine", runner.facts()))
        while True:
            what, batch = pipe.recv()
            _say(pipe, runner.warm if what == "warm" else runner.run, batch)
    except (EOFError, BrokenPipeError):
        return
    except PrunetuneError as mistake:
        pipe.send(("mistake", mistake))
    except Exception:
        pipe.send(("bug", traceback.format_exc()))


def _say(pipe: Connection, job: Callable[[int], Any], batch: int) -> None:
    """A mistake leaves the model open: a batch that does not fit says nothing about a smaller one."""
    try:
        pipe.send(("fine", job(batch)))
    except PrunetuneError as mistake:
        pipe.send(("mistake", mistake))
