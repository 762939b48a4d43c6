"""Grouped-query attention with rotary positions: everything around the attention itself.

The cache and the attention backends are behind `AttentionStep`. Shape legend: T rows, E hidden
size, H and G this rank's query and KV heads, F = H + 2G, D head dimension, C positions.
"""

from torch import Tensor

from core.interfaces.model import BuildContext, ModelStep
from core.interfaces.weights import WeightReader
from core.layers.decoder_spec import GroupedQuerySizes
from core.layers.linear import LinearPart, column_linear, row_linear
from core.layers.norm import RMSNorm
from core.layers.row_exchange import row_exchange
from core.parallel.sharding import Sharding


class GroupedQueryAttention:
    """Rows in the stream's layout -> the same; whole heads on each rank of tp."""

    __slots__ = (
        "_cos_sin_CD",
        "_exchange",
        "_head_dim",
        "_heads",
        "_layer",
        "_norms",
        "_num_merged_heads",
        "_ops",
        "_output",
        "_qkv",
    )

    def __init__(
        self,
        context: BuildContext,
        weights: WeightReader,
        sizes: GroupedQuerySizes,
        layer: int,
        cos_sin_CD: Tensor,
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
        self._exchange = row_exchange(context, "tp")
        self._norms = _NoHeadNorms()
        if sizes.qk_norm:
            self._norms = _HeadNorms(
                RMSNorm(context, weights, "q_norm", sizes.head_dim, sizes.norm_eps),
                RMSNorm(context, weights, "k_norm", sizes.head_dim, sizes.norm_eps),
            )
        self._heads = (shards.num_heads, shards.num_kv_heads, shards.num_kv_heads)
        self._num_merged_heads = sum(self._heads)
        self._head_dim = sizes.head_dim
        self._cos_sin_CD = cos_sin_CD
        self._layer = layer
        self._ops = context.ops

    def __call__(self, x_TE: Tensor, positions_T: Tensor, step: ModelStep) -> Tensor:
        if not step.rows.num_real:  # the same on all ranks of tp: this DP rank is idle
            return x_TE
        x_TE = self._exchange.gather(x_TE, step.rows)
        qkv_TFD = self._qkv(x_TE).view(x_TE.shape[0], self._num_merged_heads, self._head_dim)
        q_THD, k_TGD, v_TGD = qkv_TFD.split_with_sizes(self._heads, dim=1)
        q_THD, k_TGD = self._norms(q_THD, k_TGD)
        q_THD, k_TGD = self._ops.rope(q_THD, k_TGD, self._cos_sin_CD, positions_T)
        out_THD = step.attention.attend(self._layer, q_THD, k_TGD, v_TGD)
        return self._exchange.scatter(self._output(out_THD.flatten(1)), step.rows)


class _NoHeadNorms:
    """Families without normalised heads."""

    def __call__(self, q_THD: Tensor, k_TGD: Tensor) -> tuple[Tensor, Tensor]:
        return q_THD, k_TGD


class _HeadNorms(_NoHeadNorms):
    """Each query and key head normalised on its own, before the rotation."""

    def __init__(self, q_norm: RMSNorm, k_norm: RMSNorm) -> None:
        self._q_norm, self._k_norm = q_norm, k_norm

    def __call__(self, q_THD: Tensor, k_TGD: Tensor) -> tuple[Tensor, Tensor]:
        return self._q_norm(q_THD), self._k_norm(k_TGD)
