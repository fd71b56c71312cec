"""Tuning and structural pruning in one run (ATP, arXiv 2412.14426, and beyond it), from top to bottom.

The model is pruned while it is tuned. A unit is a KV group, an MLP channel, an expert or a block.

*Progressive removal*, the default, cuts the model several times within the first fifth of the run. At each cut it

1. scores every unit that is left, on the weights as they now are, by the gradient of the training loss at its gate;
2. decides: the plan keeps the highest scores per parameter within the budget of this cut;
3. cuts the model for real;
4. tunes, until the next cut and then to the last step: all weights, or adapters in a large model.

*ATP's own way* (`search.method: generator`, recipes/paper.yaml) makes one cut. Before it a small network, the
generator, proposes at every step which units to mask, and LoRA adapters learn under its proposals; then the decision
settles while group sparsity drives the adapters of masked units to zero.

The loss is a sum of named terms: the answers' cross-entropy, and the distance to a teacher (`train/losses.py`).
"""

from prunetune.plan import Plan
from prunetune.search.select import Decision, select
from prunetune.train.adapters import add_adapters, copy_adapters
from prunetune.train.decisions import GeneratorTrainer, score_units
from prunetune.train.job import TrainingJob
from prunetune.train.parallel.distributed import distribute_passes, shard_layers
from prunetune.train.passes import build_passes
from prunetune.train.progress import TrainingProgress
from prunetune.train.step_guard import StepGuard
from prunetune.train.weight_trainer import WeightTrainer
from prunetune.utils.determinism import derive_seed
from prunetune.utils.json_lines import JsonObject


def tune_and_prune(job: TrainingJob) -> Plan:
    """Run all steps that are left, and return the plan. The model ends up cut and tuned, adapters not yet merged.

    Raises `RolledBack` if a limit on a score went back to an earlier state: that state is the newest checkpoint, to
    continue from with a new model. Raises `LimitBroken` if a limit stopped the run.
    """
    add_adapters(job.model, job.sites, job.config.lora, seed=derive_seed(job.config.seed, "adapters"))
    if job.start_adapters is not None:
        copy_adapters(job.model, job.start_adapters)
    cut_layers = shard_layers(job.model, job.ranks, job.weight_owner)  # over GPUs, if the launch says so
    passes = build_passes(job.model, job.sites, job.pad_id, job.config, job.teacher, job.ranks)
    passes = distribute_passes(passes, job.model, job.ranks)  # from here on, losses and gradients are of whole batches
    guard = StepGuard(passes, job.config.train.max_skipped, job.config.train.checkpointing != "off")
    weights = WeightTrainer(job, passes, guard, cut_layers)
    generator = GeneratorTrainer(job, passes, guard) if job.uses_generator else None
    progress = TrainingProgress(job, weights, generator, guard)
    decision = progress.resume()

    for step in range(progress.step, job.schedule.steps):
        schedule = progress.schedule
        if step == schedule.steps:  # stopped early
            break
        record: JsonObject = {"step": step + 1, "phase": schedule.phase_at(step)}

        if generator is not None and step < schedule.search:
            record |= generator.train_step(step)  # on calibration data; weights frozen, base and adapters gated
            decision = generator.searcher.decide(step)  # a draw, without a plan
        elif generator is not None and decision.plan is None:
            decision = generator.searcher.final_decision()  # no noise, exact budget

        if cut := schedule.cut_at(step):
            if generator is None and job.given_plan is None:
                scores = score_units(job, passes, guard, weights.sites, decision.plan, step)
                keep, before = schedule.keep_after(cut), decision.plan
                plan = select(scores, job.sites, keep, job.constraints, larger_plan=before)
                decision = Decision.from_plan(plan, job.sites)
            assert decision.plan is not None
            weights.cut(decision.plan, schedule.stage_steps(step))  # exact: the masked model and the cut one are equal

        # On training data; LoRA-aware while the decision is a mask: y = gate * (W x) + B A x.
        record |= weights.train_step(step, decision, schedule)

        if generator is not None and decision.plan is None and step + 1 == schedule.steps:
            decision = generator.searcher.final_decision()  # the search lasts to the end: validate what will be cut
        progress.record_step(record, decision)
        # A limit may raise the budget, roll back, or stop the run.
        decision = progress.validation.validate_if_due(record, decision)
        progress.save_if_due(decision)

    if generator is not None and not weights.is_cut:  # no step was left after the search or the settling
        decision = decision if decision.plan else generator.searcher.final_decision()
        assert decision.plan is not None
        weights.cut(decision.plan, 0)
        progress.save(decision)
    progress.restore_best(decision)
    weights.release_recordings()
    assert decision.plan is not None
    return decision.plan
