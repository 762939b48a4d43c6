"""Sizes and variants of decoder-only transformers: what a model plugin reads out of a config.json
and `core.layers.decoder.decoder` is built from. Knows nothing of torch, nor of any family's
config.json.
"""

from dataclasses import dataclass

from core.interfaces.model import ModelSpec
from core.layers.attention.gqa_spec import GroupedQuerySizes
from core.layers.attention.mla_spec import LatentAttentionSizes
from core.layers.attention.rope_spec import RopeSpec
from core.layers.experts.moe_spec import MoELayerSpec

AttentionSizes = GroupedQuerySizes | LatentAttentionSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMLPSpec:
    """A gated SiLU MLP without experts."""

    hidden_size: int
    intermediate_size: int
    bias: bool = False
    block: str = "mlp"  # its name in the checkpoint, below `model.layers.<i>`


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec(ModelSpec):
    """A pre-norm decoder with rotary positions; each layer's MLP is dense or of experts."""

    rope: RopeSpec
    norm_eps: float
    tie_word_embeddings: bool
    attention: AttentionSizes
    dense_mlp: DenseMLPSpec  # of the layers without experts
    experts: MoELayerSpec | None = None  # of the layers in `moe.layers`; None where `moe` is

    def mlp_of(self, layer: int) -> DenseMLPSpec | MoELayerSpec:
        """What stands behind the attention of a layer."""
        if self.moe is None or layer not in self.moe.layers:
            return self.dense_mlp
        assert self.experts is not None
        return self.experts

    @property
    def rope_dim(self) -> int:
        """Values of a head that turn: the first ones, or those of the rotary part."""
        if isinstance(self.attention, LatentAttentionSizes):
            return self.attention.qk_rope_head_dim
        return int(self.attention.head_dim * self.rope.fraction)
