"""Laws of the passes: packed rows give the losses and gradients of padded batches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import prunetune.train.passes as passes_module
from prunetune.config.recipe import LoraSettings, RunConfig, from_mapping
from prunetune.data import batches
from prunetune.data.batches import group_for_packing, pack_examples, round_up_length
from prunetune.data.encoding import Example
from prunetune.model import sequence_packing
from prunetune.model.sequence_packing import supports_packing
from prunetune.pruning.cut import cut_linears
from prunetune.pruning.masking import gates_from_plan
from prunetune.pruning.sites import find_sites
from prunetune.train.adapters import add_adapters, trainable_parameters
from prunetune.train.forward import Teacher
from prunetune.train.passes import PackedPasses, PaddedPasses, build_passes
from support.models import ALL_FAMILIES, random_plan, tiny, with_lora
from support.passes import assert_same, gradients


def examples(count: int = 7, longest: int = 20) -> list[Example]:
    rng = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, longest, (count,), generator=rng).tolist()
    return [
        Example(tuple(torch.randint(3, 90, (n,), generator=rng).tolist()), 1 + index % (n - 2), f"row {index}")
        for index, n in enumerate(lengths)
    ]


CHAT = Example(tuple(range(3, 15)), 2, "chat", no_loss=((4, 7), (9, 10)))  # three turns carry loss


def config_of(micro_tokens: int = 10_000, logits: float = 1.0, hidden: float = 1.0) -> RunConfig:
    return from_mapping({"train": {"micro_tokens": micro_tokens}, "distill": {"logits": logits, "hidden": hidden}})


@pytest.fixture(autouse=True)
def _short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round row lengths up to 32 tokens: the default of a thousand is for GPUs."""
    monkeypatch.setattr(batches, "TOKEN_STEP", 32)
    monkeypatch.setattr(batches, "LABEL_STEP", 32)


# Soft-capped scores; keyword arguments that end before attention; attention of their own; sinks.
UNPACKED = ("gemma2", "nemotron", "stablelm", "falcon", "bloom", "gpt_oss")
MaskedModel = tuple[Any, tuple[Any, ...], dict[str, Tensor]]


@pytest.fixture(params=[family for family in ALL_FAMILIES if family not in UNPACKED])
def masked_model(request: pytest.FixtureRequest) -> MaskedModel:
    model = tiny(request.param, groups=2, ratio=2)
    sites = tuple(find_sites(model))
    gates = gates_from_plan(random_plan(model), sites)
    model.requires_grad_(False)
    return with_lora(model), sites, gates


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_supports_packing_is_false_for_families_that_cannot(family: str) -> None:
    model = tiny(family).train()
    assert supports_packing(model) is (family not in UNPACKED)
    assert model.training


def test_model_that_attends_across_sequences_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sequence_packing._attend_one_by_one

    def across(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, *rest: Any) -> Tensor:
        return whole(query, key, value, bounds[[0, -1]], *rest)

    assert supports_packing(tiny())
    monkeypatch.setattr(sequence_packing, "_attend_one_by_one", across)
    assert not supports_packing(tiny())


def test_weak_attention_sinks_are_not_packed() -> None:
    model = tiny("gpt_oss")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(-4.0)
    assert not supports_packing(model.to(torch.bfloat16))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_half_precision_with_adapters_can_be_packed(family: str) -> None:
    model = tiny(family).to(torch.bfloat16).requires_grad_(False)
    add_adapters(model, find_sites(model), LoraSettings(rank=4), seed=0)
    assert supports_packing(model)


@pytest.mark.parametrize("seed", range(3))
def test_rounding_error_is_not_taken_for_attention_across_sequences(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 a logit may be off by a tenth and more of the largest one, packed or not."""
    model = tiny("llama", layers=24).to(torch.bfloat16)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.4)
    assert supports_packing(model)
    whole = sequence_packing._attend_one_by_one
    monkeypatch.setattr(
        sequence_packing, "_attend_one_by_one", lambda q, k, v, bounds, *rest: whole(q, k, v, bounds[[0, -1]], *rest)
    )
    assert not supports_packing(model)


@pytest.mark.parametrize("weights", [None, (1.0, 0.0), (0.0, 1.0), (0.5, 2.0), (0.5, 2.0, False, False, 0.4)])
@pytest.mark.parametrize("micro_tokens", [10_000, 25])
def test_packed_equals_padded(masked_model: MaskedModel, micro_tokens: int, weights: tuple[Any, ...] | None) -> None:
    model, sites, gates = masked_model
    batch = [*examples(), Example(tuple(range(3, 12)), 9, "a text without labels")]
    logits, hidden, *rest = weights or (0.0, 0.0)
    teacher = Teacher(tiny(model.config.model_type, seed=5), *rest) if weights else None
    config = config_of(micro_tokens, logits, hidden)
    padded, packed = (kind(model, sites, 0, config, teacher) for kind in (PaddedPasses, PackedPasses))
    for given in (None, gates):
        assert packed.score(batch, given) == pytest.approx(padded.score(batch, given), rel=1e-5)
        losses, grads = [], []
        for passes in (padded, packed):
            losses.append(passes.tune(batch, given))
            grads.append(gradients(model))
        assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-6)
        assert_same(*grads)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_dropout_acts_on_adapters_only(family: str) -> None:
    dropouts = {"attention_dropout": 0.9} | ({"dropout": 0.9} if family == "opt" else {})
    model = with_lora(tiny(family, **dropouts)).eval()
    padded, packed = (kind(model, tuple(find_sites(model)), 0, config_of()) for kind in (PaddedPasses, PackedPasses))
    plain = padded.tune(examples(), None)["loss"]
    assert plain == pytest.approx(packed.tune(examples(), None)["loss"], rel=1e-5)
    assert plain == pytest.approx(padded.score(examples(), None), rel=1e-5)
    for name, module in model.named_modules():
        if name.endswith("lora_dropout"):
            module["default"] = torch.nn.Dropout(0.9).eval()
    assert abs(padded.tune(examples(), None)["loss"] / plain - 1) > 1e-3
    assert padded.score(examples(), None) == pytest.approx(plain, rel=1e-5)


def test_teacher_gets_its_share_and_all_unlabelled_examples() -> None:
    model, teacher = with_lora(tiny()), tiny(seed=5)
    bare = [Example(tuple(range(3, 9 + index)), 6 + index, f"text {index}") for index in range(2)]
    batch = [*examples(), *bare]
    for share, taught in ((0.1, bare), (0.3, [*bare, batch[0]]), (1.0, batch)):
        passes = PaddedPasses(model, find_sites(tiny()), 0, config_of(), Teacher(teacher, share=share))
        losses, grads = passes.tune(batch, None), gradients(model)
        alone = PaddedPasses(model, find_sites(tiny()), 0, config_of(), Teacher(teacher))
        assert losses["distance"] == pytest.approx(alone.tune(taught, None)["distance"], rel=1e-5)
        of_seen = gradients(model)
        labels = PaddedPasses(model, find_sites(tiny()), 0, config_of())
        labels.tune(taught, None)
        of_their_labels = gradients(model)
        assert losses["loss"] == pytest.approx(labels.tune(batch, None)["loss"], rel=1e-5)
        whole = gradients(model)
        assert_same({name: whole[name] + of_seen[name] - of_their_labels[name] for name in grads}, grads)


@pytest.mark.parametrize("kind", [PaddedPasses, PackedPasses])
def test_untuned_teacher_counts_only_on_unlabelled_tokens(kind: Any) -> None:
    batch = [*examples(), Example(tuple(range(3, 9)), 6, "text"), CHAT]
    student, teacher = tiny(seed=5), tiny(seed=6)
    tokens = sum(len(example.token_ids) for example in batch)
    expected = 0.0
    for example in batch:
        ids = torch.tensor([example.token_ids])
        with torch.no_grad():
            student_output, teacher_output = (model(ids, output_hidden_states=True) for model in (student, teacher))
        logs = [result.logits[0].log_softmax(-1) for result in (student_output, teacher_output)]
        apart = torch.nn.functional.kl_div(*logs, reduction="none", log_target=True).sum(-1)
        pairs = zip(student_output.hidden_states[1:], teacher_output.hidden_states[1:], strict=True)
        errors = [
            (student_hidden - teacher_hidden)[0].square().sum(-1) / teacher_hidden[0].square().sum(-1)
            for student_hidden, teacher_hidden in pairs
        ]
        labels = {at for start, end in example.loss_spans for at in range(start, end)}
        taught_positions = [at for at in range(len(example.token_ids)) if at + 1 not in labels]
        expected += float((0.5 * apart + 2 * torch.stack(errors).mean(0))[taught_positions].sum()) / tokens
    config = config_of(logits=0.5, hidden=2.0)
    passes = kind(with_lora(student), find_sites(tiny()), 0, config, Teacher(teacher, is_tuned=False))
    for name, parameter in trainable_parameters(passes.model).items():
        if ".lora_B." in name:
            parameter.data.zero_()
    assert passes.tune(batch, None)["distance"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", [PaddedPasses, PackedPasses])
def test_loss_counts_on_every_turn_of_a_chat_and_on_nothing_between(kind: Any) -> None:
    batch = [*examples(3), CHAT, replace(CHAT, answer_start=len(CHAT.token_ids))]
    expected, count, model = 0.0, 0, with_lora(tiny(seed=5))
    for example in batch[:-1]:
        ids = torch.tensor(example.token_ids)
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        positions = range(2, 12) if example is CHAT else range(example.answer_start, len(ids))
        counted = [at - 1 for at in positions if example is not CHAT or at not in (4, 5, 6, 9)]
        expected, count = expected + float(losses[counted].sum()), count + len(counted)
    assert (CHAT.loss_tokens, CHAT.loss_spans, batch[-1].loss_spans) == (6, [(2, 4), (7, 9), (10, 12)], [])
    passes = kind(model, find_sites(tiny()), 0, config_of())
    assert passes.score(batch, None) == pytest.approx(expected / count, rel=1e-5)


def test_gate_gradients_are_equal_packed_and_padded(masked_model: MaskedModel) -> None:
    model, sites, gates = masked_model
    padded, packed = (kind(model, sites, 0, config_of()) for kind in (PaddedPasses, PackedPasses))
    (loss, padded_gradients), (again, packed_gradients) = (
        passes.gate_gradients(examples(), gates) for passes in (padded, packed)
    )
    assert again == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert_same(padded_gradients, packed_gradients)
    assert not gradients(model), "the search leaves no gradient at the adapters"


def test_packed_equals_padded_once_cut(masked_model: MaskedModel) -> None:
    model, sites, _ = masked_model
    cut_linears(model, random_plan(model), sites=sites)
    padded, packed = (kind(model, sites, 0, config_of()) for kind in (PaddedPasses, PackedPasses))
    losses, grads = [], []
    for passes in (padded, packed):
        losses.append(passes.tune(examples(), None))
        grads.append(gradients(model))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-6)
    assert_same({name: grads[0].get(name, torch.zeros_like(value)) for name, value in grads[1].items()}, grads[1])


def test_packed_pass_leaves_no_hook_on_the_model() -> None:
    model = with_lora(tiny())
    before = model.config._attn_implementation
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    PackedPasses(model, tuple(find_sites(tiny())), 0, config_of()).score(examples(), None)
    assert model.config._attn_implementation == before
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == hooks


def test_pack_holds_every_token_once() -> None:
    batch = examples()
    row = pack_examples(batch, 0, max_sequences=9)
    edges = row.cu_seq_lens.tolist()
    assert edges == sorted(edges)
    assert edges[-1] == row.input_ids.numel()
    assert len(edges) == 11
    for example, start, end in zip(batch, edges, edges[1:], strict=False):
        assert row.input_ids[0, start:end].tolist() == list(example.token_ids)
        assert row.position_ids[0, start:end].tolist() == list(range(len(example.token_ids)))
    targets = [token for example in batch for token in example.token_ids[example.answer_start :]]
    assert row.targets[row.targets >= 0].tolist() == targets
    assert row.target_tokens == len(targets)
    read = row.input_ids[0, row.prediction_positions[: row.target_tokens] + 1]
    assert read.tolist() == targets


@pytest.mark.parametrize("length", [1, 512, 513, 5_000, 100_000])
def test_row_lengths_are_rounded_up(length: int) -> None:
    width = round_up_length(length, 512)
    assert length <= width <= max(length + 512, 1.125 * length)
    assert round_up_length(width, 512) == width


def test_groups_for_packing_hold_at_most_the_limit() -> None:
    batch = examples(30)
    for limit in (1, 25, 60, 10_000):
        lists = group_for_packing(batch, limit)
        assert [example for group in lists for example in group] == batch
        assert all(len(group) == 1 or sum(len(example.token_ids) for example in group) <= limit for group in lists)


def test_build_passes_pads_on_a_cpu() -> None:
    model = with_lora(tiny())
    assert isinstance(build_passes(model, (), 0, config_of()), PaddedPasses)


def test_soft_capped_attention_is_not_packed() -> None:
    model = tiny()
    assert supports_packing(model)
    model.config.attn_logit_softcapping = 50.0
    assert not supports_packing(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:DeprecationWarning",
    "ignore:\\s*Online softmax:UserWarning",
    "ignore:.*is not a leaf:UserWarning",
)
@pytest.mark.parametrize("compile", ["off", "on"])
def test_recorded_passes_equal_padded_ones_on_a_gpu_in_two_threads(compile: str) -> None:
    config = from_mapping({"train": {"compile": compile}, "distill": {"logits": 3.0, "hidden": 10.0}})

    def both(seed: int) -> list[tuple[float, dict[str, Tensor]]]:
        with torch.cuda.stream(torch.cuda.Stream()):
            model = tiny(seed=seed).to("cuda", torch.bfloat16).requires_grad_(False)
            sites, teacher = tuple(find_sites(model)), Teacher(tiny(seed=9).to("cuda", torch.bfloat16))
            with_lora(model, seed=seed)
            found = []
            for kind in (PaddedPasses, PackedPasses):
                passes = kind(model, sites, 0, config, teacher)
                for _ in range(3):  # run as is, recorded, replayed
                    loss = passes.tune(examples(), None)["loss"]
                    found.append((loss, gradients(model)))
            return found

    with ThreadPoolExecutor(2) as pool:
        for (loss, grads), *others in pool.map(both, (1, 2)):
            for other, more in others:
                assert other == pytest.approx(loss, rel=2e-2)
                for name, value in grads.items():
                    torch.testing.assert_close(more[name], value, rtol=0.1, atol=0.05 * float(value.abs().max()))


def test_short_stages_have_fewer_lengths_of_rows_and_the_same_losses() -> None:
    model = tiny("llama").requires_grad_(False)
    sites = find_sites(model)
    add_adapters(model, sites, LoraSettings(rank=4), seed=0)
    passes, losses, lengths = PackedPasses(model, sites, 0, config_of()), [], []
    passes.recorder.run = lambda key, function, inputs: (lengths.append(key[2]), function(inputs))  # type: ignore
    for steps in (5000, 5):
        passes.use_sites(sites, steps)
        losses.append([passes.tune(examples()[:count], None)["loss"] for count in range(1, 6)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(lengths[:5])) > len(set(lengths[5:])) == 1


def test_rows_of_a_large_model_are_hardly_padded_with_a_teacher_on_half_of_a_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passes_module, "LARGE_MODEL_PARAMS", 1)
    model = tiny("llama").requires_grad_(False)
    sites = find_sites(model)
    add_adapters(model, sites, LoraSettings(rank=4), seed=0)
    teacher = Teacher(tiny("llama", seed=1), is_tuned=False, share=0.5)
    config = from_mapping({"train": {"compile": "off"}})
    passes, rows = PackedPasses(model, sites, 0, config, teacher), []
    passes.recorder.run = lambda key, function, inputs: (rows.append(inputs), function(inputs))  # type: ignore
    passes.use_sites(sites, 5)
    passes.tune(examples(), None)
    assert len(rows) == 2
    for input_ids, *_ in rows:
        assert input_ids.shape[1] - int((input_ids != 0).sum()) < 16


@pytest.mark.parametrize(("smallest_large", "pays_from"), [(1, 300), (10**9, 1000)])
def test_passes_compile_from_the_steps_that_pay_for_the_size_of_the_model(
    smallest_large: int, pays_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes_module, "LARGE_MODEL_PARAMS", smallest_large)
    model = tiny("llama")
    for steps in (pays_from - 1, pays_from):
        passes = PackedPasses(model, find_sites(model), 0, from_mapping({"train": {"steps": steps}}))
        assert passes.compiles == (steps == pays_from)
