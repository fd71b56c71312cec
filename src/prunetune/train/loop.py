"""One-stage tuning and structural pruning (ATP, arXiv 2412.14426), from top to bottom.

Every step of the *search* phase moves the pruning-decision generator on a calibration batch, then the adapters on a
training batch under its decision. In the *settle* phase the decision stands, and group sparsity empties the adapters of
removed units. In the *tune* phase the model has been cut, and tuning goes on with what is left: with the adapters, or
with all of its weights once these are merged (`train.weights`).

With `search.step: joint`, a large model's default, there is no calibration batch: one backward pass on the training
batch moves both players.
"""

from __future__ import annotations

from prunetune.plan import Plan
from prunetune.train.adapters import add_adapters, load_into_dense
from prunetune.train.job import StepRecord, TrainingJob
from prunetune.train.parallel.distributed_passes import distribute_passes
from prunetune.train.parallel.sharding import shard_layers
from prunetune.train.passes import build_passes
from prunetune.train.progress import TrainingProgress
from prunetune.train.recovery import StepGuard
from prunetune.train.trainers import AdapterTrainer, GeneratorTrainer
from prunetune.utils.seeds import derive_seed


def tune_and_prune(job: TrainingJob) -> Plan:
    """Run the steps that are left. The model ends up cut and tuned, adapters not yet merged; returns the plan.

    Raises `WentBack` where a gate went back to an earlier state: it is the newest checkpoint, to go on from with a new
    model; and `GateFailed` where a gate stopped the run.
    """
    add_adapters(job.model, job.sites, job.config.lora, seed=derive_seed(job.config.seed, "adapters"))
    if job.start_state is not None:
        load_into_dense(job.model, job.start_state, job.sites, job.config.train)
    # Over ranks, where there are several and they are to share the weights.
    layers = shard_layers(job.model, job.ranks, job.weight_owner)
    passes = build_passes(job.model, job.sites, job.pad_id, job.config, job.teacher, job.ranks)
    passes = distribute_passes(passes, job.model, job.ranks)  # from here on, losses and gradients are of whole batches
    faults = StepGuard(passes, job.config.train.max_skipped, job.config.train.checkpointing != "off")
    search, tuning = GeneratorTrainer(job, passes, faults), AdapterTrainer(job, passes, faults, layers)
    progress = TrainingProgress(job, search, tuning, faults)
    decision = progress.resume()

    for step in range(progress.step, job.schedule.steps):
        phase = progress.schedule.phase_at(step)
        record: StepRecord = {"step": step + 1, "phase": phase}

        gates = None
        if phase == "search" and job.config.search.step == "joint":
            gates = search.sample_gates(step)  # the adapters' pass below is the generator's, too
            decision = search.decide(step)
        elif phase == "search":
            record |= search.train_step(step)  # generator, on calibration data; weights frozen, both branches gated
            decision = search.decide(step)
        elif decision.plan is None:
            decision = search.final_decision()  # no noise, exact budget
        if phase == "tune" and decision.plan and not tuning.is_cut:
            tuning.cut(decision.plan)  # exact: the gated model and the cut one are equal

        # Adapters, on training data; LoRA-aware while the decision is a mask. All weights once the model is cut.
        record |= tuning.train_step(step, decision, gates)
        if gates is not None and tuning.gate_gradients:
            record |= search.update(step, gates, tuning.gate_gradients)

        if decision.plan is None and step + 1 == job.schedule.steps:
            decision = search.final_decision()  # the search lasts to the end: validated is what will be cut
        progress.record_step(record, decision)
        decision = progress.validate(record, decision)  # a gate may widen the budget, go back to what was, or stop
        progress.save_if_due(decision)

    if decision.plan is None:  # a gate widened the budget at the last step
        decision = search.final_decision()
    assert decision.plan is not None
    if not tuning.is_cut:  # no step was left after the search or the settling
        tuning.cut(decision.plan)
        progress.save(decision)
    return decision.plan
