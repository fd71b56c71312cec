"""Are budgets met (bar F1)? Random targets of every kind over real geometries, no weights: each is met within 1% from
the feasible side, or refused before training with the nearest feasible value, which is then accepted.

    python benchmarks/targets.py --targets 50 --out targets.jsonl        # a few minutes on two cores

A target lies between a fifth below what is feasible and what the dense model takes. The scores are random: any plan has
to do. Every tenth plan is cut out of the model on the meta device and counted again. Times are of a made-up table with
steps every 256 channels, as tiles make them; `benchmarks/latency.py` measures real ones.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rows import give
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from prunetune.config.quantities import UNITS, Amount
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.budget_limits import BudgetLimit, costs_for_budget, make_budget_limit
from prunetune.cost.deployment import DTYPE_BYTES, max_cost
from prunetune.cost.latency_table import TRACKS, LatencyTable, LayerTiming, representative_layers
from prunetune.cost.layer_shapes import ModelShape, model_shape
from prunetune.errors import PlanError
from prunetune.export.checkpoint import kv_groups_validator
from prunetune.plan import Plan
from prunetune.pruning.cut import cut
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import kept_params
from prunetune.search.nested_sites import NestedSites
from prunetune.search.plan_rules import PlanConstraints, default_align
from prunetune.search.select import min_feasible_keep, min_widths, select, with_limits
from prunetune.utils.environment import installed_commit

GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M": ("llama", {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    }),
    "Llama-3-8B": ("llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    }),
    "Qwen3-4B": ("qwen3", {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    }),
    "Gemma-3-270M": ("gemma3_text", {
        "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "tie_word_embeddings": True,
        "sliding_window": 512,
    }),
    "Gemma-3-1B": ("gemma3_text", {
        "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "tie_word_embeddings": True,
        "sliding_window": 512,
    }),
}  # fmt: skip
KINDS = ("keep", *UNITS, "memory and flops")


@dataclass
class Tally:
    """What became of the targets of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0  # largest distance below a target that was met
    wrong: list[str] = field(default_factory=list)


class Bench:
    """One geometry in one layout."""

    def __init__(self, name: str, layout: str, workload: WorkloadConfig) -> None:
        family, values = GEOMETRIES[name]
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**values))
        self.sites, self.workload = find_sites(self.model), workload
        self.shape = PlanConstraints(layout, default_align(self.sites), 0, kv_groups_validator(self.model.config))
        self.anatomy = model_shape(self.model, self.sites)
        self.table = made_up(self.anatomy)
        nest = NestedSites(self.sites)
        self.least = nest.kept_unit_counts(min_widths(nest, self.shape), self.sites)
        self.everything = sum(site.params for site in self.sites)

    def run(self, kind: str, targets: int) -> Tally:
        """All targets of one kind."""
        rng, tally = torch.Generator().manual_seed(0), Tally()
        for number in range(targets):
            place = 1.2 * float(torch.rand((), generator=rng)) - 0.2
            scores = {site.name: torch.randn(site.units, generator=rng) for site in self.sites}
            if kind == "keep":
                self._share(place, scores, tally)
            else:
                self._amounts(kind.split(" and "), place, scores, tally, counted=number % 10 == 0)
        return tally

    def _share(self, place: float, scores: Any, tally: Tally) -> None:
        least = min_feasible_keep(self.sites, self.shape)
        keep = least + place * (1 - least) if place > 0 else least * (1 + place)
        try:
            plan = select(scores, self.sites, keep, self.shape)
        except PlanError as refused:
            nearest = float(str(refused).partition("feasible (")[2].partition(")")[0])
            select(scores, self.sites, nearest, self.shape)
            tally.outcomes["refused"] += 1
            return
        self._note(kept_params(self.sites, plan) / self.everything, keep, tally)

    def _amounts(self, kinds: list[str], place: float, scores: Any, tally: Tally, *, counted: bool) -> None:
        caps = [self._cap(kind, place) for kind in kinds]
        try:
            shape = with_limits(self.shape, self.sites, caps, 1.0)
        except PlanError as refused:
            self._again(caps, str(refused), tally)
            return
        assert shape.limits is not None
        plan = select(scores, self.sites, shape.limits.feasible_keep, shape)
        nearest = max(cap.cost(plan.widths()) / cap.limit for cap in caps)
        self._note(nearest, 1.0, tally)
        if counted:
            self._count(plan, tally)

    def _cap(self, kind: str, place: float) -> BudgetLimit:
        costs = costs_for_budget(kind, self.anatomy, self.workload, self.table)
        least, dense = max_cost(costs, self.least), max_cost(costs, self.anatomy.dense_counts())
        limit = least + place * (dense - least) if place > 0 else least * (1 + place)
        tokens = self.workload.batch * self.workload.generate
        return make_budget_limit(
            kind, Amount(tokens / limit if kind == "throughput" else limit, False), costs, self.workload
        )

    def _again(self, caps: list[BudgetLimit], refused: str, tally: Tally) -> None:
        """Ask with the values that refusals name, one after the other, until it is accepted."""
        for _ in caps:
            kind = refused.partition("budget.")[2].split()[0]
            nearest = refused.partition("feasible (")[2].partition(";")[0]
            costs = next(cap.costs for cap in caps if cap.kind == kind)
            asked = make_budget_limit(kind, Amount.parse(nearest, kind), costs, self.workload)
            caps = [asked if cap.kind == kind else cap for cap in caps]
            try:
                shape = with_limits(self.shape, self.sites, caps, 1.0)
            except PlanError as more:
                refused = str(more)
                continue
            assert shape.limits is not None
            tally.outcomes["refused"] += 1
            return
        tally.wrong.append(f"the nearest value is refused, too: {refused}")

    def _note(self, found: float, target: float, tally: Tally) -> None:
        if found > target * (1 + 1e-9):
            tally.wrong.append(f"{found} is above {target}")
            return
        below = 1 - found / target
        tally.worst = max(tally.worst, below)
        tally.outcomes["met within 1%" if below <= 0.01 else "met, and no closer plan is larger"] += 1

    def _count(self, plan: Plan, tally: Tally) -> None:
        """Parameters and bytes of the model that is really cut."""
        small = cut(copy.deepcopy(self.model), plan, sites=self.sites)
        params = sum(weight.numel() for weight in small.parameters())
        plain = DTYPE_BYTES[self.workload.dtype] * params
        counted = max_cost(costs_for_budget("file", self.anatomy, self.workload), plan.widths())
        if self.anatomy.params(plan.widths()) != params or counted != plain:
            tally.wrong.append(f"{params} parameters, and {self.anatomy.params(plan.widths())} were counted")


def made_up(anatomy: ModelShape) -> LatencyTable:
    """Seconds that rise every 256 channels, and with KV groups."""
    layers = {}
    for layer in set(representative_layers(anatomy).values()):
        sites = {site.kind: site for site in anatomy.layers[layer].sites}
        groups, channels = sites["attention"].units, sites["mlp"].units
        mlp = [(width, 1e-7 * (-(-width // 256) - channels // 256)) for width in range(32, channels + 1, 32)]
        attention = [(width, 3e-7 * (width - groups)) for width in range(groups + 1)]
        layers[layer] = LayerTiming(4e-7 * groups + 1e-7 * (channels // 256) + 2e-7, tuple(attention), tuple(mlp))
    idle = {layer: LayerTiming(1e-7, (), ()) for layer in layers}  # a host that never keeps the device waiting
    tracks = {track: layers if track.endswith("device") else idle for track in TRACKS}
    return LatencyTable({"device": "made up"}, dict.fromkeys(TRACKS, 1e-6), tracks)


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each kind, over all geometries."""
    tallies: dict[str, Tally] = {kind: Tally() for kind in KINDS}
    for name in options.models:
        bench = Bench(name, options.layout, WorkloadConfig(batch=options.batch, context=options.context))
        for kind in KINDS:
            found, sum_ = bench.run(kind, options.targets), tallies[kind]
            sum_.outcomes += found.outcomes
            sum_.worst = max(sum_.worst, found.worst)
            sum_.wrong += [f"{name}: {text}" for text in found.wrong]
            print(f"{name:<14} {kind:<17} {dict(found.outcomes)} worst {found.worst:.4f}", file=sys.stderr)
    for kind, tally in tallies.items():
        good = tally.outcomes["met within 1%"] + tally.outcomes["refused"]
        asked = options.targets * len(options.models)
        case = (
            f"{kind}, layout {options.layout}, {options.targets} random targets for each of "
            f"{', '.join(options.models)}, "
            f"batch {options.batch}, {options.context or 640} tokens cached: met within 1% "
            f"{tally.outcomes['met within 1%']}, refused with the nearest value "
            f"{tally.outcomes['refused']}, further below {asked - good - len(tally.wrong)} "
            f"(most {100 * tally.worst:.1f}%), "
            f"wrong {len(tally.wrong)}"
        )
        print(*tally.wrong[:3], sep="\n", file=sys.stderr)
        yield {
            "bar": "F1", "case": case, "value": good, "target": f"{asked} of {asked}", "met": good == asked,
            "unit": "targets", "device": "counted, no device", "command": shlex_join(sys.argv),
            "commit": installed_commit()[:7],
        }  # fmt: skip


def shlex_join(words: list[str]) -> str:
    """The command as it was typed."""
    import shlex

    return shlex.join(["python", "benchmarks/targets.py", *words[1:]])


def main() -> None:
    """Rows as JSON lines, on the standard output or appended to a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--targets", type=int, default=50, help="of each kind and geometry")
    parser.add_argument("--layout", choices=["per-layer", "uniform"], default="per-layer")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=0, help="tokens cached; 0: 512 + 128")
    parser.add_argument("--models", nargs="+", default=list(GEOMETRIES), choices=list(GEOMETRIES))
    parser.add_argument("--out", type=Path, help="append rows to this file")
    options = parser.parse_args()
    for row in rows(options):
        give(row, options.out)


if __name__ == "__main__":
    main()
