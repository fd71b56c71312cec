"""Each two-stage method equals its formula by hand, ignores padding, and leaves the model unchanged."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prunetune import Plan, find_sites
from prunetune.baselines import BASELINES, Calibration, bias_compensation, plans
from prunetune.config.recipe import from_mapping
from prunetune.cost.budget_limits import BudgetLimits
from prunetune.data.batches import Batch, collate
from prunetune.data.encoding import Example
from prunetune.errors import ConfigError
from prunetune.pruning.cut import RemovedAttention, add_biases, cut, cut_linears
from prunetune.pruning.masking import gates_from_plan, masked
from prunetune.pruning.units import kept_params, prunable_params
from prunetune.search.plan_rules import PlanConstraints
from prunetune.train.forward import Teacher
from prunetune.train.passes import build_passes
from support.models import FAMILIES, random_plan, relative, tiny, tokens, with_lora

LENGTHS = (9, 6, 7)


@pytest.fixture(autouse=True)
def _few_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "GENERATIONS", 2)


def rows() -> list[Tensor]:
    return [tokens(batch=1, length=length, seed=length)[0] for length in LENGTHS]


def examples() -> list[Example]:
    """The rows, whose last three tokens are the answer."""
    return [
        Example(id=str(i), token_ids=tuple(row.tolist()), answer_start=len(row) - 3) for i, row in enumerate(rows())
    ]


def batch_of(ids: list[Tensor], pad: int = 0, extra: int = 0) -> Batch:
    """A batch whose last three tokens of each row are labels, with `extra` columns of padding."""
    width = max(map(len, ids)) + extra
    labels = [torch.cat([torch.full((len(row) - 3,), -100), row[-3:]]) for row in ids]
    return Batch(
        torch.stack([F.pad(row, (0, width - len(row)), value=pad) for row in ids]),
        torch.stack([F.pad(row, (0, width - len(row)), value=-100) for row in labels]),
        3 * len(ids),
        tuple(map(len, ids)),
        tuple(map(str, range(len(ids)))),
    )


def calibration(model: Any, *, pad: int = 0, extra: int = 0) -> Calibration:
    model.requires_grad_(False)
    ids, sites = rows(), find_sites(model)
    config = from_mapping({"search": {"init_batches": 2, "share": 0.1}, "train": {"steps": 30}})
    passes = build_passes(model, sites, pad, config)

    def gate_gradients(step: int, gates: Any) -> Any:
        with torch.enable_grad():
            return passes.gate_gradients(examples()[:2] if step % 2 == 0 else examples()[2:], gates)[1]

    batches = (batch_of(ids[:2], pad, extra), batch_of(ids[2:], pad, extra))
    return Calibration(model, sites, batches, config, PlanConstraints(align=8), gate_gradients)


def scores_of(name: str, given: Calibration) -> dict[str, Tensor]:
    """A method's scores; of a plan, its gates."""
    result = BASELINES[name](given)
    return gates_from_plan(result, given.sites) if isinstance(result, Plan) else dict(result)


def inputs_of(model: Any, name: str) -> Tensor:
    """Inputs of a linear, example by example, so without padding: float64 [tokens, C]."""
    rows_read: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, inputs: rows_read.append(inputs[0][0].double())
    )
    with torch.no_grad():
        for row in rows():
            model(row[None])
    handle.remove()
    return torch.cat(rows_read)


def loss_of(model: Any, row: Tensor) -> Tensor:
    return F.cross_entropy(model(row[None]).logits[0, -4:-1], row[-3:])


def entries_of(model: Any, site: Any, unit: int, values: dict[str, Tensor]) -> list[Tensor]:
    """A unit's entries of {parameter: values}."""
    entries = []
    for cut_ in site.producers:
        run = slice(unit * cut_.rows_per_unit, (unit + 1) * cut_.rows_per_unit)
        entries += [values[key][run] for end in ("weight", "bias") if (key := f"{cut_.module}.{end}") in values]
    run = slice(unit * site.consumer.rows_per_unit, (unit + 1) * site.consumer.rows_per_unit)
    return [*entries, values[f"{site.consumer.module}.weight"][:, run]]


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("family", [*FAMILIES, "opt", "gpt2"])
def test_scores_of_every_family_repeat_and_leave_the_model_unchanged(family: str, name: str) -> None:
    model = tiny(family)
    given = calibration(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scores, again = scores_of(name, given), scores_of(name, given)
    for site in given.sites:
        assert scores[site.name].shape == (site.units,)
        assert scores[site.name].dtype == torch.float32
        assert scores[site.name].isfinite().all()
        assert torch.equal(scores[site.name], again[site.name])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert isinstance(given.select(scores), Plan)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_compensation_and_cut_give_a_model_on_budget(layout: str, name: str) -> None:
    model = tiny()
    given = calibration(model)
    given = replace(given, constraints=replace(given.constraints, layout=layout))
    result = BASELINES[name](given)
    plan = result if isinstance(result, Plan) else given.select(result)
    assert 0.4 < kept_params(given.sites, plan) / prunable_params(given.sites) <= 0.6
    assert (layout == "per-layer") or len({len(kept) for site, kept in plan.kept.items() if site.endswith("mlp")}) == 1
    if BASELINES[name].compensate:
        BASELINES[name].compensate(given, plan)
    with torch.no_grad(), masked(model, plan):
        gated = model(tokens()).logits
    assert relative(cut(model, plan)(tokens()).logits.detach(), gated) < 1e-4


@pytest.mark.parametrize("name", BASELINES)
def test_padding_changes_no_score(name: str) -> None:
    model = tiny("llama")
    plain, padded = scores_of(name, calibration(model)), scores_of(name, calibration(model, pad=5, extra=4))
    for site, score in plain.items():
        torch.testing.assert_close(padded[site], score, rtol=1e-3, atol=1e-7)


# Greedy removal (obs) and plans choose between units that are nearly equal here: there a rounding changes all.
@pytest.mark.parametrize("name", [name for name in BASELINES if name not in ("obs", "generator", "evolution")])
def test_bfloat16_scores_are_close(name: str) -> None:
    model = tiny("llama")
    exact, half = scores_of(name, calibration(model)), scores_of(name, calibration(model.bfloat16()))
    for site, score in exact.items():
        assert half[site].dtype == torch.float32
        torch.testing.assert_close(half[site], score, rtol=0.2, atol=0.1 * float(score.abs().max()))


def test_random_has_a_stream_for_each_seed_and_site() -> None:
    model = tiny("llama")
    given = calibration(model)
    draws = [BASELINES["random"](replace(given, config=replace(given.config, seed=seed))) for seed in (0, 1)]
    first = [tuple(draw[site.name][:2].tolist()) for draw in draws for site in given.sites]
    assert len(set(first)) == len(first)
    assert all(0 <= value < 1 for draw in draws for score in draw.values() for value in score.tolist())


def test_magnitude_is_root_mean_square() -> None:
    model = tiny("qwen2")
    scores = BASELINES["magnitude"](calibration(model))
    for site in find_sites(model):
        entries = torch.cat([entry.flatten() for entry in entries_of(model, site, 1, dict(model.named_parameters()))])
        assert len(entries) == site.unit_params
        assert float(scores[site.name][1]) == pytest.approx(float(entries.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("name", ["magnitude", "taylor"])
@pytest.mark.parametrize(
    ("family", "outer", "inner"), [("mixtral", "experts", "expert-channels"), ("qwen3", "kv-groups", "query-heads")]
)
def test_score_includes_the_units_inside(name: str, family: str, outer: str, inner: str) -> None:
    model = tiny(family)
    alone, both = (replace(calibration(model), sites=find_sites(model, kinds)) for kinds in ([outer], [outer, inner]))
    scores = BASELINES[name](both)
    for site, values in BASELINES[name](alone).items():
        torch.testing.assert_close(scores[site], values)


@pytest.mark.parametrize("name", ["magnitude", "taylor", "fisher", "gate-gradients", "obs"])
def test_scores_are_divided_by_prices_under_limits(name: str) -> None:
    plain = calibration(tiny())
    spans = {site.name: 4.0 * site.total_unit_params for site in plain.sites}
    other = BASELINES[name](
        replace(plain, constraints=PlanConstraints(limits=BudgetLimits((), prices_with_children=spans)))
    )
    for site, values in BASELINES[name](plain).items():
        torch.testing.assert_close(other[site], values / (2 if name == "magnitude" else 4))


def test_wanda_ranks_weight_times_input() -> None:
    model = tiny("llama")
    scores = BASELINES["wanda-sp"](calibration(model))
    for site in find_sites(model):
        inputs = inputs_of(model, site.consumer.module)
        weight = model.get_submodule(site.consumer.module).weight.double()
        per = site.consumer.rows_per_unit
        raw = [
            sum(float(weight[:, j].abs().sum() * inputs[:, j].norm()) for j in range(u * per, (u + 1) * per))
            for u in range(site.units)
        ]
        expected = [(sum(other < value for other in raw) + 0.5) / site.units for value in raw]
        assert scores[site.name].tolist() == pytest.approx(expected, abs=1e-6)


def test_flap_standardises_fluctuation() -> None:
    model = tiny("llama")
    scores = BASELINES["flap"](calibration(model))
    for site in find_sites(model):
        weight = model.get_submodule(site.consumer.module).weight.double()
        columns = inputs_of(model, site.consumer.module).var(0) * weight.square().sum(0)
        z = (columns - columns.mean()) / columns.std()
        per = site.consumer.rows_per_unit
        expected = torch.stack([z[u * per : (u + 1) * per].mean() for u in range(site.units)])
        torch.testing.assert_close(scores[site.name].double(), expected, rtol=1e-3, atol=1e-4)


def test_flap_scores_of_equal_columns_are_zero() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    scores = BASELINES["flap"](calibration(model))
    assert not scores["model.layers.1.mlp"].any()
    assert scores["model.layers.2.mlp"].any()


def test_taylor_sums_weight_times_gradient() -> None:
    model = tiny("qwen2")
    scores = BASELINES["taylor"](calibration(model))
    twin = copy.deepcopy(model).requires_grad_(True)
    sum(loss_of(twin, row) / 3 for row in rows()).backward()
    products = {key: (p.grad * p).detach().abs() for key, p in twin.named_parameters()}
    for site in find_sites(model):
        total = sum(float(product.sum()) for product in entries_of(model, site, 1, products))
        assert float(scores[site.name][1]) == pytest.approx(total / site.unit_params, rel=1e-3)


def test_fisher_is_the_mean_squared_gradient_of_a_gate() -> None:
    model = tiny("llama").double()
    scores = BASELINES["fisher"](calibration(model))
    step = 1e-2  # norms and logits are float32 inside: a smaller step drowns in rounding
    for site in find_sites(model)[:2]:
        weight = model.get_submodule(site.consumer.module).weight
        columns, gradients = slice(0, site.consumer.rows_per_unit), []
        whole = weight.clone()
        for row in rows():
            ends = []
            for scale in (1 + step, 1 - step):
                weight[:, columns] = whole[:, columns] * scale
                ends.append(float(loss_of(model, row)))
            gradients.append((ends[0] - ends[1]) / (2 * step))
        weight.copy_(whole)
        expected = sum(gradient**2 for gradient in gradients) / len(gradients) / site.unit_params
        assert float(scores[site.name][0]) == pytest.approx(expected, rel=1e-3)


def test_block_influence_is_one_minus_the_cosine_of_a_layer() -> None:
    model = tiny("llama")
    scores = BASELINES["block-influence"](calibration(model))
    ends = [model(row[None], output_hidden_states=True).hidden_states for row in rows()]
    before, after = (torch.cat([states[layer][0] for states in ends]) for layer in (1, 2))
    cosine = (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
    for block in ("self_attn", "mlp"):
        influence = scores[f"model.layers.1.{block}"]
        assert influence.unique().numel() == 1
        assert float(influence[0]) == pytest.approx(float(1 - cosine.mean()), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_bias_compensation_is_exact_for_constant_inputs(family: str) -> None:
    model = tiny(family)
    embedding = model.get_input_embeddings().weight.data
    embedding.copy_(embedding[7].clone().expand_as(embedding))
    given, plan = calibration(model), random_plan(model)
    plan = Plan({**plan.kept, "model.layers.1.self_attn": ()}, plan.units)
    biases = bias_compensation(given, plan)
    with torch.no_grad():
        dense = model(tokens()).logits
        plain = copy.deepcopy(model)
        cut_linears(plain, plan)
        assert relative(plain(tokens()).logits, dense) > 0.01
        add_biases(model, biases)
        cut_linears(model, plan)
        assert relative(model(tokens()).logits, dense) < 1e-4
    assert not any(p.requires_grad for p in model.parameters())


def test_compensated_biases_survive_adapters_and_the_cut() -> None:
    model = tiny("llama")
    given, plan = calibration(model), random_plan(model)
    plan = Plan({**plan.kept, "model.layers.1.self_attn": ()}, plan.units)
    biases = bias_compensation(given, plan)
    add_biases(model, biases)
    with_lora(model)
    with torch.no_grad():
        with masked(model, plan):
            gated = model(tokens()).logits
        cut(model, plan)
        assert relative(model(tokens()).logits, gated) < 1e-4
    torch.testing.assert_close(model.model.layers[1].self_attn.constant, biases["model.layers.1.self_attn.o_proj"])
    assert not model.model.layers[0].mlp.down_proj.bias.requires_grad


def test_biases_are_added_to_existing_ones() -> None:
    model = tiny("llama", attention_bias=True)
    linear = model.model.layers[0].self_attn.o_proj
    before = linear.bias.detach().clone()
    add_biases(model, {"model.layers.0.self_attn.o_proj": torch.ones(48)})
    torch.testing.assert_close(linear.bias.detach(), before + 1)
    assert not RemovedAttention().state_dict()


def test_batches_of_these_tests_equal_collate() -> None:
    assert torch.equal(collate(examples(), 0).labels, batch_of(rows()).labels)


def test_gate_gradients_are_those_of_answers_teacher_and_texts() -> None:
    """The gradient of all weighted terms at a gate by finite differences, squared and averaged over batches."""
    model, teacher = tiny("llama"), tiny("llama", seed=5).requires_grad_(False)
    given = calibration(model)
    text = replace(examples()[2], answer_start=LENGTHS[2])  # no label: only the teacher counts
    config = from_mapping({"distill": {"logits": 2.0, "hidden": 3.0, "share": 1}, "search": {"init_batches": 2}})
    passes = build_passes(model, given.sites, 0, config, Teacher(teacher))
    batches = [examples()[:1], [examples()[1], text]]

    def gate_gradients(step: int, gates: Any) -> Any:
        with torch.enable_grad():
            return passes.gate_gradients(batches[step], gates)[1]

    scores = BASELINES["gate-gradients"](replace(given, config=config, gate_gradients=gate_gradients))

    def training_loss(batch: list[Example]) -> float:
        """Written out: mean over labels, and over tokens."""
        answers, divergence, distance, labels, tokens_seen = 0.0, 0.0, 0.0, 0, 0
        for example in batch:
            ids = torch.tensor([example.token_ids])
            ours, theirs = (m(ids, output_hidden_states=True) for m in (model, teacher))
            logs, taught = ours.logits[0].log_softmax(-1), theirs.logits[0].log_softmax(-1)
            count = ids.shape[1] - example.answer_start
            if count:
                answers += float(F.cross_entropy(ours.logits[0, -count - 1 : -1], ids[0, -count:], reduction="sum"))
            divergence += float((taught.exp() * (taught - logs)).sum())
            pairs = list(zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True))
            distance += sum(float(((a - b).square().sum(-1) / b.square().sum(-1)).sum()) for a, b in pairs) / len(pairs)
            labels, tokens_seen = labels + count, tokens_seen + ids.shape[1]
        return answers / labels + (2.0 * divergence + 3.0 * distance) / tokens_seen

    step = 1e-2
    site = given.sites[0]
    weight = model.get_submodule(site.consumer.module).weight
    columns, whole, gradients = slice(0, site.consumer.rows_per_unit), weight.clone(), []
    with torch.no_grad():
        for batch in batches:
            ends = []
            for scale in (1 + step, 1 - step):
                weight[:, columns] = whole[:, columns] * scale
                ends.append(training_loss(batch))
            gradients.append((ends[0] - ends[1]) / (2 * step))
            weight.copy_(whole)
    expected = sum(gradient**2 for gradient in gradients) / 2 / site.unit_params
    assert float(scores[site.name][0]) == pytest.approx(expected, rel=1e-2)


def test_training_loss_is_asked_for_where_there_is_none() -> None:
    model = tiny()
    with pytest.raises(ConfigError, match="reads the training loss"):
        BASELINES["gate-gradients"](Calibration(model, find_sites(model), ()))


def test_obs_scores_the_loss_that_other_columns_cannot_make_up_for() -> None:
    """Greedy removal with least squares solved anew each time, in the metric of the loss's gradients at the output."""
    model = tiny("llama").double()
    given = calibration(model)
    scores = BASELINES["obs"](given)
    site = next(site for site in given.sites if site.name == "model.layers.1.self_attn")
    name, per = site.consumer.module, site.consumer.rows_per_unit
    weight, read = model.get_submodule(name).weight.double(), []
    metric = torch.zeros(len(weight), len(weight), dtype=torch.float64)
    for row in rows():
        passed: list[tuple[Tensor, Tensor]] = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda _, given, output: passed.append((given[0], output.requires_grad_()))  # noqa: B023
        )
        loss = 3 * loss_of(model, row)
        ((row_inputs, row_outputs),) = passed
        (gradient,) = torch.autograd.grad(loss, row_outputs)
        handle.remove()
        metric += gradient[0].t() @ gradient[0]
        read.append(row_inputs[0][(gradient[0] != 0).any(1)])  # the last layer's outputs count where a label follows
    inputs = torch.cat(read).detach()
    assert len(inputs) < sum(len(row) for row in rows())
    metric += 0.01 * metric.diagonal().mean() * torch.eye(len(metric))
    ridge = 0.01 * (inputs.t() @ inputs).diagonal().mean()
    design = torch.cat([inputs, ridge.sqrt() * torch.eye(inputs.shape[1])])  # least squares with the ridge

    def error(removed: list[int]) -> float:
        kept = [column for column in range(weight.shape[1]) if column // per not in removed]
        target = design @ weight.t()
        solution = torch.linalg.lstsq(design[:, kept], target).solution
        residual = target - design[:, kept] @ solution
        return float(torch.trace(metric @ residual.t() @ residual)) / len(inputs)

    first = min(range(site.units), key=lambda unit: error([unit]))
    other = 1 - first
    assert float(scores[site.name][first]) == pytest.approx(error([first]) / site.unit_params, rel=1e-4)
    rest = max(error([first, other]) - error([first]), error([first]))
    assert float(scores[site.name][other]) == pytest.approx(rest / site.unit_params, rel=1e-4)


@pytest.mark.parametrize("name", BASELINES)
def test_hidden_channels_are_scored_or_refused_by_name(name: str) -> None:
    """Methods that read a unit's own output linear, or whole layers, cannot score channels of all layers."""
    given = calibration(tiny("qwen3", tie_word_embeddings=True))
    sites = find_sites(given.model, ("hidden-channels", "kv-groups", "mlp-channels"))
    passes = build_passes(given.model, sites, 0, given.config)

    def gate_gradients(step: int, gates: Any) -> Any:
        with torch.enable_grad():
            return passes.gate_gradients(examples()[:2], gates)[1]

    given = replace(given, sites=sites, gate_gradients=gate_gradients)
    if name in ("wanda-sp", "flap", "obs", "block-influence"):
        with pytest.raises(ConfigError, match="hidden-channels"):
            scores_of(name, given)
        return
    scores = scores_of(name, given)
    assert scores["model:hidden-channels"].shape == (48,)
    assert all(score.isfinite().all() for score in scores.values())
    plan = given.select(scores)
    with masked(given.model, plan, sites=sites):
        assert given.model(tokens()).logits.isfinite().all()
