"""A dense decoder-only transformer built from the layers here: what model plugins return.

The residual stream is replicated over tp; each norm is fused with the addition before it, so a
layer ends with the norm that the next one starts with. Knows nothing of requests or of caches.
Shape legend: T rows of a step, R rows whose logits are wanted, E hidden size, V vocabulary.
"""

from torch import Tensor

from core.interfaces.attention import AttentionStep
from core.interfaces.model import BuildContext, KVShape
from core.layers.decoder_spec import DecoderSpec
from core.layers.embedding import LMHead, VocabEmbedding
from core.layers.gqa import GroupedQueryAttention
from core.layers.mlp import GatedMLP
from core.layers.norm import RMSNorm
from core.layers.rope import rope_table
from core.parallel.sharding import Sharding


class DecoderLayer:
    """Attention and MLP of one layer, with the norms before each."""

    __slots__ = ("attention", "input_norm", "mlp", "mlp_norm")

    def __init__(
        self, context: BuildContext, spec: DecoderSpec, index: int, cos_sin_CD: Tensor
    ) -> None:
        weights = context.weights.scope(f"model.layers.{index}")
        size, eps = spec.hidden_size, spec.norm_eps
        self.input_norm = RMSNorm(context, weights, "input_layernorm", size, eps)
        self.attention = GroupedQueryAttention(
            context, weights.scope("self_attn"), spec, index, cos_sin_CD
        )
        self.mlp_norm = RMSNorm(context, weights, "post_attention_layernorm", size, eps)
        self.mlp = GatedMLP(
            context, weights.scope("mlp"), size, spec.intermediate_size, bias=spec.mlp_bias
        )


class Decoder:
    """One rank's part of a dense decoder (core.interfaces.model.Model)."""

    def __init__(self, spec: DecoderSpec, context: BuildContext) -> None:
        vocab_size, hidden_size = spec.vocab_size, spec.hidden_size
        heads = Sharding.over(context.comms.axes["tp"]).heads(spec.num_heads, spec.num_kv_heads)
        self.num_heads = heads.num_heads
        self.kv = KVShape(
            num_layers=spec.num_layers,
            num_kv_heads=heads.num_kv_heads,
            head_dim=spec.head_dim,
            scale=spec.head_dim**-0.5,
        )
        self._embedding = VocabEmbedding(context, "model.embed_tokens", vocab_size, hidden_size)
        if spec.tie_word_embeddings:
            self._head = LMHead(context, self._embedding.weight_LE, vocab_size)
        else:
            self._head = LMHead.from_checkpoint(context, "lm_head", vocab_size, hidden_size)
        cos_sin_CD = rope_table(
            spec.rope, spec.head_dim, spec.max_position_embeddings, context.device
        )
        self._layers = [
            DecoderLayer(context, spec, index, cos_sin_CD) for index in range(spec.num_layers)
        ]
        self._norm = RMSNorm(context, context.weights, "model.norm", hidden_size, spec.norm_eps)
        # The norm that ends each layer: the next one's first, and the final one.
        self._closing_norms = [layer.input_norm for layer in self._layers[1:]] + [self._norm]

    def forward(self, input_ids_T: Tensor, positions_T: Tensor, attention: AttentionStep) -> Tensor:
        """Final hidden states (T, E), normalised, replicated over tp."""
        residual_TE = self._embedding(input_ids_T)
        x_TE = self._layers[0].input_norm(residual_TE)
        for layer, closing_norm in zip(self._layers, self._closing_norms, strict=True):
            x_TE = layer.attention(x_TE, positions_T, attention)
            x_TE, residual_TE = layer.mlp_norm.add(x_TE, residual_TE)
            x_TE, residual_TE = closing_norm.add(layer.mlp(x_TE), residual_TE)
        return x_TE

    def logits(self, hidden_RE: Tensor) -> Tensor:
        """Logits (R, V) in float32 over the whole vocabulary, replicated over tp."""
        return self._head(hidden_RE)
