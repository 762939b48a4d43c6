"""The operations of a layer in plain torch: the oracle of every other set of operations.

Obviously right, on any device and dtype; computes in float32, or wider where its arguments are.
Knows nothing of speed. Shape legend: see core.interfaces.ops; F is R/2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.interfaces.attention import HeadTransform, LayerKV
from core.interfaces.ops import LinearKernel
from core.interfaces.weights import BlockFp8, GroupedInts, LinearWeight
from core.ops import block_fp8, grouped_ints
from core.ops.precision import accurate
from core.ops.torch_heads import transform_heads
from core.ops.torch_latent import TorchLatentOps
from core.ops.torch_moe import TorchMoeOps


def _rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    scale_T1 = torch.rsqrt(x_TE.square().mean(dim=-1, keepdim=True) + eps)
    return x_TE * scale_T1 * accurate(weight_E)


def _rotate(x_THD: Tensor, cos_T1F: Tensor, sin_T1F: Tensor) -> Tensor:
    half = cos_T1F.shape[-1]
    first_THF, second_THF, rest_THX = accurate(x_THD).tensor_split((half, 2 * half), dim=-1)
    rotated_THD = torch.cat(
        (
            first_THF * cos_T1F - second_THF * sin_T1F,
            second_THF * cos_T1F + first_THF * sin_T1F,
            rest_THX,
        ),
        dim=-1,
    )
    return rotated_THD.to(x_THD.dtype)


class TorchOps(TorchLatentOps, TorchMoeOps):
    """Operations in plain torch. Overwrites none of its arguments except the caches."""

    def linear(self, weight_OI: LinearWeight, bias_O: Tensor | None) -> LinearKernel:
        """The layer as torch computes it; keeps a plain weight as it is."""
        if isinstance(weight_OI, BlockFp8):
            return block_fp8.linear(weight_OI, bias_O)
        if isinstance(weight_OI, GroupedInts):
            return grouped_ints.linear(weight_OI, bias_O)
        return lambda x_TI: F.linear(x_TI, weight_OI, bias_O)

    def logits(self, weight_VE: Tensor, *, quantized: bool = False) -> LinearKernel:
        """Multiplied in float32 or wider."""
        return lambda x_RE: F.linear(accurate(x_RE), accurate(weight_VE)).float()

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        """Normalise the last dimension; rounded once, at the end."""
        return _rms_norm(accurate(x_TE), weight_E, eps).to(x_TE.dtype)

    def add_rms_norm(
        self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The sum is float32, or wider."""
        sum_TE = accurate(x_TE) + accurate(residual_TE)
        return _rms_norm(sum_TE, weight_E, eps).to(x_TE.dtype), sum_TE

    def rope(
        self, q_THD: Tensor, k_TGD: Tensor, cos_sin_CR: Tensor, positions_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate pairs (i, i + R/2) by the angle of their row's position."""
        cos_T1F, sin_T1F = cos_sin_CR[positions_T].unsqueeze(1).chunk(2, dim=-1)
        return _rotate(q_THD, cos_T1F, sin_T1F), _rotate(k_TGD, cos_T1F, sin_T1F)

    def gated_linear(self, weight_2IE: LinearWeight, bias_2I: Tensor | None) -> LinearKernel:
        """The linear layer, then the product of its halves."""
        linear = self.linear(weight_2IE, bias_2I)
        return lambda x_TE: self.silu_and_mul(linear(x_TE))

    def silu_and_mul(self, gate_up_T2I: Tensor) -> Tensor:
        """Rounded once, at the end."""
        gate_TI, up_TI = accurate(gate_up_T2I).chunk(2, dim=-1)
        return (F.silu(gate_TI) * up_TI).to(gate_up_T2I.dtype)

    def write_kv(
        self, k_TGD: Tensor, v_TGD: Tensor, k_NPGD: Tensor, v_NPGD: Tensor, slots_T: Tensor
    ) -> None:
        """Store rows by token slot; where a slot occurs twice, either row may stay."""
        k_NPGD.flatten(0, 1)[slots_T] = k_TGD.to(k_NPGD.dtype)
        v_NPGD.flatten(0, 1)[slots_T] = v_TGD.to(v_NPGD.dtype)

    def prepare_heads(
        self,
        qkv_TFD: Tensor,
        heads: HeadTransform,
        positions_T: Tensor,
        cache: LayerKV,
        slots_T: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One operation after the other."""
        q_THD, k_TGD, v_TGD = transform_heads(self, qkv_TFD, heads, positions_T)
        real_R = (slots_T >= 0).nonzero()[:, 0]
        self.write_kv(k_TGD[real_R], v_TGD[real_R], cache.k_NPGD, cache.v_NPGD, slots_T[real_R])
        return q_THD, k_TGD, v_TGD
