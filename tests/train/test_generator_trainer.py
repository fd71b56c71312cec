"""Laws of the generator's trainer: its learning rate and its clipped gradient."""

from __future__ import annotations

import pytest

from prunetune.train.decisions import CLIP, generator_learning_rate


def test_learning_rate_is_a_fifth_in_the_last_fifth_of_the_search() -> None:
    rates = [generator_learning_rate(step, 750, 1e-3) for step in range(750)]
    assert rates[:600] == [1e-3] * 600
    assert rates[600:] == pytest.approx([2e-4] * 150)
    assert [generator_learning_rate(step, 1, 1e-3) for step in range(2)] == pytest.approx([2e-4] * 2)


def test_clip_is_the_authors() -> None:
    assert CLIP == 3.0
