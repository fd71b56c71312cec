"""The streamed cut: the files of the whole cut to the bit, with one layer in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from prunetune.export.checkpoint import write_checkpoint
from prunetune.export.selfcheck import FreshReader, compute_logits
from prunetune.export.streamed_cut import StreamedModel, cut_streamed
from prunetune.model.loading import load_empty_model, open_safetensors
from prunetune.pruning.cut import cut
from prunetune.pruning.masking import masked
from prunetune.pruning.sites import find_sites
from support.evaluation import characters
from support.models import FAMILIES, random_plan, relative, tiny, tokens
from support.streamed import tensors_of

DEFAULT_UNITS = ("kv-groups", "mlp-channels")


def scale_up_projection(name: str, weight: Tensor) -> Tensor:
    """Scale the weights of one kind of linear, in place of merging adapters."""
    return weight * 1.7 if name.endswith(("up_proj.weight", "fc.weight")) else weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "units", "tied"),
    [
        *((family, DEFAULT_UNITS, False) for family in FAMILIES),
        ("gpt2", DEFAULT_UNITS, True),
        ("llama", ("layers", *DEFAULT_UNITS), True),
    ],
)
def test_cut_streamed_writes_the_files_of_the_whole_cut(
    family: str, units: tuple[str, ...], tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    dense = tiny(family, tie_word_embeddings=tied).to(dtype)
    dense.save_pretrained(tmp_path / "dense")
    plan, sites = random_plan(dense, units=units, seed=2), tuple(find_sites(dense, units))
    whole: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            weight.copy_(scale_up_projection(name, weight).to(dtype).float())
    with masked(whole, plan, sites=sites):
        expected = compute_logits(whole, tokens())
    small = cut(whole, plan, sites=sites).to(dtype)
    expected_checkpoint = write_checkpoint(
        small, characters(), plan, sites, tmp_path / "whole", layout="per-layer", card=""
    )

    streamed = StreamedModel(
        load_empty_model(str(tmp_path / "dense")),
        open_safetensors(str(tmp_path / "dense")),
        scale_up_projection,
    )
    assert streamed.stored.has_all(name for name, _ in streamed.model.named_parameters())
    shards = tmp_path / "shards"
    shards.mkdir()
    assert torch.equal(cut_streamed(streamed, plan, sites, tokens(), shards), expected)
    assert all(weight.is_meta for weight in streamed.model.parameters())
    written = write_checkpoint(
        streamed.model, characters(), plan, sites, tmp_path / "streamed", layout="per-layer", card="", shards=shards
    )
    assert written.params == expected_checkpoint.params
    expected_tensors, tensors = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "streamed")
    assert expected_tensors.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in expected_tensors.items())
    for name in ("config.json", "modeling_pruned.py", "plan.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()


def test_cut_streamed_has_one_layer_in_memory_at_a_time(tmp_path: Path) -> None:
    dense = tiny()
    dense.save_pretrained(tmp_path / "dense")
    streamed = StreamedModel(
        load_empty_model(str(tmp_path / "dense")),
        open_safetensors(str(tmp_path / "dense")),
        scale_up_projection,
    )
    layers, loaded_layers = streamed.model.model.layers, []
    for layer in layers:
        layer.mlp.register_forward_hook(
            lambda *_: loaded_layers.append(sum(not next(layer.parameters()).is_meta for layer in layers))
        )
    (tmp_path / "shards").mkdir()
    cut_streamed(streamed, random_plan(dense), find_sites(dense), tokens(), tmp_path / "shards")
    assert loaded_layers == [1, 1, 1]


def test_streamed_checkpoint_opens_streamed_in_a_fresh_process(tmp_path: Path) -> None:
    """The folder's generated code opens it."""
    dense = tiny(tie_word_embeddings=True)
    dense.save_pretrained(tmp_path / "dense")
    plan, sites = random_plan(dense), tuple(find_sites(dense))
    streamed = StreamedModel(
        load_empty_model(str(tmp_path / "dense")),
        open_safetensors(str(tmp_path / "dense")),
        scale_up_projection,
    )
    (tmp_path / "shards").mkdir()
    expected = cut_streamed(streamed, plan, sites, tokens(), tmp_path / "shards")
    written = write_checkpoint(
        streamed.model, characters(), plan, sites, tmp_path / "model", layout="per-layer", card="",
        shards=tmp_path / "shards",
    )  # fmt: skip
    with FreshReader() as reader:
        reopened = reader.read(written, tokens(), streamed=True)
    assert int(reopened["params"]) == written.params
    assert relative(reopened["logits"], expected) < 1e-5


def test_reader_leaves_out_tensors_of_renamed_or_damaged_files(tmp_path: Path) -> None:
    """`has_all` is false if tensors have other names than the class, or if files cannot be read."""
    tiny("mixtral").save_pretrained(tmp_path / "dense")  # stored expert by expert
    model, stored = load_empty_model(str(tmp_path / "dense")), open_safetensors(str(tmp_path / "dense"))
    assert not stored.has_all(name for name, _ in model.named_parameters())
    for file in (tmp_path / "dense").glob("*.safetensors"):
        file.write_bytes(b"torn")
    assert open_safetensors(str(tmp_path / "dense")).files == {}
