"""The trainer of the weights: the LoRA adapters, or all weights once the model is cut."""

import time
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from prunetune.data.encoding import Example
from prunetune.plan import Plan
from prunetune.pruning.cut import merge_adapters
from prunetune.pruning.hidden_channels import keep_norm_scale
from prunetune.pruning.remaining_sites import plan_within, remaining_sites
from prunetune.pruning.units import hidden_site
from prunetune.search.select import Decision, detach_to
from prunetune.train.adapters import cut_tensors, trainable_parameters
from prunetune.train.checkpoints import group_by_moment, optimizer_tensors, restore_optimizer
from prunetune.train.job import TrainingJob
from prunetune.train.losses import FINAL_LASSO, SEARCH_LASSO, group_lasso
from prunetune.train.muon import Muon
from prunetune.train.parallel.distributed import CutLayers
from prunetune.train.passes import Passes
from prunetune.train.schedule import Schedule, learning_rate
from prunetune.train.step_guard import StepGuard
from prunetune.utils.determinism import derive_seed
from prunetune.utils.json_lines import JsonObject


class WeightTrainer:
    """Trains the LoRA adapters, or all weights once the model is cut; makes the cuts."""

    def __init__(self, job: TrainingJob, passes: Passes, guard: StepGuard, cut_layers: CutLayers) -> None:
        self.job, self.passes, self.guard, self.cut_layers = job, passes, guard, cut_layers
        self.sites = job.sites  # of the model as it is now
        self.plan: Plan | None = None  # by which it has been cut
        self.is_merged = False
        self.optimizer = self._new_optimizer()

    @property
    def is_cut(self) -> bool:
        """Whether anything has been cut."""
        return self.plan is not None

    def train_step(self, step: int, decision: Decision, schedule: Schedule) -> JsonObject:
        """One tuning step: LoRA-aware under the decision while it is a mask, plain once the model is cut."""
        job, batch, started = self.job, self.job.train_stream.batch_at(step), time.monotonic()
        torch.manual_seed(derive_seed(job.config.seed, "dropout", step) + job.ranks.rank)
        record = self.guard.retry_smaller(batch, lambda: self._gradients(batch, decision), self._zero_gradients)
        norm = nn.utils.clip_grad_norm_(self.weights, job.config.train.clip)
        peak = (self.is_merged and job.config.train.weights_rate) or None
        rate = learning_rate(step, job.config.train, peak, schedule)
        if not self.guard.should_skip(step, {**record, "gradient": float(norm)}, batch):
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

    def _gradients(self, batch: list[Example], decision: Decision) -> JsonObject:
        if self.is_cut:
            return dict(self.passes.tune(batch, None))
        losses = self.passes.tune(batch, decision.gates)
        if self.job.config.search.sparsity != "lasso" or not any(site.linear_slices() for site in self.job.sites):
            return dict(losses)
        # On every rank all of it: it reads no example.
        penalty = group_lasso(self.job.model, detach_to(decision.gates, self.weights[0].device), self.sites)
        (penalty * (FINAL_LASSO if decision.plan else SEARCH_LASSO)).backward()  # type: ignore[no-untyped-call]
        return {**losses, "lasso": float(penalty.detach())}

    def cut(self, plan: Plan, steps: int) -> None:
        """Cut the model to a plan of dense units, for so many steps; moments stay, but for adapters merged now."""
        if plan == self.plan:  # a limit raised the budget: nothing goes, but another stage begins
            self.passes.use_sites(self.sites, steps)
            return
        sites, relative = self.sites, plan if self.plan is None else plan_within(plan, self.plan)
        before, was_merged = list(trainable_parameters(self.job.model)), self.is_merged
        moments = group_by_moment(optimizer_tensors(self.optimizer, before))
        self.release_recordings()
        self.apply_cut(plan, steps)
        self.optimizer = self._new_optimizer()
        if self.is_merged and not was_merged:
            return
        kept: dict[str, Tensor] = {}
        for moment, tensors in moments.items():
            cut = tensors if moment == "step" else cut_tensors(self.job.model, tensors, relative, sites)
            kept |= {f"{name}#{moment}": tensor for name, tensor in cut.items()}
        restore_optimizer(self.optimizer, list(trainable_parameters(self.job.model)), kept)

    def apply_cut(self, plan: Plan, steps: int) -> None:
        """Give model and adapters their smaller shapes; merge the two if all weights are to be tuned."""
        relative = plan if self.plan is None else plan_within(plan, self.plan)
        if hidden := hidden_site(self.sites):
            keep_norm_scale(self.job.model, hidden, len(relative.kept[hidden.name]))
        self.cut_layers(relative, self.sites, self.plan)
        self.plan, self.sites = plan, remaining_sites(self.job.sites, plan)
        self.passes.use_sites(self.sites, steps)
        if self.job.config.train.weights == "all" and not self.is_merged:
            merge_adapters(self.job.model, trainable=True)
            self.is_merged = True

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Load weights and moments of a checkpoint; if they are of a cut model, `apply_cut` has run before."""
        named = trainable_parameters(self.job.model)
        for name, parameter in named.items():
            parameter.data = weights[name].to(parameter.device)
        self.optimizer = self._new_optimizer()
        restore_optimizer(self.optimizer, list(named), moments)

    def release_recordings(self) -> None:
        """Drop recorded passes and updates before what they read and write is let go."""
        self.passes.reset_recordings()
        if isinstance(self.optimizer, Muon):
            self.optimizer.recorder.reset_recordings()

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
