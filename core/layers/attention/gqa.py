"""Grouped-query attention with rotary positions: everything around the attention itself.

The cache and the attention backends are behind `AttentionStep`. Shape legend: T rows, E hidden
size, H and G this rank's query and KV heads, F = H + 2G, D head dimension, C positions, R values of
a head that turn.
"""

from torch import Tensor

from core.interfaces.attention import HeadTransform
from core.interfaces.model import BuildContext, ModelStep
from core.interfaces.weights import WeightReader
from core.layers.attention.gqa_spec import GroupedQuerySizes
from core.layers.basic.linear import LinearPart, column_linear, row_linear
from core.layers.basic.row_exchange import row_exchange
from core.parallel.sharding import Sharding


class GroupedQueryAttention:
    """Rows in the stream's layout -> the same; whole heads on each rank of tp."""

    __slots__ = (
        "_head_dim",
        "_layer",
        "_num_merged_heads",
        "_output",
        "_qkv",
        "_transform",
        "exchange",
    )

    def __init__(
        self,
        context: BuildContext,
        weights: WeightReader,
        sizes: GroupedQuerySizes,
        layer: int,
        cos_sin_CR: Tensor,
    ) -> None:
        shards = Sharding.over(context.comms.axes["tp"]).heads(sizes.num_heads, sizes.num_kv_heads)
        q_size, kv_size = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        parts = [
            LinearPart("q_proj", q_size, shards.q),
            LinearPart("k_proj", kv_size, shards.kv),
            LinearPart("v_proj", kv_size, shards.kv),
        ]
        self._qkv = column_linear(context, weights, parts, sizes.hidden_size, bias=sizes.qkv_bias)
        self._output = row_linear(
            context, weights, "o_proj", sizes.hidden_size, q_size, bias=sizes.output_bias
        )
        self.exchange = row_exchange(context, "tp")
        norms = [
            weights.take(f"{name}.weight", (sizes.head_dim,)) if sizes.qk_norm else None
            for name in ("q_norm", "k_norm")
        ]
        self._transform = HeadTransform(
            shards.num_kv_heads, cos_sin_CR, norms[0], norms[1], sizes.norm_eps
        )
        self._num_merged_heads = shards.num_heads + 2 * shards.num_kv_heads
        self._head_dim = sizes.head_dim
        self._layer = layer

    def __call__(self, x_TE: Tensor, positions_T: Tensor, step: ModelStep) -> Tensor:
        return self.exchange.scatter(self.partial(x_TE, positions_T, step), step.rows)

    def partial(self, x_TE: Tensor, positions_T: Tensor, step: ModelStep) -> Tensor:
        """What `exchange` is yet to sum up."""
        if not step.rows.num_real:  # the same on all ranks of tp: this DP rank is idle
            return x_TE
        x_TE = self.exchange.gather(x_TE, step.rows)
        qkv_TFD = self._qkv(x_TE).view(x_TE.shape[0], self._num_merged_heads, self._head_dim)
        out_THD = step.attention.attend(self._layer, qkv_TFD, self._transform, positions_T)
        return self._output(out_THD.flatten(1))
