"""Law of model folders whose JSON files hold anything: a model is made of them, or they are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunetune.model.loading import load_meta_model, load_tokenizer
from prunetune.model.provenance import read_license
from prunetune.pruning.sites import find_sites
from support.evaluation import characters
from support.fuzz import ODD, damaged, fuzzed, refused_or_fine, torn
from support.models import tiny

FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tiny("llama", layers=1).save_pretrained(path)
    characters().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_any_json_is_a_model_or_refused(name: str, folder: Path) -> None:
    text = (folder / name).read_bytes()

    @given(
        content=st.one_of(
            damaged(json.loads(text)).map(json.dumps).map(str.encode), torn(text), ODD.map(json.dumps).map(str.encode)
        )
    )
    @fuzzed(8)
    def check(content: bytes) -> None:
        (folder / name).write_bytes(content)
        with refused_or_fine():
            find_sites(load_meta_model(str(folder)))
        with refused_or_fine():
            load_tokenizer(str(folder))("a b")
        with refused_or_fine():
            read_license(str(folder))

    check()
    (folder / name).write_bytes(text)
