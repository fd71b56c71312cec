"""Laws of the check of a written checkpoint: its logits and its number of parameters have to agree."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prunetune.errors import SelfCheckFailed
from prunetune.export import selfcheck
from prunetune.export.checkpoint import WrittenCheckpoint
from prunetune.export.selfcheck import SelfCheck, check_checkpoint

TOKENS = torch.tensor([[3, 4, 5], [6, 7, 8]])
EXPECTED = torch.linspace(-8.0, 4.0, 24).view(2, 3, 4)


def checked(monkeypatch: pytest.MonkeyPatch, logits: Tensor, params: int = 1000) -> SelfCheck:
    """The check of a checkpoint of 1000 parameters that is reopened with these logits and parameters."""
    reopened = {"logits": logits, "params": torch.tensor(params)}
    monkeypatch.setattr(selfcheck, "reopen_in_fresh_process", lambda *_, **__: reopened)
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
