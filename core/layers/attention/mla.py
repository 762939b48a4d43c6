"""Multi-head latent attention with rotary positions: everything around the attention itself.

Queries are projected at once or through a low rank; keys and values come out of one latent vector a
token, which is what is cached, with one rotated key part that all heads share. The cache and the
attention backends are behind `LatentAttentionStep`. Source: DeepSeek-V2, arXiv 2405.04434, and
transformers' modeling_deepseek_v2 and _v3.

Shape legend: T rows, E hidden size, H this rank's heads, N non-rotary and R rotary dimensions of a
head, D = N + R, V value dimensions, C latent dimensions, Z = C + R, X cached tokens.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from core.interfaces.latent_attention import LatentTransform
from core.interfaces.model import BuildContext, ModelStep
from core.interfaces.ops import LinearKernel
from core.interfaces.weights import WeightReader
from core.layers.attention.mla_spec import LatentAttentionSizes
from core.layers.basic.linear import LinearPart, column_linear, row_linear
from core.layers.basic.norm import RMSNorm
from core.layers.basic.row_exchange import row_exchange
from core.parallel.sharding import Shard, Sharding

_WHOLE = Shard(0, 0, 1)  # of what every rank of tp computes: the parts that heads share


class LatentAttention:
    """Rows in the stream's layout -> the same; whole heads on each rank of tp."""

    __slots__ = (
        "_input",
        "_layer",
        "_num_heads",
        "_output",
        "_projections",
        "_qk_head_dim",
        "_queries",
        "_split",
        "_transform",
        "exchange",
    )

    def __init__(
        self,
        context: BuildContext,
        weights: WeightReader,
        sizes: LatentAttentionSizes,
        layer: int,
        cos_sin_CR: Tensor,
    ) -> None:
        heads = Sharding.over(context.comms.axes["tp"]).heads(sizes.num_heads, sizes.num_heads)
        q_size = sizes.num_heads * sizes.qk_head_dim
        cached_size = sizes.kv_lora_rank + sizes.qk_rope_head_dim
        self._queries: Callable[[Tensor], Tensor] = _as_they_are
        first = LinearPart("q_proj", q_size, heads.q)
        if sizes.q_lora_rank is not None:
            first = LinearPart("q_a_proj", sizes.q_lora_rank, _WHOLE)
            self._queries = _LowRankQueries(context, weights, sizes, heads.q)
        self._input = _input_linear(
            context, weights, sizes, [first, LinearPart("kv_a_proj_with_mqa", cached_size, _WHOLE)]
        )
        self._split = (first.shard.local_size(first.num_outputs), cached_size)
        self._transform = LatentTransform(
            weights.take("kv_a_layernorm.weight", (sizes.kv_lora_rank,)),
            sizes.norm_eps,
            cos_sin_CR,
            sizes.rope_interleaved,
        )
        self._projections = LatentExpansion(context, weights, sizes)
        self._output = row_linear(
            context,
            weights,
            "o_proj",
            sizes.hidden_size,
            sizes.num_heads * sizes.v_head_dim,
            bias=sizes.attention_bias,
        )
        self.exchange = row_exchange(context, "tp")
        self._num_heads = heads.num_heads
        self._qk_head_dim = sizes.qk_head_dim
        self._layer = layer

    def __call__(self, x_TE: Tensor, positions_T: Tensor, step: ModelStep) -> Tensor:
        return self.exchange.scatter(self.partial(x_TE, positions_T, step), step.rows)

    def partial(self, x_TE: Tensor, positions_T: Tensor, step: ModelStep) -> Tensor:
        """What `exchange` is yet to sum up."""
        if not step.rows.num_real:  # the same on all ranks of tp: this DP rank is idle
            return x_TE
        x_TE = self.exchange.gather(x_TE, step.rows)
        q_TX, cached_TZ = self._input(x_TE).split_with_sizes(self._split, dim=1)
        q_THD = self._queries(q_TX).view(x_TE.shape[0], self._num_heads, self._qk_head_dim)
        out_THV = step.latent_attention.attend_latent(
            self._layer, q_THD, cached_TZ, self._transform, positions_T, self._projections
        )
        return self._output(out_THV.flatten(1))


class LatentExpansion:
    """What keys and values are to a latent: core.interfaces.latent_attention.LatentProjections.

    One matrix of every head, (N + V, C), serves all three forms without a copy. It is kept in the
    model's dtype whatever the checkpoint holds: it multiplies queries and outputs from either side,
    which blocks of scales along one side would not allow.
    """

    __slots__ = ("_expand", "_key_HNC", "_split", "_value_HCV")

    def __init__(
        self, context: BuildContext, weights: WeightReader, sizes: LatentAttentionSizes
    ) -> None:
        shard = Sharding.over(context.comms.axes["tp"]).equal(0)
        self._split = (sizes.qk_nope_head_dim, sizes.v_head_dim)
        head_rows, rank = sum(self._split), sizes.kv_lora_rank
        weight_OC = weights.take("kv_b_proj.weight", (sizes.num_heads * head_rows, rank), shard)
        key_HNC, value_HVC = weight_OC.view(-1, head_rows, rank).split_with_sizes(
            self._split, dim=1
        )
        self._key_HNC = key_HNC
        self._value_HCV = value_HVC.transpose(1, 2)
        self._expand = context.ops.linear(weight_OC, None)

    def absorb(self, q_nope_THN: Tensor, out_THC: Tensor) -> None:
        """Queries against keys -> queries against latents, where attention wants them."""
        torch.bmm(q_nope_THN.transpose(0, 1), self._key_HNC, out=out_THC.transpose(0, 1))

    def restore(self, out_THC: Tensor, out_THV: Tensor) -> None:
        """Weighted sums of latents -> weighted sums of values."""
        torch.bmm(out_THC.transpose(0, 1), self._value_HCV, out=out_THV.transpose(0, 1))

    def expand(self, cached_XZ: Tensor) -> tuple[Tensor, Tensor]:
        """Non-rotary keys (X, H, N) and values (X, H, V)."""
        num_heads, _, rank = self._key_HNC.shape
        kv_XHY = self._expand(cached_XZ[:, :rank]).view(-1, num_heads, sum(self._split))
        k_XHN, v_XHV = kv_XHY.split_with_sizes(self._split, dim=2)
        return k_XHN, v_XHV


class _LowRankQueries:
    """(T, rank of the queries) -> (T, H * D): normalised, then projected to this rank's heads."""

    def __init__(
        self,
        context: BuildContext,
        weights: WeightReader,
        sizes: LatentAttentionSizes,
        shard: Shard,
    ) -> None:
        assert sizes.q_lora_rank is not None
        rank = sizes.q_lora_rank
        self._norm = RMSNorm(context, weights, "q_a_layernorm", rank, sizes.norm_eps)
        part = LinearPart("q_b_proj", sizes.num_heads * sizes.qk_head_dim, shard)
        self._project = column_linear(context, weights, [part], rank, bias=False)

    def __call__(self, q_TX: Tensor) -> Tensor:
        return self._project(self._norm(q_TX))


def _as_they_are(q_TX: Tensor) -> Tensor:
    """Queries that the first projection has finished."""
    return q_TX


def _input_linear(
    context: BuildContext,
    weights: WeightReader,
    sizes: LatentAttentionSizes,
    parts: Sequence[LinearPart],
) -> LinearKernel:
    """Queries (or their low rank) and what is cached, of the same input, in one matmul."""
    if sizes.q_lora_rank is not None or not sizes.attention_bias:
        return column_linear(context, weights, parts, sizes.hidden_size, bias=sizes.attention_bias)
    # q_proj never has a bias: its part of the merged one is zeros.
    q_part, cached_part = parts
    weight_format = context.format
    weight_OE = weight_format.join(
        [
            weight_format.take(
                weights, f"{part.name}.weight", (part.num_outputs, sizes.hidden_size), part.shard
            )
            for part in parts
        ]
    )
    cached_bias = weights.take(f"{cached_part.name}.bias", (cached_part.num_outputs,))
    q_bias = cached_bias.new_zeros(q_part.shard.local_size(q_part.num_outputs))
    return context.ops.linear(weight_OE, torch.cat((q_bias, cached_bias)))
