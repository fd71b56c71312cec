"""Costs of a pruned model in use: FLOPs of a request, bytes of weights, bytes of weights and KV cache.

Every cost is a fixed part plus a sum over layers, and a layer's cost is a function of its kept units. It is exact, not
linear, and never falls as more units are kept. (Measured seconds, in `latency_table`, may fall where hardware does.)
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.layer_shapes import ModelShape, UnitCounts
from prunetune.errors import ConfigError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
INT8_ROW_BYTES = 5  # of a row's scale and zero point (torchao 0.18)
INT4_SCALE_BYTES = 4
INT4_BLOCK = 64  # weights that share a scale
Q8_BLOCK, Q8_BLOCK_BYTES = 32, 34  # weights of a block, and its bytes with the scale


class Cost(Protocol):
    """What a kind of budget limits."""

    @property
    def dense_shape(self) -> ModelShape:
        """The dense model."""

    def fixed_cost(self, counts: UnitCounts) -> float:
        """The part outside layers, which depends on the kept hidden channels only, where these are units."""

    def layer_cost(self, layer: int, counts: UnitCounts) -> float:
        """The part of one layer, which depends on the kept units of its sites."""


def total_cost(cost: Cost, counts: UnitCounts) -> float:
    """The cost of a whole plan."""
    return cost.fixed_cost(counts) + sum(cost.layer_cost(layer, counts) for layer in cost.dense_shape.layers)


Costs = tuple[Cost, ...]  # the largest counts


def max_cost(costs: Costs, counts: UnitCounts) -> float:
    """The largest of several costs of a whole plan."""
    return max(total_cost(cost, counts) for cost in costs)


@dataclass(frozen=True)
class FlopsCost:
    """FLOPs of one request as PyTorch counts them: matrices, and attention, whose full square counts in the prefill.

    All generated tokens but the last go through the layers; each takes one pass of the head. Raises `ConfigError` for
    mixtures of experts.
    """

    dense_shape: ModelShape
    workload: WorkloadConfig

    def __post_init__(self) -> None:
        if self.dense_shape.is_mixture:
            raise ConfigError(
                "budget.flops does not count mixtures of experts, where each token multiplies only its own experts: "
                "use budget.memory or budget.keep"
            )

    def fixed_cost(self, counts: UnitCounts) -> float:
        """The head, for every generated token."""
        head_params = self.dense_shape.lm_head_params * self.dense_shape.channel_share(counts)
        return 2.0 * self.workload.generate * head_params

    def layer_cost(self, layer: int, counts: UnitCounts) -> float:
        """Matrices, and attention between tokens."""
        shape, prompt, steps = self.dense_shape.layers[layer], self.workload.prompt, self.workload.generate - 1
        weights = sum(rows * columns for rows, columns in (linear.shape(counts) for linear in shape.linears))
        query_size = shape.heads(counts)[1] * shape.head_dim
        return 2.0 * (prompt + steps) * weights + 4.0 * query_size * self._attention_pairs[shape.sliding_window]

    @cached_property
    def _attention_pairs(self) -> dict[int, int]:
        """{window: pairs of query and key in a request}; a step sees all tokens before it, or those in the window."""
        prompt, steps = self.workload.prompt, self.workload.generate - 1
        pairs = {}
        for window in {layer.sliding_window for layer in self.dense_shape.layers.values()}:
            growing = min(steps, max(0, window - prompt)) if window else steps  # steps until the window is full
            pairs[window] = prompt * (prompt + growing) + growing * (growing + 1) // 2 + window * (steps - growing)
        return pairs


@dataclass(frozen=True)
class WeightsCost:
    """Bytes of the weights in the workload's format, which are those of the file and in memory."""

    dense_shape: ModelShape
    workload: WorkloadConfig

    def __post_init__(self) -> None:
        if self.dense_shape.is_mixture and self.workload.weights == "q8_0":
            raise ConfigError("workload.weights q8_0 is not counted for mixtures of experts: use plain")

    def fixed_cost(self, counts: UnitCounts) -> float:
        """Embeddings, head, norms, and linears that no site cuts.

        A q8_0 file holds every matrix in its type, embeddings and head too, and vectors in float32.
        """
        shape = self.dense_shape
        linears = [linear for layer in shape.layers.values() for linear in layer.linears if not linear.is_cut]
        linear_bytes = sum(linear.rows * self._row_bytes(linear.columns) for linear in linears)
        other_params = shape.fixed_params(counts) - sum(linear.rows * linear.columns for linear in linears)
        if self.workload.weights != "q8_0":
            return float(DTYPE_BYTES[self.workload.dtype] * other_params) + linear_bytes
        table_params = shape.embedding_params + (0 if shape.tied else shape.lm_head_params)
        dense_columns = shape.lm_head_params // shape.lm_head_rows
        rows, columns = table_params // dense_columns, round(dense_columns * shape.channel_share(counts))
        return rows * self._row_bytes(columns) + 4.0 * (other_params - rows * columns) + linear_bytes

    def layer_cost(self, layer: int, counts: UnitCounts) -> float:
        """Kept units of a layer: rows of linears in the workload's format, other parameters as plain numbers."""
        shape = self.dense_shape.layers[layer]
        linears = [linear.shape(counts) for linear in shape.linears if linear.is_cut]
        other_params = shape.params(counts) - sum(rows * columns for rows, columns in linears)
        other_bytes = 4 if self.workload.weights == "q8_0" else DTYPE_BYTES[self.workload.dtype]
        return sum(rows * self._row_bytes(columns) for rows, columns in linears) + other_bytes * other_params

    def _row_bytes(self, columns: int) -> float:
        """Bytes of one row of a matrix in a layer."""
        scheme = self.workload.weights
        if scheme == "int8":
            return columns + INT8_ROW_BYTES if columns else 0.0
        if scheme == "int4" and columns % INT4_BLOCK == 0:
            return columns / 2 + columns / INT4_BLOCK * INT4_SCALE_BYTES
        if scheme == "q8_0":
            return columns / Q8_BLOCK * Q8_BLOCK_BYTES if columns % Q8_BLOCK == 0 else 2.0 * columns
        return float(DTYPE_BYTES[self.workload.dtype] * columns)


@dataclass(frozen=True)
class MemoryCost:
    """Bytes of weights and KV cache at the end of a batch of requests; a sliding window caches its own length at most.

    Activations and the runtime's own memory are not counted.
    """

    dense_shape: ModelShape
    workload: WorkloadConfig

    def fixed_cost(self, counts: UnitCounts) -> float:
        return self._weights.fixed_cost(counts)

    @cached_property
    def _weights(self) -> WeightsCost:
        return WeightsCost(self.dense_shape, self.workload)

    def layer_cost(self, layer: int, counts: UnitCounts) -> float:
        """Weights, and one key and one value for each KV head and cached token."""
        shape, workload = self.dense_shape.layers[layer], self.workload
        tokens = min(workload.cached_tokens, shape.sliding_window or workload.cached_tokens)
        numbers = 2 * workload.batch * tokens * shape.heads(counts)[0] * shape.head_dim
        return self._weights.layer_cost(layer, counts) + numbers * DTYPE_BYTES[workload.dtype]
