"""The trainer of the weights: the LoRA adapters, or all weights once the model is cut."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from prunetune.data.encoding import Example
from prunetune.plan import Plan
from prunetune.pruning.cut import merge_adapters
from prunetune.search.searcher import Decision
from prunetune.train.adapters import cut_adapter_tensors, trainable_parameters, trains_all_weights
from prunetune.train.checkpoints import group_by_moment, optimizer_tensors, restore_optimizer
from prunetune.train.job import TrainingJob
from prunetune.train.losses import lasso_weight
from prunetune.train.muon import Muon
from prunetune.train.parallel.sharding import DecoderLayers
from prunetune.train.passes import GateTensors, Passes
from prunetune.train.schedule import learning_rate
from prunetune.train.step_guard import StepGuard
from prunetune.utils.json_lines import JsonObject
from prunetune.utils.seeds import derive_seed


class WeightTrainer:
    """Trains the LoRA adapters; cuts the model once the decision has settled, and may then train all of its weights."""

    def __init__(self, job: TrainingJob, passes: Passes, guard: StepGuard, layers: DecoderLayers) -> None:
        self.job, self.passes, self.guard, self.layers = job, passes, guard, layers
        self.is_cut = self.is_merged = False
        self.optimizer = self._new_optimizer()
        # At the gates that `train_step` was given; empty if its batch was skipped.
        self.gate_gradients: GateTensors = {}

    def train_step(self, step: int, decision: Decision, gates: GateTensors | None = None) -> JsonObject:
        """One tuning step: LoRA-aware under the decision while it is a mask, plain once the model is cut.

        With the generator's own `gates`, these replace the decision in the pass, whose backward then also sets
        `gate_gradients`.
        """
        job, batch, started = self.job, self.job.train_stream.batch_at(step), time.monotonic()
        torch.manual_seed(derive_seed(job.config.seed, "dropout", step) + job.ranks.rank)
        record = self.guard.retry_smaller(batch, lambda: self._gradients(batch, decision, gates), self._zero_gradients)
        norm = job.accelerator.clip_grad_norm_(self.weights, job.config.train.clip)
        rate = learning_rate(step, job.config.train, job.config.train.weights_rate if self.is_merged else None)
        if self.guard.should_skip(step, {**record, "gradient": float(norm)}, batch):
            self.gate_gradients = {}
        else:
            rate *= self.guard.lr_scale
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self._zero_gradients()
        tokens = sum(len(example.token_ids) for example in batch)
        return record | {"lr": rate, "tokens_per_s": tokens / (time.monotonic() - started)}

    def _zero_gradients(self) -> None:
        """Gradients are zeroed, not dropped: recorded passes add to the same tensors every time."""
        self.optimizer.zero_grad(set_to_none=False)

    def _gradients(self, batch: list[Example], decision: Decision, gates: GateTensors | None) -> JsonObject:
        if self.is_cut:
            return dict(self.passes.tune(batch, None))
        if gates is None:
            losses = self.passes.tune(batch, decision.gates)
        else:
            losses, self.gate_gradients = self.passes.tune_with_gate_gradients(batch, gates)
        if self.job.config.search.sparsity != "lasso" or not any(site.has_linear_slices for site in self.job.sites):
            return dict(losses)
        weight = lasso_weight(is_final=decision.plan is not None)
        return {**losses, "lasso": self.passes.group_lasso_step(decision.gates, weight)}

    def cut(self, plan: Plan) -> None:
        """Cut the model. The optimiser keeps the moments of units that are kept, or starts anew on merged weights."""
        moments = optimizer_tensors(self.optimizer, list(trainable_parameters(self.job.model)))
        self.apply_cut(plan)
        self.optimizer = self._new_optimizer()
        if self.is_merged:
            return
        kept: dict[str, Tensor] = {}
        for moment, tensors in group_by_moment(moments).items():
            cut = tensors if moment == "step" else cut_adapter_tensors(tensors, plan, self.job.sites)
            kept |= {f"{name}#{moment}": tensor for name, tensor in cut.items()}
        restore_optimizer(self.optimizer, list(trainable_parameters(self.job.model)), kept)

    def apply_cut(self, plan: Plan) -> None:
        """Give model and adapters their smaller shapes; merge the two if all weights are to be tuned."""
        self.layers.cut(plan, self.job.sites)
        self.passes.reset_recordings()
        self.is_cut = True
        if trains_all_weights(self.job.config.train, self.job.sites):
            merge_adapters(self.job.model, trainable=True)
            self.is_merged = True

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Load weights and moments of a checkpoint; if they are of a cut model, `apply_cut` has run before."""
        named = trainable_parameters(self.job.model)
        for name, parameter in named.items():
            parameter.data = weights[name].to(parameter.device)
        self.optimizer = self._new_optimizer()
        restore_optimizer(self.optimizer, list(named), moments)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        train, self.weights = self.job.config.train, list(trainable_parameters(self.job.model).values())
        if self.is_merged or train.optimizer == "muon":
            return Muon(self.weights, lr=train.learning_rate)
        return adamw(self.weights, lr=train.learning_rate, weight_decay=train.weight_decay)


def adamw(weights: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.01) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), in few kernels on a GPU."""
    listed = list(weights)
    fused = bool(listed) and listed[0].is_cuda
    return torch.optim.AdamW(listed, lr=lr, weight_decay=weight_decay, fused=fused or None)
