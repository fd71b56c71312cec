"""CPU seconds of what a run does outside its passes, in a large model's geometry: no weights, no GPU.

OMP_NUM_THREADS=1 python benchmarks/fixed_costs.py [--geometry llama-3-8b] [--repeats 9]
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

from prunetune.config.recipe import LoraSettings, from_mapping
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import kept_indices
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.searcher import Searcher
from prunetune.search.select import Decision, select
from prunetune.train.adapters import add_adapters, cut_tensors, trainable_parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", default="llama-3-8b")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(config_of(options.geometry))
        sites = find_sites(model)
        add_adapters(model, sites, LoraSettings(rank=1), seed=0)
    searcher = Searcher(sites, PlanConstraints(), from_mapping({}), torch.device("cpu"))
    logits = {name: values.detach() for name, values in searcher.logits().items()}
    plan = select(logits, sites, 0.5, PlanConstraints())
    state = {name: torch.zeros(weight.shape) for name, weight in trainable_parameters(model).items()}
    calls: dict[str, Callable[[], object]] = {
        "sample": lambda: searcher.sample(1),
        "select": lambda: select(logits, sites, 0.5, PlanConstraints()),
        "fixed": lambda: Decision.from_plan(plan, sites),
        "kept_lines": lambda: kept_indices(plan, sites),
        "cut_state": lambda: cut_tensors(model, state, plan, sites),
        "adapters": lambda: trainable_parameters(model),
    }
    best = {name: min(timed(call) for _ in range(options.repeats)) for name, call in calls.items()}
    print(json.dumps({name: round(seconds, 4) for name, seconds in best.items()}))


def timed(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


if __name__ == "__main__":
    main()
