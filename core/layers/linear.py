"""Linear layers over the tp axis: cut along outputs (column) or along inputs (row).

Several matrices that read the same input are one matmul. Knows nothing of attention or MLPs.
Shape legend: T rows, O outputs, I inputs; sizes are logical unless a name says local.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.interfaces.model import BuildContext
from core.interfaces.ops import LinearKernel
from core.interfaces.weights import WeightReader
from core.parallel.layout import Layout
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
    weight_OI = _joined(
        [
            weights.take(f"{part.name}.weight", (part.num_outputs, num_inputs), part.shard)
            for part in parts
        ]
    )
    if not bias:
        return context.ops.linear(weight_OI, None)
    bias_O = _joined(
        [weights.take(f"{part.name}.bias", (part.num_outputs,), part.shard) for part in parts]
    )
    return context.ops.linear(weight_OI, bias_O)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class RowLinear:
    """(T, local inputs) -> (T, O), summed over tp and replicated."""

    __slots__ = ("_kernel", "_reduce")

    def __init__(
        self,
        context: BuildContext,
        weights: WeightReader,
        name: str,
        num_outputs: int,
        num_inputs: int,
        *,
        bias: bool,
    ) -> None:
        sharding = Sharding.over(context.comms.axes["tp"])
        weight_OI = weights.take(f"{name}.weight", (num_outputs, num_inputs), sharding.equal(1))
        bias_O = weights.take(f"{name}.bias", (num_outputs,)) if bias else None
        # The bias enters the sum over ranks once.
        self._kernel = context.ops.linear(weight_OI, bias_O if sharding.adds_bias() else None)
        self._reduce = context.comms.bridge("tp", src=Layout.PARTIAL, dst=Layout.REPLICATED)

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self._reduce(self._kernel(x_TI))
