"""Sizes of multi-head latent attention, as a config.json gives them. Knows nothing of torch.

Source: DeepSeek-V2, arXiv 2405.04434; names of fields are config.json's.
"""

import math
from dataclasses import dataclass

from core.interfaces.model import LatentKVShape
from core.layers.attention.rope_spec import RopeSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttentionSizes:
    """What a layer of latent attention is built from; logical sizes, the same for every layer."""

    hidden_size: int
    num_heads: int
    q_lora_rank: int | None  # None: queries are projected at once
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    scale: float  # of q.k, see `latent_scale`
    # Of the norms inside attention. DeepSeek's code and transformers leave it at 1e-6 whatever
    # rms_norm_eps says.
    norm_eps: float = 1e-6
    rope_interleaved: bool = True  # neighbouring dimensions form a pair; V2 and V3 do so
    attention_bias: bool = False  # of q_a_proj, kv_a_proj_with_mqa and o_proj

    @property
    def qk_head_dim(self) -> int:
        """Dimensions of a head's queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def kv_shape(self, num_layers: int) -> LatentKVShape:
        """The cache of a model of `num_layers` such layers; the same on every rank."""
        return LatentKVShape(
            num_layers=num_layers,
            latent_dim=self.kv_lora_rank,
            rope_dim=self.qk_rope_head_dim,
            nope_dim=self.qk_nope_head_dim,
            value_dim=self.v_head_dim,
            scale=self.scale,
        )


def latent_scale(qk_head_dim: int, rope: RopeSpec) -> float:
    """The scale of q.k: YaRN's temperature for all dimensions of a head enters here, squared.

    Source: `yarn_apply_mscale` of transformers' modeling_deepseek_v3 (and V2's, the same).
    """
    scale = float(qk_head_dim**-0.5)
    if rope.kind == "default" or not rope.mscale_all_dim or rope.factor <= 1:
        return scale
    temperature = 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0
    return scale * temperature * temperature
