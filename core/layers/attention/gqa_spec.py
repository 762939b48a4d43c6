"""Sizes of grouped-query attention. Knows nothing of torch, nor of any family's config.json."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedQuerySizes:
    """A layer of grouped-query attention; logical sizes, the same for every layer."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float  # of the norms of heads
    qkv_bias: bool = False
    output_bias: bool = False  # of the output projection
    qk_norm: bool = False  # RMSNorm of each query and key head before RoPE
