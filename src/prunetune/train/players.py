"""The two players of the loop: the generator's search, and the adapters' tuning."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from prunetune.budget.params import kept_share, ratio_loss
from prunetune.data.templates import Example
from prunetune.decide.decision import Decision, Searcher
from prunetune.errors import ModelError
from prunetune.model.masking import masked
from prunetune.model.surgery import cut_linears
from prunetune.plan import Plan
from prunetune.seeds import derive
from prunetune.train.adapters import adapters, cut_state
from prunetune.train.job import Job, Record
from prunetune.train.objectives import backward, backward_to_gates, group_lasso
from prunetune.train.schedule import learning_rate
from prunetune.train.state import by_moment, optimizer_tensors, restore_optimizer


class Search:
    """Moves the pruning-decision generator; the model's weights stay as they are."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.device = next(job.model.parameters()).device
        self.searcher = Searcher(job.sites, job.shape, job.config, job.schedule.keep_at, self.device)
        self.optimizer = torch.optim.AdamW(self.searcher.generator.parameters(), lr=job.config.search.learning_rate)

    def advance(self, step: int) -> Record:
        """One generator step on a calibration batch (ATP, section 3.2)."""
        job = self.job
        if step == 0 and job.config.search.evidence:
            self.searcher.start_from(self._importance())
        gates = self.searcher.sample(step)
        loss, slopes = self._slopes(gates, job.search.batch(step))
        ratio = ratio_loss(kept_share(gates, job.sites), job.schedule.keep) if self.searcher.is_sampled else None
        # The model's gradient stops at the gates; from there it flows on into the generator, with the budget's.
        total = torch.stack([(gate * slopes[name]).sum() for name, gate in gates.items()]).sum()
        if ratio is not None:
            total = total + job.config.search.ratio_weight * ratio
        job.accelerator.backward(total)
        job.accelerator.clip_grad_norm_(self.searcher.generator.parameters(), job.config.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"search_loss": loss} if ratio is None else {"search_loss": loss, "ratio_loss": float(ratio.detach())}

    def decide(self, step: int) -> Decision:
        """The hard decision under which the adapters take their step."""
        return self.searcher.decide(step)

    def conclude(self) -> Decision:
        """The decision that stands."""
        return self.searcher.conclude()

    def _slopes(self, gates: dict[str, Tensor], batch: list[Example]) -> tuple[float, dict[str, Tensor]]:
        """Loss of the gated model and its gradient at each gate; adapters gated and frozen."""
        job, frozen = self.job, list(adapters(self.job.model).values())
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            return backward_to_gates(job.model, gates, job.sites, batch, job.pad_id, job.config.train.micro_tokens)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _importance(self) -> dict[str, Tensor]:
        """Mean squared gradient at each gate of the dense model: first-order, over batches (Molchanov et al. 2019)."""
        dense = {site.name: torch.ones(site.units, device=self.device) for site in self.job.sites}
        importance = {name: torch.zeros_like(gate) for name, gate in dense.items()}
        for index in range(self.job.config.search.evidence):
            _, slopes = self._slopes(dense, self.job.search.batch(index))
            for name, slope in slopes.items():
                importance[name] += slope.square()
        return importance


class Adapters:
    """Moves the LoRA adapters, and cuts the model when the decision has settled."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.is_cut = False
        self.optimizer = self._fresh_optimizer()

    def advance(self, step: int, decision: Decision) -> Record:
        """One tuning step: LoRA-aware under the decision while it is a mask, plain once the model is cut."""
        job, batch, started = self.job, self.job.train.batch(step), time.monotonic()
        job.model.train()
        torch.manual_seed(derive(job.config.seed, "dropout", step))
        loss, record = self._gradients(batch, decision)
        job.model.eval()
        if not math.isfinite(loss):
            rows = ", ".join(example.id for example in batch[:3])
            raise ModelError(
                f"the loss is {loss} at step {step + 1} (rows {rows}, ...): "
                "lower train.learning_rate, or set dtype float32"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, job.config.train)
        job.accelerator.clip_grad_norm_(adapters(job.model).values(), job.config.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = sum(len(example.ids) for example in batch)
        return record | {"loss": loss, "tokens_per_s": tokens / (time.monotonic() - started)}

    def _gradients(self, batch: list[Example], decision: Decision) -> tuple[float, Record]:
        job, micro_tokens = self.job, self.job.config.train.micro_tokens
        if self.is_cut:
            return backward(job.model, batch, job.pad_id, micro_tokens), {}
        with masked(job.model, decision.gates, adapters="free", sites=job.sites):
            loss = backward(job.model, batch, job.pad_id, micro_tokens)
        penalty = group_lasso(job.model, decision.gates, job.sites)
        job.accelerator.backward(job.config.search.lasso * penalty)
        return loss, {"lasso": float(penalty.detach())}

    def cut(self, plan: Plan) -> None:
        """Cut the running model; the optimiser goes on with the moments of what stays."""
        moments = optimizer_tensors(self.optimizer, list(adapters(self.job.model)))
        cut_linears(self.job.model, plan, sites=self.job.sites)
        self.is_cut = True
        self.optimizer = self._fresh_optimizer()
        stay = {
            f"{name}#{moment}": tensor
            for moment, tensors in by_moment(moments).items()
            for name, tensor in (tensors if moment == "step" else cut_state(tensors, plan, self.job.sites)).items()
        }
        restore_optimizer(self.optimizer, list(adapters(self.job.model)), stay)

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Put back weights and moments of a checkpoint; the model is cut already where they are."""
        named = adapters(self.job.model)
        for name, parameter in named.items():
            parameter.data = weights[name].to(parameter.device)
        self.optimizer = self._fresh_optimizer()
        restore_optimizer(self.optimizer, list(named), moments)

    def _fresh_optimizer(self) -> torch.optim.AdamW:
        train = self.job.config.train
        return torch.optim.AdamW(
            adapters(self.job.model).values(), lr=train.learning_rate, weight_decay=train.weight_decay
        )
