"""The table of failures: each kind is recognised by what its library raises, and bugs are not."""

from __future__ import annotations

import errno

import pytest
import torch
from safetensors import SafetensorError

from prunetune.errors import ConfigError, DataError
from prunetune.utils.failures import explain_failure, first_line, is_gpu_fault, last_line


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl"), "the disk is full (runs/a/metrics"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full (run folder)"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full (run folder)"),
        (PermissionError(errno.EACCES, "Permission denied", "{a}"), "no permission to read or write {a}: "),
        (SafetensorError("I/O error: Permission denied (os error 13)"), "no permission to read or write run folder"),
        (MemoryError(), "out of memory: lower train.micro_tokens"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory: "),
        (torch.AcceleratorError("CUDA error: out of memory"), "out of memory: "),
        (torch.AcceleratorError("CUDA error: misaligned address\nmore"), "the GPU failed (CUDA error: misaligned"),
    ],
)
def test_failure_is_explained_in_one_line(error: Exception, message: str) -> None:
    line = explain_failure(error)
    assert line is not None
    assert line.startswith(message)
    assert "\n" not in line


@pytest.mark.parametrize(
    "error", [RuntimeError("gloo: connection closed"), OSError(errno.EIO, "broken"), KeyError("x")]
)
def test_bug_is_not_explained(error: Exception) -> None:
    assert explain_failure(error) is None


def test_lost_rank_is_explained_among_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LOCAL_RANK", "0"), ("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert str(explain_failure(RuntimeError("[gloo] Connection closed by peer"))).startswith("another rank is gone")
    assert explain_failure(RuntimeError("shapes differ")) is None


def test_gpu_fault_is_not_an_out_of_memory_error() -> None:
    assert is_gpu_fault(torch.AcceleratorError("CUDA error: unspecified launch failure"))
    assert not is_gpu_fault(torch.AcceleratorError("CUDA error: out of memory"))
    assert not is_gpu_fault(RuntimeError("CUDA error: unspecified launch failure"))


def test_first_and_last_line_are_never_empty() -> None:
    assert first_line(ValueError("\n a\nb")) == "a"
    assert first_line(ValueError()) == "ValueError"
    assert last_line("a\nb\n") == "b"
    assert last_line(" \n") == "no output"


def test_error_of_any_content_is_one_line_of_bounded_length() -> None:
    assert str(DataError("a\nb: wrong")) == "a b: wrong"
    assert len(str(ConfigError("x" * 10**6))) == 3000


def test_first_line_that_ends_in_a_colon_has_the_next_one_with_it() -> None:
    assert first_line(RuntimeError("Error in loading:\n\tsize mismatch for a\n\tand b")) == (
        "Error in loading: size mismatch for a"
    )
    assert first_line(RuntimeError("one\ntwo")) == "one"
    assert first_line(RuntimeError("")) == "RuntimeError"
