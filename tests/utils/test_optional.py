"""Optional packages: one that is missing is named with its use and the command that installs it."""

from __future__ import annotations

import pytest

from prunetune.errors import MissingPackage
from prunetune.utils.optional import import_optional, is_installed, require_installed


def test_missing_package_names_use_and_extra() -> None:
    assert is_installed("json")
    assert import_optional("json", extra="eval", use="x").__name__ == "json"
    require_installed("json", "errno", extra="eval", use="x")
    with pytest.raises(
        MissingPackage, match=r"^scorer x needs the package no_such_a; run: pip install 'jsonschema\S+' 'sacrebleu\S+'"
    ):
        import_optional("no_such_a", extra="eval", use="scorer x")
    with pytest.raises(
        MissingPackage, match=r"^onnx needs no-such-a, no-such-b; run: pip install 'onnx>=\S+' 'onnxrun"
    ):
        require_installed("no_such_a", "json", "no_such_b", extra="onnx", use="onnx")
