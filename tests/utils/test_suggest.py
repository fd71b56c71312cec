"""Suggestions for unknown names: the error offers the most similar name, or all accepted ones."""

from __future__ import annotations

import pytest

from prunetune.errors import ConfigError
from prunetune.utils.suggest import did_you_mean, similar_names, validate_name


def test_known_name_is_returned() -> None:
    assert validate_name("rouge", ("rouge", "bleu"), "scorer") == "rouge"


def test_unknown_name_gets_a_suggestion_or_the_list() -> None:
    with pytest.raises(ConfigError, match=r"^scorer 'rogue' is not known; did you mean rouge\?$"):
        validate_name("rogue", ("rouge", "bleu"), "scorer")
    with pytest.raises(ConfigError, match=r"known are rouge, bleu$"):
        validate_name("xyz", ("rouge", "bleu"), "scorer")
    with pytest.raises(ConfigError, match=r"1,000 are known, and none has a name like it$"):
        validate_name("xyz", map(str, range(1000)), "scorer")


def test_likest_names_come_first() -> None:
    assert similar_names("run-2", ["run-1", "else", "run-20"]) == ["run-20", "run-1"]
    assert did_you_mean("run-2", ["else"]) == ""
