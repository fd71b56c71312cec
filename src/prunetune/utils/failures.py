"""Failures of disk, memory, GPU and other ranks: one table of how each is recognised and what to do about it.

Libraries raise these as errors of their own, so they are recognised by type name, error number and text; no torch here.
"""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prunetune.errors import ModelError, PrunetuneError
from prunetune.utils.launch import rank_and_world_size
from prunetune.utils.untrusted import shorten

LOST_RANK_PATTERN = re.compile(r"gloo|NCCL|connection (closed|reset)|timed out", re.IGNORECASE)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, with the next one if it ends in a colon; its type's name without a text."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first


def typed_line(error: BaseException) -> str:
    """The type and the beginning of an error's text, in one line: of libraries and code that raise anything."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def last_line(output: str) -> str:
    """The last line that a process printed: where it failed, usually its error."""
    return (output.strip().splitlines() or ["no output"])[-1]


def is_lost_rank(error: BaseException) -> bool:
    """Whether another process of this run is gone, as gloo or NCCL report it."""
    if rank_and_world_size()[1] == 1 or not isinstance(error, RuntimeError):
        return False
    return type(error).__name__.startswith("Dist") or bool(LOST_RANK_PATTERN.search(first_line(error)))


def is_disk_full(error: BaseException) -> bool:
    """Whether there is no space, or no quota, as Python or safetensors report it."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return type(error).__name__ == "SafetensorError" and "No space left" in str(error)


def is_permission_denied(error: BaseException) -> bool:
    """Whether a file may not be used, or its file system is read-only, as Python or safetensors report it."""
    if isinstance(error, OSError):
        return error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    return type(error).__name__ == "SafetensorError" and "Permission denied" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or GPU memory ran out, as Python or PyTorch report it."""
    texts = ("can't allocate memory", "CUDA error: out of memory")
    is_named_so = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named_so or any(text in str(error) for text in texts)


def is_gpu_fault(error: BaseException) -> bool:
    """Whether driver, card or a kernel failed, so that nothing more can be computed in this process."""
    return type(error).__name__ == "AcceleratorError" and "out of memory" not in first_line(error)


@dataclass(frozen=True)
class FailureRule:
    """A kind of failure: how it is recognised, and one line that says what to do about it."""

    recognise: Callable[[BaseException], bool]
    message: str  # {file}: the file that the error names; {line}: the first line of the error


# The first that recognises an error explains it.
FAILURES = (
    FailureRule(
        is_lost_rank,
        "another rank is gone, and with it the run: read the last lines of its log, then continue with --resume",
    ),
    FailureRule(is_disk_full, "the disk is full ({file}): free some space, then continue with --resume"),
    FailureRule(
        is_permission_denied,
        "no permission to read or write {file}: change its permissions, or name another folder with --out",
    ),
    FailureRule(lambda error: isinstance(error, NotADirectoryError), "{file} leads through a file: name another path"),
    FailureRule(
        is_out_of_memory,
        "out of memory: lower train.micro_tokens, train.batch_size or data.max_length, then continue with --resume; "
        "in eval and check lower --max-tokens",
    ),
    FailureRule(
        is_gpu_fault,
        "the GPU failed ({line}): continue with --resume; if it happens again, let no other process use this GPU, or "
        "look for Xid in the kernel's log (dmesg)",
    ),
)


def explain_failure(error: BaseException) -> str | None:
    """What failed and what to do, in one line; None for a bug, which keeps its traceback."""
    file = getattr(error, "filename", None) or "run folder"
    messages = (rule.message for rule in FAILURES if rule.recognise(error))
    return next((message.format(file=file, line=first_line(error)) for message in messages), None)


# Errors whose text says what is wrong; that of others, such as a KeyError, needs the name of its type.
SELF_EXPLAINING = (OSError, ValueError, RuntimeError, ImportError)


@contextmanager
def reading_model_files(subject: str, next_step: str) -> Iterator[None]:
    """Raise whatever a library raises in this block, while it reads files of a stranger, as `ModelError` in one line.

    Memory, disk and GPU errors, which `FAILURES` explains, keep their type. `subject`: "model X: its tokenizer".
    """
    try:
        yield
    except BaseException as broken:
        is_panic = type(broken).__name__ == "PanicException"  # of Rust in tokenizers; no subclass of Exception
        if isinstance(broken, PrunetuneError) or not (isinstance(broken, Exception) or is_panic):
            raise
        if explain_failure(broken):
            raise
        reason = first_line(broken).rstrip(".:")
        if type(broken).__module__.startswith("huggingface_hub"):  # whose first line names only the field
            reason = " ".join(str(broken).split())
        elif not isinstance(broken, SELF_EXPLAINING) and type(broken).__name__ != "SafetensorError":
            reason = f"{type(broken).__name__}: {reason}"
        raise ModelError(f"{subject}: {shorten(reason, 500)}; {next_step}") from broken
