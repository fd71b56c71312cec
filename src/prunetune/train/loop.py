"""One-stage tuning and structural pruning (ATP, arXiv 2412.14426, and its authors' code), from top to bottom.

The model is pruned while it is tuned. A small network, the generator, proposes which units to keep; the LoRA adapters
learn under its proposals. A unit is a KV group, an MLP channel, an expert or a block, and a gate of 0 masks it. A run
has three phases (`train/schedule.py`):

1. *search*: every step trains the generator on a calibration batch, then the adapters on a training batch under the
   generator's decision. A budget loss pulls the share kept to `budget.keep`.
2. *settle*: the decision is frozen, and group sparsity drives the adapters of removed units to zero.
3. *tune*: the model is cut to the units kept. Tuning goes on with the adapters or, once these are merged, with all
   weights (`train.weights`).

The loss is a sum of named terms: the answers' cross-entropy, and the distance to a teacher (`train/losses.py`).
"""

from __future__ import annotations

from prunetune.plan import Plan
from prunetune.train.adapters import add_adapters, load_into_dense
from prunetune.train.generator_trainer import GeneratorTrainer
from prunetune.train.job import TrainingJob
from prunetune.train.parallel.distributed_passes import distribute_passes
from prunetune.train.parallel.sharding import shard_layers
from prunetune.train.passes import build_passes
from prunetune.train.progress import TrainingProgress
from prunetune.train.step_guard import StepGuard
from prunetune.train.weight_trainer import WeightTrainer
from prunetune.utils.json_lines import JsonObject
from prunetune.utils.seeds import derive_seed


def tune_and_prune(job: TrainingJob) -> Plan:
    """Run all steps that are left, and return the plan. The model ends up cut and tuned, adapters not yet merged.

    Raises `RolledBack` if a limit on a score went back to an earlier state: that state is the newest checkpoint, to
    continue from with a new model. Raises `LimitBroken` if a limit stopped the run.
    """
    add_adapters(job.model, job.sites, job.config.lora, seed=derive_seed(job.config.seed, "adapters"))
    if job.start_state is not None:
        load_into_dense(job.model, job.start_state, job.sites, job.config.train)
    layers = shard_layers(job.model, job.ranks, job.weight_owner)  # over GPUs, if the launch says so
    passes = build_passes(job.model, job.sites, job.pad_id, job.config, job.teacher, job.ranks)
    passes = distribute_passes(passes, job.model, job.ranks)  # from here on, losses and gradients are of whole batches
    guard = StepGuard(passes, job.config.train.max_skipped, job.config.train.checkpointing != "off")
    generator, adapters = GeneratorTrainer(job, passes, guard), WeightTrainer(job, passes, guard, layers)
    progress = TrainingProgress(job, generator, adapters, guard)
    decision = progress.resume()

    for step in range(progress.step, job.schedule.steps):
        phase = progress.schedule.phase_at(step)
        record: JsonObject = {"step": step + 1, "phase": phase}

        if phase == "search":
            record |= generator.train_step(step)  # on calibration data; weights frozen, base and adapters gated
            decision = generator.decide(step)
        elif decision.plan is None:
            decision = generator.final_decision()  # no noise, exact budget
        if phase == "tune" and decision.plan and not adapters.is_cut:
            adapters.cut(decision.plan)  # exact: the gated model and the cut one are equal

        # On training data; LoRA-aware while the decision is a mask: y = gate * (W x) + B A x.
        record |= adapters.train_step(step, decision)

        if decision.plan is None and step + 1 == job.schedule.steps:
            decision = generator.final_decision()  # the search lasts to the end: what is validated is what will be cut
        progress.record_step(record, decision)
        decision = progress.validate(record, decision)  # a limit may raise the budget, roll back, or stop the run
        progress.save_if_due(decision)

    if decision.plan is None:  # a limit raised the budget at the last step
        decision = generator.final_decision()
    assert decision.plan is not None
    if not adapters.is_cut:  # no step was left after the search or the settling
        adapters.cut(decision.plan)
        progress.save(decision)
    return decision.plan
