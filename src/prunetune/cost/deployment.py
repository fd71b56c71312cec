"""What a plan costs in use, as a sum over layers: FLOPs, bytes, seconds. Each is a function of the units kept.

`Cost.of_layer` is all that selection needs: it is exact, not linear, and never falls as more is kept (a measured table
may, where hardware does).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.layer_shapes import ModelShape, UnitCounts
from prunetune.errors import ConfigError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
INT8_ROW = 5  # bytes of a row's scale and zero point (torchao 0.18)
INT4_SCALE_BYTES = 4  # bytes of a scale of int4
INT4_BLOCK = 64  # weights under one scale
Q8_BLOCK, Q8_BYTES = 32, 34  # weights of a block, and its bytes


class Cost(Protocol):
    """One kind of budget."""

    @property
    def dense_shape(self) -> ModelShape:
        """The dense model."""

    @property
    def fixed_cost(self) -> float:
        """What no unit changes."""

    def layer_cost(self, layer: int, counts: UnitCounts) -> float:
        """What a layer adds under these counts of its sites."""


def total_cost(cost: Cost, counts: UnitCounts) -> float:
    """Of a whole plan."""
    return cost.fixed_cost + sum(cost.layer_cost(layer, counts) for layer in cost.dense_shape.layers)


Costs = tuple[Cost, ...]  # of which the largest counts


def max_cost(costs: Costs, counts: UnitCounts) -> float:
    """The largest cost of a whole plan."""
    return max(total_cost(cost, counts) for cost in costs)


@dataclass(frozen=True)
class FlopsCost:
    """Of one request, as PyTorch's counter has them: matrices and attention, its full square in the prefill.

    A token of the answer goes through the layers but for the last; each takes the head. Raises `ConfigError` for
    mixtures, where a token's experts are what counts.
    """

    dense_shape: ModelShape
    workload: WorkloadConfig

    def __post_init__(self) -> None:
        if self.dense_shape.is_mixture:
            raise ConfigError(
                "budget.flops does not count mixtures of experts, where a token's own experts are what is multiplied: "
                "use budget.memory or budget.keep"
            )

    @property
    def fixed_cost(self) -> float:
        """The head, for every token written."""
        return 2.0 * self.workload.generate * self.dense_shape.lm_head_params

    def layer_cost(self, layer: int, counts: UnitCounts) -> float:
        """Matrices, and attention between tokens."""
        part, prompt, steps = self.dense_shape.layers[layer], self.workload.prompt, self.workload.generate - 1
        weights = sum(rows * columns for rows, columns in (linear.shape(counts) for linear in part.linears))
        queries = part.heads(counts)[1] * part.head_dim
        return 2.0 * (prompt + steps) * weights + 4.0 * queries * self._pairs[part.sliding_window]

    @cached_property
    def _pairs(self) -> dict[int, int]:
        """{window: pairs of query and key}."""
        prompt, steps = self.workload.prompt, self.workload.generate - 1
        ends = range(prompt + 1, prompt + steps + 1)
        windows = {layer.sliding_window for layer in self.dense_shape.layers.values()}
        return {window: prompt**2 + sum(min(window or end, end) for end in ends) for window in windows}


@dataclass(frozen=True)
class WeightsCost:
    """Bytes of the weights as the workload holds them: of the file, and of the memory they take."""

    dense_shape: ModelShape
    workload: WorkloadConfig

    def __post_init__(self) -> None:
        if self.dense_shape.is_mixture and self.workload.weights == "q8_0":
            raise ConfigError("workload.weights q8_0 is not counted for mixtures of experts: take plain")

    @property
    def fixed_cost(self) -> float:
        """Embeddings, head, norms; a .gguf file has matrices of all kinds in its type, and vectors in float32."""
        outside, width = self.dense_shape.unprunable_params, DTYPE_BYTES[self.workload.dtype]
        if self.workload.weights != "q8_0":
            return float(width * (outside - self._others)) + self._others_bytes
        tables = self.dense_shape.embedding_params + (0 if self.dense_shape.tied else self.dense_shape.lm_head_params)
        columns = self.dense_shape.lm_head_params // self.dense_shape.lm_head_rows
        vectors = outside - self._others - tables
        rows = tables // columns
        return rows * self._row(columns) + 4.0 * vectors + self._others_bytes

    def layer_cost(self, layer: int, counts: UnitCounts) -> float:
        """Units, beside the linears of the layer that no unit touches, which `fixed` holds."""
        part = self.dense_shape.layers[layer]
        held = [linear.shape(counts) for linear in part.linears if linear.is_cut]
        weights = sum(rows * columns for rows, columns in held)
        plain = 4 if self.workload.weights == "q8_0" else DTYPE_BYTES[self.workload.dtype]
        return sum(rows * self._row(columns) for rows, columns in held) + plain * (part.params(counts) - weights)

    @cached_property
    def _untouched(self) -> list[tuple[int, int]]:
        return [
            (linear.rows, linear.columns)
            for part in self.dense_shape.layers.values()
            for linear in part.linears
            if not linear.is_cut
        ]

    @property
    def _others(self) -> int:
        return sum(rows * columns for rows, columns in self._untouched)

    @property
    def _others_bytes(self) -> float:
        return sum(rows * self._row(columns) for rows, columns in self._untouched)

    def _row(self, columns: int) -> float:
        """Bytes of one row of a matrix in a layer."""
        width, scheme = DTYPE_BYTES[self.workload.dtype], self.workload.weights
        if scheme == "int8":
            return columns + INT8_ROW if columns else 0.0
        if scheme == "int4" and columns % INT4_BLOCK == 0:
            return columns / 2 + columns / INT4_BLOCK * INT4_SCALE_BYTES
        if scheme == "q8_0":
            return columns / Q8_BLOCK * Q8_BYTES if columns % Q8_BLOCK == 0 else 2.0 * columns
        return float(width * columns)


@dataclass(frozen=True)
class MemoryCost:
    """Bytes of weights and KV cache at the end of a batch of requests; a sliding window holds no more than its own.

    Activations and the runtime's own are not counted.
    """

    dense_shape: ModelShape
    workload: WorkloadConfig

    @property
    def fixed_cost(self) -> float:
        """Of the weights."""
        return self._weights.fixed_cost

    @cached_property
    def _weights(self) -> WeightsCost:
        return WeightsCost(self.dense_shape, self.workload)

    def layer_cost(self, layer: int, counts: UnitCounts) -> float:
        """Weights, and one key and one value for each KV head and token."""
        part = self.dense_shape.layers[layer]
        tokens = min(self.workload.cached_tokens, part.sliding_window or self.workload.cached_tokens)
        cache = (
            2 * self.workload.batch * tokens * part.heads(counts)[0] * part.head_dim * DTYPE_BYTES[self.workload.dtype]
        )
        return self._weights.layer_cost(layer, counts) + cache
