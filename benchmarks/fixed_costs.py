"""Seconds of what a run does outside its passes, in a large model's geometry: no weights, on the CPU.

python benchmarks/fixed_costs.py [--geometry llama-3-8b] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from geometries import config_of
from transformers import AutoModelForCausalLM

from prunetune.config import LoraSettings, from_mapping
from prunetune.decide.decision import Searcher, plan_of
from prunetune.decide.select import Shape, select
from prunetune.model.masking import gates_of
from prunetune.model.sites import find_sites
from prunetune.model.units import kept_lines
from prunetune.train.adapters import adapters, add_adapters, cut_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", default="llama-3-8b")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(config_of(options.geometry))
    sites, shape, rng = find_sites(model), Shape(), torch.Generator().manual_seed(0)
    scores = {site.name: torch.randn(site.units, generator=rng) for site in sites}
    plan = select(scores, sites, 0.5, shape)
    searcher = Searcher(sites, shape, from_mapping({}), lambda step: 0.5, torch.device("cpu"))
    with init_empty_weights():
        add_adapters(model, sites, LoraSettings(rank=1), seed=0)
    state = {name: torch.zeros(weight.shape) for name, weight in adapters(model).items()}
    calls: dict[str, Callable[[], object]] = {
        "sample": lambda: searcher.sample(1),
        "select": lambda: select(scores, sites, 0.5, shape),
        "fixed": lambda: searcher.fixed(plan),
        "gates_of": lambda: gates_of(plan, sites),
        "plan_of": lambda: plan_of(gates_of(plan, sites)),
        "kept_lines": lambda: kept_lines(plan, sites),
        "cut_state": lambda: cut_state(state, plan, sites),
        "adapters": lambda: adapters(model),
    }
    print(json.dumps({name: timed(call, options.repeats) for name, call in calls.items()}))


def timed(call: Callable[[], object], repeats: int) -> float:
    """The fastest call, seconds."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return round(min(times), 4)


if __name__ == "__main__":
    main()
