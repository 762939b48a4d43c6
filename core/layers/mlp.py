"""The gated SiLU MLP: down(silu(gate(x)) * up(x)), cut along the intermediate size over tp."""

from torch import Tensor

from core.interfaces.model import BuildContext
from core.interfaces.weights import WeightReader
from core.layers.linear import LinearPart, RowLinear, column_linear
from core.parallel.sharding import Sharding


class GatedMLP:
    """(T, E) replicated -> (T, E) replicated."""

    __slots__ = ("_down", "_gate_up", "_ops")

    def __init__(
        self,
        context: BuildContext,
        weights: WeightReader,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool,
    ) -> None:
        shard = Sharding.over(context.comms.axes["tp"]).equal(0)
        parts = [LinearPart(name, intermediate_size, shard) for name in ("gate_proj", "up_proj")]
        self._gate_up = column_linear(context, weights, parts, hidden_size, bias=bias)
        self._down = RowLinear(
            context, weights, "down_proj", hidden_size, intermediate_size, bias=bias
        )
        self._ops = context.ops

    def __call__(self, x_TE: Tensor) -> Tensor:
        return self._down(self._ops.silu_and_mul(self._gate_up(x_TE)))
