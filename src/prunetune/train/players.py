"""The two players of the loop: the generator's search, and the adapters' tuning."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from prunetune.data.templates import Example
from prunetune.plan import Plan
from prunetune.pruning.cut import merge_adapters
from prunetune.search.searcher import Decision, Searcher
from prunetune.train.adapters import adapters, cut_state, soft_threshold, tunes_all
from prunetune.train.checkpoints import by_moment, optimizer_tensors, restore_optimizer
from prunetune.train.job import Job, Record
from prunetune.train.muon import Muon
from prunetune.train.parallel.sharding import Layers
from prunetune.train.passes import Passes
from prunetune.train.recovery import Faults
from prunetune.train.schedule import learning_rate
from prunetune.utils.seeds import derive


class Search:
    """Moves the pruning-decision generator; the model's weights stay as they are."""

    def __init__(self, job: Job, passes: Passes, faults: Faults) -> None:
        self.job, self.passes, self.faults = job, passes, faults
        self.device = next(job.model.parameters()).device
        self.searcher = Searcher(job.sites, job.shape, job.config, job.schedule.keep_at, self.device)
        decay = 0.0 if job.config.search.generator == "none" else 0.01  # free logits would be drawn to zero
        self.optimizer = adamw(
            self.searcher.generator.parameters(), lr=job.config.search.learning_rate, weight_decay=decay
        )

    def advance(self, step: int) -> Record:
        """One generator step on a calibration batch (ATP, section 3.2)."""
        gates, batch = self.propose(step), self.job.search.batch(step)
        losses, slopes = self._slopes(batch, gates)
        return {f"search_{name}": loss for name, loss in losses.items()} | self.learn(step, gates, slopes, batch)

    def propose(self, step: int) -> dict[str, Tensor]:
        """Gates of a step, with a gradient in the generator."""
        if step == 0 and self.job.config.search.evidence:
            self.searcher.start_from(self._importance())
        return self.searcher.sample(step)

    def learn(
        self, step: int, gates: Mapping[str, Tensor], slopes: Mapping[str, Tensor], batch: Sequence[Example] = ()
    ) -> Record:
        """Move the generator by the model's gradient at the gates it proposed, and by the budget's."""
        job = self.job
        ratio = self.searcher.budget_loss(gates) if self.searcher.is_sampled else None
        # The model's gradient stops at the gates; from there it flows on into the generator, with the budget's.
        total = torch.cat(list(gates.values())) @ torch.cat([slopes[name] for name in gates])
        if ratio is not None:
            total = total + job.config.search.ratio_weight * ratio
        job.accelerator.backward(total)
        self._average()
        norm = job.accelerator.clip_grad_norm_(self.searcher.generator.parameters(), job.config.train.clip)
        if not self.faults.leaves_out(step, {"generator's gradient": float(norm)}, batch):
            self.optimizer.param_groups[0]["lr"] = job.config.search.learning_rate * self.faults.ease
            self.optimizer.step()
        self.optimizer.zero_grad()
        return {} if ratio is None else {"ratio_loss": float(ratio.detach())}

    def _average(self) -> None:
        """Over ranks: they hold the same gradients but for kernels that add in no fixed order (a GRU's, on a GPU)."""
        if self.job.ranks.world == 1:
            return
        gradients = [each.grad for each in self.searcher.generator.parameters() if each.grad is not None]
        self.job.ranks.sum_(gradients)
        torch._foreach_div_(gradients, self.job.ranks.world)

    def decide(self, step: int) -> Decision:
        """The hard decision under which the adapters take their step."""
        return self.searcher.decide(step)

    def conclude(self) -> Decision:
        """The decision that stands."""
        return self.searcher.conclude()

    def _slopes(
        self, batch: Sequence[Example], gates: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, float], dict[str, Tensor]]:
        return self.faults.within_memory(batch, lambda: self.passes.slopes(batch, gates), lambda: None)

    def _importance(self) -> dict[str, Tensor]:
        """Mean squared gradient at each gate of the dense model: first-order, over batches (Molchanov et al. 2019)."""
        dense = {site.name: torch.ones(site.units, device=self.device) for site in self.job.sites}
        importance = {name: torch.zeros_like(gate) for name, gate in dense.items()}
        for index in range(self.job.config.search.evidence):
            batch = self.job.search.batch(index)
            _, slopes = self._slopes(batch, dense)
            largest = torch.cat(list(slopes.values())).abs().amax()
            if not self.faults.leaves_out(0, {"evidence": float(largest)}, batch):
                for name, slope in slopes.items():
                    importance[name] += slope.square()
        return importance


class Adapters:
    """Moves the LoRA adapters; cuts the model when the decision has settled, and may then move all of its weights."""

    def __init__(self, job: Job, passes: Passes, faults: Faults, layers: Layers) -> None:
        self.job, self.passes, self.faults, self.layers = job, passes, faults, layers
        self.is_cut = self.is_merged = False
        self.optimizer = self._fresh_optimizer()
        self.slopes: Mapping[str, Tensor] = {}  # at the gates that `advance` was given; none of a batch left out

    def advance(self, step: int, decision: Decision, gates: Mapping[str, Tensor] | None = None) -> Record:
        """One tuning step: LoRA-aware under the decision while it is a mask, plain once the model is cut.

        Where the generator's own `gates` are given they take the decision's place in the pass, which then gives the
        generator its `slopes`, too.
        """
        job, batch, started = self.job, self.job.train.batch(step), time.monotonic()
        torch.manual_seed(derive(job.config.seed, "dropout", step) + job.ranks.rank)
        record = self.faults.within_memory(batch, lambda: self._gradients(batch, decision, gates), self._forget)
        norm = job.accelerator.clip_grad_norm_(self.weights, job.config.train.clip)
        rate = learning_rate(step, job.config.train, job.config.train.weights_rate if self.is_merged else None)
        if self.faults.leaves_out(step, {**record, "gradient": float(norm)}, batch):
            self.slopes = {}
        else:
            rate *= self.faults.ease
            self._move(rate, decision)
        self._forget()
        tokens = sum(len(example.ids) for example in batch)
        return record | {"lr": rate, "tokens_per_s": tokens / (time.monotonic() - started)}

    def _move(self, rate: float, decision: Decision) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.job.config.search.sparsity == "proximal" and not self.is_cut:
            soft_threshold(self.job.model, decision.gates, self.job.sites, rate * self.job.config.search.lasso)

    def _forget(self) -> None:
        """Gradients are zeroed, not dropped: recorded passes add to the same tensors every time."""
        self.optimizer.zero_grad(set_to_none=False)

    def _gradients(self, batch: list[Example], decision: Decision, gates: Mapping[str, Tensor] | None) -> Record:
        if self.is_cut:
            return dict(self.passes.tune(batch, None))
        if gates is None:
            losses = self.passes.tune(batch, decision.gates)
        else:
            losses, self.slopes = self.passes.both(batch, gates)
        if self.job.config.search.sparsity != "lasso" or not any(site.is_sliced for site in self.job.sites):
            return dict(losses)
        return {**losses, "lasso": self.passes.shrink(decision.gates, self.job.config.search.lasso)}

    def cut(self, plan: Plan) -> None:
        """Cut the running model. The optimiser goes on with the moments of what stays, or anew with all weights."""
        moments = optimizer_tensors(self.optimizer, list(adapters(self.job.model)))
        self.shrink(plan)
        self.optimizer = self._fresh_optimizer()
        if self.is_merged:
            return
        stay = {
            f"{name}#{moment}": tensor
            for moment, tensors in by_moment(moments).items()
            for name, tensor in (tensors if moment == "step" else cut_state(tensors, plan, self.job.sites)).items()
        }
        restore_optimizer(self.optimizer, list(adapters(self.job.model)), stay)

    def shrink(self, plan: Plan) -> None:
        """Give model and adapters their smaller shapes; where all weights are to be tuned, merge the two."""
        self.layers.cut(plan, self.job.sites)
        self.passes.forget()
        self.is_cut = True
        if tunes_all(self.job.config.train, self.job.sites):
            merge_adapters(self.job.model, trainable=True)
            self.is_merged = True

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Put back weights and moments of a checkpoint; the model has been shrunk where they are of a cut one."""
        named = adapters(self.job.model)
        for name, parameter in named.items():
            parameter.data = weights[name].to(parameter.device)
        self.optimizer = self._fresh_optimizer()
        restore_optimizer(self.optimizer, list(named), moments)

    def _fresh_optimizer(self) -> torch.optim.Optimizer:
        train, self.weights = self.job.config.train, list(adapters(self.job.model).values())
        if self.is_merged or train.optimizer == "muon":
            return Muon(self.weights, lr=train.learning_rate)
        return adamw(self.weights, lr=train.learning_rate, weight_decay=train.weight_decay)


def adamw(weights: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.01) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), in few kernels on a GPU."""
    listed = list(weights)
    fused = bool(listed) and listed[0].is_cuda
    return torch.optim.AdamW(listed, lr=lr, weight_decay=weight_decay, fused=fused or None)
