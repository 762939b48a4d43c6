"""Grouped-query attention with rotary positions: everything around the attention itself.

The cache and the attention backends are behind `AttentionStep`. Shape legend: T rows, E hidden
size, H and G this rank's query and KV heads, F = H + 2G, D head dimension, C positions.
"""

from torch import Tensor

from core.interfaces.attention import AttentionStep
from core.interfaces.model import BuildContext
from core.interfaces.weights import WeightReader
from core.layers.decoder_spec import DecoderSpec
from core.layers.linear import LinearPart, RowLinear, column_linear
from core.layers.norm import RMSNorm
from core.parallel.sharding import Sharding


class GroupedQueryAttention:
    """(T, E) replicated -> (T, E) replicated; whole heads on each rank."""

    __slots__ = (
        "_cos_sin_CD",
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
        spec: DecoderSpec,
        layer: int,
        cos_sin_CD: Tensor,
    ) -> None:
        shards = Sharding.over(context.comms.axes["tp"]).heads(spec.num_heads, spec.num_kv_heads)
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        parts = [
            LinearPart("q_proj", q_size, shards.q),
            LinearPart("k_proj", kv_size, shards.kv),
            LinearPart("v_proj", kv_size, shards.kv),
        ]
        self._qkv = column_linear(context, weights, parts, spec.hidden_size, bias=spec.qkv_bias)
        self._output = RowLinear(
            context, weights, "o_proj", spec.hidden_size, q_size, bias=spec.output_bias
        )
        self._norms = _NoHeadNorms()
        if spec.qk_norm:
            self._norms = _HeadNorms(
                RMSNorm(context, weights, "q_norm", spec.head_dim, spec.norm_eps),
                RMSNorm(context, weights, "k_norm", spec.head_dim, spec.norm_eps),
            )
        self._heads = (shards.num_heads, shards.num_kv_heads, shards.num_kv_heads)
        self._num_merged_heads = sum(self._heads)
        self._head_dim = spec.head_dim
        self._cos_sin_CD = cos_sin_CD
        self._layer = layer
        self._ops = context.ops

    def __call__(self, x_TE: Tensor, positions_T: Tensor, attention: AttentionStep) -> Tensor:
        qkv_TFD = self._qkv(x_TE).view(x_TE.shape[0], self._num_merged_heads, self._head_dim)
        q_THD, k_TGD, v_TGD = qkv_TFD.split_with_sizes(self._heads, dim=1)
        q_THD, k_TGD = self._norms(q_THD, k_TGD)
        q_THD, k_TGD = self._ops.rope(q_THD, k_TGD, self._cos_sin_CD, positions_T)
        return self._output(attention.attend(self._layer, q_THD, k_TGD, v_TGD).flatten(1))


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
