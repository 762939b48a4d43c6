"""Linear layers over a mesh axis: cut along outputs (column) or along inputs (row).

Several matrices that read the same input are one matmul. Knows nothing of attention or MLPs.
Shape legend: T rows, O outputs, I inputs; sizes are logical unless a name says local.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from core.interfaces.model import BuildContext
from core.interfaces.ops import LinearKernel
from core.interfaces.weights import LinearWeight, WeightReader, join_rows
from core.parallel.sharding import Shard, Sharding


@dataclass(frozen=True, slots=True)
class LinearPart:
    """One of the matrices a column-parallel layer merges: checkpoint name, rows, which it keeps."""

    name: str
    num_outputs: int
    shard: Shard


def column_linear(
    context: BuildContext,
    weights: WeightReader,
    parts: Sequence[LinearPart],
    num_inputs: int,
    *,
    bias: bool,
) -> LinearKernel:
    """(T, I) replicated -> (T, local outputs of every part, back to back)."""
    return context.ops.linear(*_joined(context, weights, parts, num_inputs, bias=bias))


def gated_linear(
    context: BuildContext,
    weights: WeightReader,
    parts: Sequence[LinearPart],
    num_inputs: int,
    *,
    bias: bool,
) -> LinearKernel:
    """(T, I) replicated -> (T, local outputs of one part): silu of the first times the second."""
    return context.ops.gated_linear(*_joined(context, weights, parts, num_inputs, bias=bias))


def _joined(
    context: BuildContext,
    weights: WeightReader,
    parts: Sequence[LinearPart],
    num_inputs: int,
    *,
    bias: bool,
) -> tuple[LinearWeight, Tensor | None]:
    """The weights of all parts back to back, and their biases."""
    weight_format = context.format
    weight_OI = weight_format.join(
        [
            weight_format.take(
                weights, f"{part.name}.weight", (part.num_outputs, num_inputs), part.shard
            )
            for part in parts
        ]
    )
    if not bias:
        return weight_OI, None
    biases = [weights.take(f"{part.name}.bias", (part.num_outputs,), part.shard) for part in parts]
    return weight_OI, biases[0] if len(biases) == 1 else join_rows(biases)


def row_linear(
    context: BuildContext,
    weights: WeightReader,
    name: str,
    num_outputs: int,
    num_inputs: int,
    *,
    bias: bool,
    axis: str = "tp",
) -> LinearKernel:
    """(T, local inputs) -> (T, O), a part of the sum over the ranks of `axis`."""
    sharding = Sharding.over(context.comms.axes[axis])
    weight_OI = context.format.take(
        weights, f"{name}.weight", (num_outputs, num_inputs), sharding.equal(1)
    )
    bias_O = weights.take(f"{name}.bias", (num_outputs,)) if bias else None
    # The bias enters the sum over ranks once.
    return context.ops.linear(weight_OI, bias_O if sharding.adds_bias() else None)
