"""A decoder-only transformer built from the layers here: what model plugins return.

Between the blocks of a layer rows lie as `BuildContext.stream` says; each norm is fused with the
addition before it and, where the ranks can, with the sum of what they computed of the block, so a
layer ends with the norm that the next one starts with. Knows nothing of
requests or of caches.
Shape legend: T rows of a step, R rows whose logits are wanted, E hidden size, V vocabulary, C
positions, D values of a head that turn.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from core.interfaces.model import (
    BuildContext,
    ExpertLayer,
    KVShape,
    LatentKVShape,
    ModelStep,
)
from core.interfaces.weights import WeightReader
from core.layers.attention.gqa import GroupedQueryAttention
from core.layers.attention.mla import LatentAttention
from core.layers.attention.mla_spec import LatentAttentionSizes
from core.layers.attention.rope import rope_table
from core.layers.basic.embedding import LMHead, VocabEmbedding, is_quantized
from core.layers.basic.mlp import GatedMLP
from core.layers.basic.norm import RMSNorm
from core.layers.basic.row_exchange import RowExchange, row_exchange
from core.layers.decoder.decoder_spec import DecoderSpec, DenseMLPSpec
from core.layers.experts.moe import MoELayer
from core.parallel.sharding import Sharding


class AttentionBlock(Protocol):
    """Attention of one layer; `exchange` sums up what ranks compute of it."""

    exchange: RowExchange

    def partial(self, x_TE: Tensor, positions_T: Tensor, step: ModelStep) -> Tensor: ...


class MLPBlock(Protocol):
    """A dense MLP or experts of one layer; as above."""

    exchange: RowExchange

    def partial(self, x_TE: Tensor, step: ModelStep) -> Tensor: ...


class DecoderLayer:
    """Attention and MLP (dense or of experts) of one layer, with the norms before each."""

    __slots__ = ("attention", "experts", "input_norm", "mlp", "mlp_norm")

    def __init__(
        self, context: BuildContext, spec: DecoderSpec, index: int, cos_sin_CD: Tensor
    ) -> None:
        weights = context.weights.scope(f"model.layers.{index}")
        size, eps = spec.hidden_size, spec.norm_eps
        self.input_norm = RMSNorm(context, weights, "input_layernorm", size, eps)
        self.attention = _attention(context, weights.scope("self_attn"), spec, index, cos_sin_CD)
        self.mlp_norm = RMSNorm(context, weights, "post_attention_layernorm", size, eps)
        mlp = spec.mlp_of(index)
        block = weights.scope(mlp.block)
        self.experts: list[ExpertLayer] = []
        self.mlp: MLPBlock
        if isinstance(mlp, DenseMLPSpec):
            self.mlp = GatedMLP(context, block, size, mlp.intermediate_size, bias=mlp.bias)
        else:
            moe = MoELayer(context, block, mlp, index)
            self.mlp, self.experts = moe, [moe.experts]


def _attention(
    context: BuildContext,
    weights: WeightReader,
    spec: DecoderSpec,
    index: int,
    cos_sin_CD: Tensor,
) -> AttentionBlock:
    if isinstance(spec.attention, LatentAttentionSizes):
        return LatentAttention(context, weights, spec.attention, index, cos_sin_CD)
    return GroupedQueryAttention(context, weights, spec.attention, index, cos_sin_CD)


class Decoder:
    """One rank's part of a decoder (core.interfaces.model.Model)."""

    def __init__(self, spec: DecoderSpec, context: BuildContext) -> None:
        vocab_size, hidden_size = spec.vocab_size, spec.hidden_size
        self.num_heads, self.kv = _cache_shape(spec, context)
        self._embedding = VocabEmbedding(context, "model.embed_tokens", vocab_size, hidden_size)
        if spec.tie_word_embeddings:
            self.head = LMHead(
                context,
                self._embedding.weight_LE,
                vocab_size,
                axis="tp",
                quantized=is_quantized(
                    context, "model.embed_tokens", vocab_size, hidden_size, axis="tp"
                ),
            )
        else:
            self.head = LMHead.from_checkpoint(context, "lm_head", vocab_size, hidden_size)
        cos_sin_CD = rope_table(
            spec.rope, spec.rope_dim, spec.max_position_embeddings, context.device
        )
        self._layers = [
            DecoderLayer(context, spec, index, cos_sin_CD) for index in range(spec.num_layers)
        ]
        self._norm = RMSNorm(context, context.weights, "model.norm", hidden_size, spec.norm_eps)
        self._closing_norms = self._norms_after(self._layers)
        self._exchange = row_exchange(context, "tp")
        self.expert_layers: Sequence[ExpertLayer] = [
            experts for layer in self._layers for experts in layer.experts
        ]

    def _norms_after(self, layers: Sequence[DecoderLayer]) -> list[RMSNorm]:
        """The norm that ends each layer: the next one's first, and the final one."""
        return [layer.input_norm for layer in layers[1:]] + [self._norm]

    def shortened(self) -> "Decoder":
        """The same weights with the first layer of each kind and the last one alone: that one's MLP
        may get fewer rows than the others."""
        of_kind = {type(layer.mlp): layer for layer in reversed(self._layers)}
        short = copy.copy(self)
        short._layers = [*reversed(of_kind.values()), self._layers[-1]]
        short._closing_norms = self._norms_after(short._layers)
        return short

    def forward(self, input_ids_T: Tensor, positions_T: Tensor, step: ModelStep) -> Tensor:
        """Final hidden states (T, E), normalised, replicated over tp; (R, E) of wanted rows."""
        residual_TE = self._embedding(input_ids_T, step.rows)
        x_TE = self._layers[0].input_norm(residual_TE)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            attention, mlp = layer.attention, layer.mlp
            x_TE = attention.partial(x_TE, positions_T, step)
            if index == last:
                step, x_TE, residual_TE = _narrowed(step, x_TE, residual_TE)
            x_TE, residual_TE = attention.exchange.add_norm(
                x_TE, residual_TE, step.rows, layer.mlp_norm
            )
            x_TE, residual_TE = mlp.exchange.add_norm(
                mlp.partial(x_TE, step), residual_TE, step.rows, self._closing_norms[index]
            )
        return self._exchange.gather(x_TE, step.rows)


def _narrowed(
    step: ModelStep, x_TE: Tensor, residual_TE: Tensor
) -> tuple[ModelStep, Tensor, Tensor]:
    """The step as the last layer's MLP sees it: nobody reads what it would give for other rows."""
    wanted = step.wanted
    if wanted is None:
        return step, x_TE, residual_TE
    step = dataclasses.replace(step, rows=wanted.rows, num_real=wanted.num_real, wanted=None)
    return step, x_TE[wanted.index_R], residual_TE[wanted.index_R]


def _cache_shape(spec: DecoderSpec, context: BuildContext) -> tuple[int, KVShape | LatentKVShape]:
    """Query heads of this rank, and the cache it needs."""
    sizes = spec.attention
    sharding = Sharding.over(context.comms.axes["tp"])
    if isinstance(sizes, LatentAttentionSizes):
        heads = sharding.heads(sizes.num_heads, sizes.num_heads)
        return heads.num_heads, sizes.kv_shape(spec.num_layers)
    heads = sharding.heads(sizes.num_heads, sizes.num_kv_heads)
    return heads.num_heads, KVShape(
        num_layers=spec.num_layers,
        num_kv_heads=heads.num_kv_heads,
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5,
    )
