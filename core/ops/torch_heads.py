"""Norms and rotation of projected heads, composed from any set of operations.

Knows nothing of how these are computed, nor of caches. Shape legend: see core.interfaces.ops; F
heads of a row: H of queries, G of keys and G of values.
"""

from torch import Tensor

from core.interfaces.attention import HeadTransform
from core.interfaces.ops import Ops


def transform_heads(
    ops: Ops, qkv_TFD: Tensor, heads: HeadTransform, positions_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(q_THD, k_TGD, v_TGD); may overwrite `qkv_TFD`."""
    num_kv_heads = heads.num_kv_heads
    num_heads = qkv_TFD.shape[1] - 2 * num_kv_heads
    q_THD, k_TGD, v_TGD = qkv_TFD.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), 1)
    if heads.q_norm_D is not None and heads.k_norm_D is not None:
        q_THD = ops.rms_norm(q_THD, heads.q_norm_D, heads.eps)
        k_TGD = ops.rms_norm(k_TGD, heads.k_norm_D, heads.eps)
    q_THD, k_TGD = ops.rope(q_THD, k_TGD, heads.cos_sin_CR, positions_T)
    return q_THD, k_TGD, v_TGD
