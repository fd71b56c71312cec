"""One rank of `test_train_distributed.py`: runs every scenario in turn, and rank 0 leaves what came out as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import yaml
from torch import distributed as dist

from prunetune.config.fields import merged
from prunetune.config.recipe import from_mapping
from prunetune.data.templates import Example
from prunetune.errors import PrunetuneError
from prunetune.export import selfcheck
from prunetune.export.write import Written
from prunetune.model.loading import load
from prunetune.pipeline.stages import run
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import USUAL
from prunetune.train import loop
from prunetune.train.checkpoints import Checkpoints, Forgetful, Keeper
from prunetune.train.losses import Teacher
from prunetune.train.parallel.distributed_passes import shared, together
from prunetune.train.parallel.ranks import ALONE, Ranks, join
from prunetune.train.parallel.sharding import spread
from prunetune.train.passes import Packed
from prunetune.train.recovery import Faults
from support.loop import config_of, job_of
from support.models import tiny

STEPS = 20
STOP = 9  # in the settling
CHANGES: dict[str, Any] = {
    "train": {"steps": STEPS, "batch_size": 5, "learning_rate": 1e-3, "checkpoint_every": 6, "validate_every": 10},
    "search": {"batch_size": 3, "evidence": 1},
}


# More of what a run may be, 6 steps each: (whether weights are sharded, what is said of the run).
OTHERS: dict[str, tuple[bool, dict[str, Any]]] = {
    "all weights": (False, {"train": {"steps": 6, "weights": "all"}}),
    "few examples": (True, {"train": {"steps": 6, "batch_size": 1}, "search": {"batch_size": 1}}),
    "joint": (False, {"train": {"steps": 6}, "search": {"step": "joint"}}),
    "layers": (True, {"train": {"steps": 6}, "units": ("layers", *USUAL)}),
    "tied": (True, {"train": {"steps": 6}, "family": "gpt2"}),
}


class Stopped(Exception):
    """The run is stopped from outside."""


def result(
    ranks: Ranks,
    keeper: Keeper | None = None,
    *,
    stop: int = 0,
    distil: bool = False,
    family: str = "llama",
    units: tuple[str, ...] = USUAL,
    **changes: Any,
) -> dict[str, Any]:
    """Plan, losses and validations of a run of the loop; stopped after `stop` steps, where that is said."""
    config, model = config_of(merged(CHANGES, changes)), tiny(family, tie_word_embeddings=family == "gpt2")
    job = job_of(config, keeper=shared(keeper or Forgetful(), ranks), model=model)
    job = replace(job, ranks=ranks, sites=find_sites(model, units))
    if distil:
        teacher = tiny(seed=3).requires_grad_(False)
        spread(teacher, ranks)
        job = replace(job, teacher=Teacher(teacher, 1.0, 1.0, tuned=False, share=0.5))
    if stop:
        observer: Any = job.observer
        told = observer.step

        def step(record: dict[str, Any]) -> None:
            told(record)
            if record["step"] == stop:
                raise Stopped

        observer.step = step
    try:
        plan = loop.tune_and_prune(job).to_json()
    except Stopped:
        plan = ""
    told_of: Any = job.observer
    return {
        "plan": plan,
        "loss": [record["loss"] for record in told_of.steps],
        "valid": [record["nll"] for record in told_of.validations],
    }


def packed(ranks: Ranks) -> dict[str, Any]:
    """The same by passes that a GPU takes."""
    before = loop.passes_for
    loop.passes_for = Packed  # type: ignore[assignment]
    try:
        return result(ranks, train={"steps": 6})
    finally:
        loop.passes_for = before


class Full:
    """Passes whose memory runs out above 16 tokens, on rank 1 alone."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.micro_tokens = ranks, 64

    def score(self, examples: Sequence[Example], gates: Any) -> float:
        if self.ranks.rank == 1 and self.micro_tokens > 16:
            raise torch.OutOfMemoryError("full")
        return 1.0

    def shrink(self, gates: Any, weight: float) -> float:
        return self.score((), gates)

    def forget(self) -> None:
        pass


def room(ranks: Ranks, *, what: str = "score") -> int:
    """The size of passes that all ranks end up with: of a rank that went on alone, the others would wait for ever."""
    passes: Any = together(Full(ranks), None, ranks)  # type: ignore[arg-type]
    work = {"score": lambda: passes.score((), {}), "shrink": lambda: passes.shrink({}, 0.0)}[what]
    faults = Faults(passes, 0)
    faults.within_memory([Example((1, 2), 1)], work, lambda: None)
    return int(ranks.agree(faults.passes.micro_tokens))


def waits(ranks: Ranks, place: Path) -> bool:
    """Whether rank 0, once it has waited, finds what the late rank 1 left before.

    As with NCCL, where who sends a broadcast goes on at once; gloo's would wait.
    """
    mark, before, sent = place / "mark", dist.broadcast_object_list, list[Thread]()

    def send(*given: Any, **named: Any) -> None:
        sent.append(Thread(target=before, args=given, kwargs=named))
        sent[-1].start()

    if ranks.is_main:
        dist.broadcast_object_list = send
    else:
        time.sleep(1)
        mark.touch()
    ranks.wait()
    found = mark.exists()
    dist.broadcast_object_list = before
    for thread in sent:
        thread.join()
    return found


def refused(work: Callable[[], object]) -> str:
    """What the error says."""
    try:
        work()
    except PrunetuneError as error:
        return str(error)
    return ""


def opened(written: Written, tokens: torch.Tensor, *, streamed: bool) -> dict[str, torch.Tensor]:
    """What `selfcheck.reopened` finds in a process of its own, here: that one is tried elsewhere."""
    assert streamed
    how: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32, "trust_remote_code": True}
    model = load(str(written.folder.absolute()), **how).model
    return {"logits": selfcheck.logits_of(model, tokens), "params": torch.tensor(model.num_parameters())}


def scenarios(ranks: Ranks, place: Path) -> dict[str, Any]:
    """All that two ranks are asked."""
    sharded = replace(ranks, shards=True)
    found = {name: result(sharded if shards else ranks, **how) for name, (shards, how) in OTHERS.items()}
    found |= {
        "packed": packed(ranks),
        "ddp": result(ranks),
        "fsdp": result(sharded, distil=True),
        "one to two": result(sharded, Checkpoints(place / "one")),
        "two to one": result(ranks, Checkpoints(place / "two"), stop=STOP),
        "room": [room(ranks), room(ranks, what="shrink")],
        "waits": waits(ranks, place),
        "differ": refused(lambda: ranks.any(False, "gates", [torch.tensor([1.0, float(ranks.rank)])])),
    }
    selfcheck.reopened = opened  # type: ignore[assignment]
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    run(from_mapping(yaml.safe_load((place / "recipe.yaml").read_text(encoding="utf-8"))))
    return found


def main(place: Path) -> None:
    torch.set_num_threads(1)
    ranks = join(torch.device("cpu"))
    assert ranks is not ALONE
    found = scenarios(ranks, place)
    if ranks.is_main:
        (place / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
