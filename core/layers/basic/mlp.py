"""The gated SiLU MLP: down(silu(gate(x)) * up(x)), cut along the intermediate size over an axis."""

from torch import Tensor

from core.interfaces.model import BuildContext, ModelStep
from core.interfaces.weights import WeightReader
from core.layers.basic.linear import LinearPart, gated_linear, row_linear
from core.layers.basic.row_exchange import row_exchange
from core.parallel.sharding import Sharding


class PartialMLP:
    """(T, E) -> (T, E), a part of the sum over the ranks of `axis`."""

    __slots__ = ("_down", "_gated")

    def __init__(
        self,
        context: BuildContext,
        weights: WeightReader,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool,
        axis: str,
    ) -> None:
        shard = Sharding.over(context.comms.axes[axis]).equal(0)
        parts = [LinearPart(name, intermediate_size, shard) for name in ("gate_proj", "up_proj")]
        self._gated = gated_linear(context, weights, parts, hidden_size, bias=bias)
        self._down = row_linear(
            context, weights, "down_proj", hidden_size, intermediate_size, bias=bias, axis=axis
        )

    def __call__(self, x_TE: Tensor) -> Tensor:
        return self._down(self._gated(x_TE))


class GatedMLP:
    """Rows in the stream's layout -> the same; computed by the ranks of the axis "dense"."""

    __slots__ = ("_mlp", "exchange")

    def __init__(
        self,
        context: BuildContext,
        weights: WeightReader,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool,
    ) -> None:
        self._mlp = PartialMLP(
            context, weights, hidden_size, intermediate_size, bias=bias, axis="dense"
        )
        self.exchange = row_exchange(context, "dense")

    def __call__(self, x_TE: Tensor, step: ModelStep) -> Tensor:
        return self.exchange.scatter(self.partial(x_TE, step), step.rows)

    def partial(self, x_TE: Tensor, step: ModelStep) -> Tensor:
        """What `exchange` is yet to sum up."""
        return self._mlp(self.exchange.gather(x_TE, step.rows))
