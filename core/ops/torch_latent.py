"""The operations of latent attention in plain torch: the oracle, and what a CPU runs.

Computes in float32, or wider where its arguments are. Knows nothing of attention itself. Shape
legend: see core.interfaces.ops; F is R/2, B pages of P tokens, Z values of a cached vector.
"""

import torch
from torch import Tensor

from core.interfaces.latent_attention import LatentTransform
from core.interfaces.ops import Ops


def _rotate_pairs(x_THR: Tensor, cos_T1F: Tensor, sin_T1F: Tensor) -> Tensor:
    even_THF, odd_THF = x_THR[..., 0::2], x_THR[..., 1::2]
    rotated_THR = torch.cat(
        (even_THF * cos_T1F - odd_THF * sin_T1F, odd_THF * cos_T1F + even_THF * sin_T1F), dim=-1
    )
    return rotated_THR.to(x_THR.dtype)


def transform_latent(
    ops: Ops, q_THR: Tensor, cached_TZ: Tensor, transform: LatentTransform, positions_T: Tensor
) -> tuple[Tensor, Tensor]:
    """(rotated q_THR, what is cached of each row (T, Z)); may overwrite both."""
    rope_dim = q_THR.shape[2]
    latent_TC, k_TR = cached_TZ.split_with_sizes((cached_TZ.shape[1] - rope_dim, rope_dim), dim=1)
    rotate = ops.rope_interleaved if transform.interleaved else ops.rope
    turned_THR, turned_T1R = rotate(q_THR, k_TR.unsqueeze(1), transform.cos_sin_CR, positions_T)
    normed_TC = ops.rms_norm(latent_TC, transform.norm_C, transform.eps)
    return turned_THR, torch.cat((normed_TC, turned_T1R.squeeze(1)), dim=1)


class TorchLatentOps:
    """The part of core.interfaces.ops.Ops that latent attention needs, in plain torch."""

    def rope_interleaved(
        self, q_THR: Tensor, k_TGR: Tensor, cos_sin_CR: Tensor, positions_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate pairs (2i, 2i + 1) by the angle of their row's position, into i and i + R/2."""
        cos_T1F, sin_T1F = cos_sin_CR[positions_T].unsqueeze(1).chunk(2, dim=-1)
        return _rotate_pairs(q_THR, cos_T1F, sin_T1F), _rotate_pairs(k_TGR, cos_T1F, sin_T1F)

    def prepare_latent(
        self: Ops,
        q_THR: Tensor,
        cached_TZ: Tensor,
        transform: LatentTransform,
        positions_T: Tensor,
        cache_BPZ: Tensor,
        slots_T: Tensor,
    ) -> Tensor:
        """One operation after the other; where a slot occurs twice, either row may stay."""
        turned_THR, prepared_TZ = transform_latent(self, q_THR, cached_TZ, transform, positions_T)
        real_R = (slots_T >= 0).nonzero()[:, 0]
        cache_BPZ.flatten(0, 1)[slots_T[real_R]] = prepared_TZ[real_R].to(cache_BPZ.dtype)
        return turned_THR


def whole_keys(k_XHN: Tensor, k_XR: Tensor) -> Tensor:
    """Keys (X, H, N + R) of every head; their rotary part is the same."""
    k_XHR = k_XR.unsqueeze(1).expand(-1, k_XHN.shape[1], -1)
    return torch.cat((k_XHN, k_XHR), dim=2)
