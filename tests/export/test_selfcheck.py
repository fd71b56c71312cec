"""Laws of the check of a written checkpoint: its logits and its number of parameters have to agree."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from prunetune.errors import ModelError, SelfCheckFailed
from prunetune.export import selfcheck
from prunetune.export.checkpoint import WrittenCheckpoint
from prunetune.export.selfcheck import FreshReader, SelfCheck, check_checkpoint

TOKENS = torch.tensor([[3, 4, 5], [6, 7, 8]])
EXPECTED = torch.linspace(-8.0, 4.0, 24).view(2, 3, 4)


def checked(monkeypatch: pytest.MonkeyPatch, logits: Tensor, params: int = 1000) -> SelfCheck:
    """The check of a checkpoint of 1000 parameters that is reopened with these logits and parameters."""
    reopened = {"logits": logits, "params": torch.tensor(params)}
    reader = SimpleNamespace(read=lambda *_, **__: reopened)
    monkeypatch.setattr(selfcheck, "FreshReader", lambda: nullcontext(reader))
    written = WrittenCheckpoint(
        folder=Path("model"), layout="uniform", architecture="X", params=1000, bytes=1, needs_code=False, note=""
    )
    return check_checkpoint(written, TOKENS, EXPECTED)


def off_by(difference: float) -> Tensor:
    logits = EXPECTED.clone()
    logits[1, 2, 3] += difference
    return logits


def test_difference_is_relative_to_the_largest_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    check = checked(monkeypatch, off_by(-4e-4))
    assert check.max_relative == pytest.approx(5e-5, rel=1e-2)
    assert check.to_dict() == {"max_relative": check.max_relative, "tokens": 6, "limit": 1e-4, "ok": True}
    with pytest.raises(SelfCheckFailed, match=r"differs from the gated model by 2\.\d+e-04"):
        checked(monkeypatch, off_by(2e-3))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_one_logit_that_is_no_number_fails(broken: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SelfCheckFailed, match="do not use it"):
        checked(monkeypatch, off_by(broken))


@pytest.mark.parametrize("params", [999, 1001])
def test_file_of_another_size_fails(params: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SelfCheckFailed, match=r"opens with .*, 1,000 were written"):
        checked(monkeypatch, EXPECTED, params)


# -- the process that opens the checkpoint ---------------------------------------------------------------------------

HOLDER = """
import sys, time
from prunetune.export.selfcheck import FreshReader
with FreshReader() as reader:
    print(reader._process.pid, flush=True)
    time.sleep(600)
"""


def is_running(pid: int) -> bool:
    """Whether there is such a process that is no zombie."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pid: int) -> None:
    """Fails if the process is still there after a minute."""
    for _ in range(600):
        if not is_running(pid):
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} is still running")


def test_reader_is_gone_with_its_files_where_the_work_beside_it_fails() -> None:
    """It is reaped, too: no zombie is left."""
    reader = FreshReader()
    pid, scratch = reader._process.pid, Path(reader._scratch.name)
    assert is_running(pid)
    with suppress(ModelError), reader:
        raise ModelError("cannot be cut")
    assert reader._process.returncode == -signal.SIGKILL
    assert not Path(f"/proc/{pid}").exists()
    assert not scratch.exists()


def test_reader_ends_by_itself_where_its_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        holder.kill()
    wait_until_gone(pid)


def test_reader_that_died_before_it_was_asked_is_told_as_a_checkpoint_that_does_not_open(tmp_path: Path) -> None:
    written = WrittenCheckpoint(tmp_path / "gone", "", "uniform", False, 0, 0)
    with FreshReader() as reader:
        reader._process.kill()
        reader._process.wait()
        with pytest.raises(SelfCheckFailed, match="gone does not open in a fresh process"):
            reader.read(written, TOKENS)
    with FreshReader() as reader, pytest.raises(SelfCheckFailed, match=r"gone does not open in a fresh process: \w"):
        reader.read(written, TOKENS)
