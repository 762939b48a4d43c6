"""The operations of a layer on a CPU, as few torch calls as possible each.

With few rows a torch call costs more than the work in it (3 to 6 us, since the weights that pass
through the caches between two calls evict its code), so their number is what counts; with many
rows it is the passes over memory. Needs no compiler at run time. The oracle is
core.ops.torch_ops. Shape legend: see core.interfaces.ops; F is R/2.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.devices.cpu import cpu_grouped_ints
from core.devices.cpu.cpu_linear import half_linear, holds_halves, packed_linear, packs
from core.devices.cpu.cpu_moe import CpuMoeOps
from core.interfaces.attention import HeadTransform, LayerKV
from core.interfaces.ops import LinearKernel
from core.interfaces.weights import BlockFp8, GroupedInts, LinearWeight
from core.ops import block_fp8
from core.ops.torch_heads import transform_heads
from core.ops.torch_latent import TorchLatentOps

NUM_REFINED = 32  # best logits of a row that are computed again in float32


def _refined_logits(multiply: LinearKernel, weight_VE: Tensor) -> LinearKernel:
    """A head whose best logits are computed again in float32; keeps `weight_VE`.

    `multiply` gives sums that torch has rounded to 16 bits. A head in float32 would read
    twice the bytes at every step; the few rows of the weight that matter cost 2% of a step.
    """
    num_refined = min(NUM_REFINED, weight_VE.shape[0])

    def logits(x_RE: Tensor) -> Tensor:
        logits_RV = multiply(x_RE).float()
        ids_RK = logits_RV.topk(num_refined, dim=-1, sorted=False).indices
        exact_RK1 = torch.bmm(weight_VE[ids_RK].float(), x_RE.float().unsqueeze(2))
        return logits_RV.scatter_(1, ids_RK, exact_RK1.squeeze(2))

    return logits


def _rotate_in_place(x_THD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> None:
    size = cos_T1R.shape[-1]
    x_THR = x_THD if x_THD.shape[-1] == size else x_THD.narrow(-1, 0, size)
    if x_THR.dtype is cos_T1R.dtype:
        swapped_THR = x_THR.roll(size // 2, -1).mul_(sin_T1R)
        torch.addcmul(swapped_THR, x_THR, cos_T1R, out=x_THR)
        return
    wide_THR = x_THR.to(cos_T1R.dtype)
    swapped_THR = wide_THR.roll(size // 2, -1)
    x_THR.copy_(swapped_THR.mul_(sin_T1R).addcmul_(wide_THR, cos_T1R))


@dataclass(frozen=True, slots=True)
class _Norm:
    """What one norm's weight comes to; kept because converting it costs a third of the norm.

    With n the length of a row of E elements, x / sqrt(n^2 / E + eps) * w is
    x / hypot(n, sqrt(E * eps)) * (w * sqrt(E)): one call fewer.
    """

    weight_E: Tensor  # the source; held so that its id stays its own
    scaled_weight_E: Tensor  # float32, w * sqrt(E)
    least_length: Tensor  # float32 scalar, sqrt(E * eps)


@dataclass(frozen=True, slots=True)
class _Rotation:
    """A RoPE table whose rows multiply all values that turn."""

    cos_sin_CR: Tensor  # the source; held so that its id stays its own
    table_C12R: Tensor  # (cos, cos) and (-sin, sin)


@dataclass(frozen=True, slots=True)
class _StepRotation:
    """Rows of a table for the positions of a step: one look-up for all layers."""

    cos_sin_CR: Tensor
    positions_T: Tensor  # held, as above
    cos_T1R: Tensor
    sin_T1R: Tensor


class CpuOps(TorchLatentOps, CpuMoeOps):
    """Operations on a CPU. bf16 and fp16 weights are packed; float32 stays exact float32.

    What norm weights and RoPE tables come to is computed at their first use and kept as long as
    this object, and what a step's positions come to until other positions are given: they must not
    change afterwards.
    """

    def __init__(self) -> None:
        self._norms: dict[tuple[int, float], _Norm] = {}
        self._rotations: dict[int, _Rotation] = {}
        self._step_rotation: _StepRotation | None = None

    def linear(self, weight_OI: LinearWeight, bias_O: Tensor | None) -> LinearKernel:
        """A packed layer where oneDNN takes the dtype and for 4- and 8-bit groups, F.linear
        elsewhere."""
        if isinstance(weight_OI, BlockFp8):
            return block_fp8.linear(weight_OI, bias_O)
        if isinstance(weight_OI, GroupedInts):
            return cpu_grouped_ints.packed_linear(weight_OI, bias_O)
        if packs(weight_OI.dtype):
            return packed_linear(weight_OI, bias_O)
        return lambda x_TI: F.linear(x_TI, weight_OI, bias_O)

    def logits(self, weight_VE: Tensor, *, quantized: bool = False) -> LinearKernel:
        """Weights of 16 bits or fewer as float16, over which sums stay float32. Where torch can't,
        as `linear`, the best logits refined where 16 bits decided which they are."""
        is_wide = weight_VE.dtype.itemsize > 2
        if (quantized or not is_wide) and holds_halves(weight_VE):
            over_halves = half_linear(weight_VE, None)
            return lambda x_RE: over_halves(x_RE.float())
        multiply = self.linear(weight_VE, None)
        return multiply if is_wide else _refined_logits(multiply, weight_VE)

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        """Normalise the last dimension in float32; rounded once, at the end."""
        return self._rms_norm(x_TE.float(), weight_E, eps, x_TE.dtype)

    def add_rms_norm(
        self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The sum is float32, and overwrites a `residual_TE` that is."""
        residual_TE = residual_TE.float().add_(x_TE)
        return self._rms_norm(residual_TE, weight_E, eps, x_TE.dtype), residual_TE

    def _rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """The norm of float32 rows, as `dtype`."""
        norm = self._norms.get((id(weight_E), eps)) or self._keep_norm(weight_E, eps)
        length_T1 = torch.linalg.vector_norm(x_TE, 2, -1, True)
        scaled_TE = x_TE / torch.hypot(length_T1, norm.least_length)
        scaled_TE.mul_(norm.scaled_weight_E)
        return scaled_TE if dtype is torch.float32 else scaled_TE.to(dtype)

    def _keep_norm(self, weight_E: Tensor, eps: float) -> _Norm:
        size = weight_E.shape[0]
        norm = _Norm(weight_E, weight_E.float() * size**0.5, torch.tensor((size * eps) ** 0.5))
        self._norms[id(weight_E), eps] = norm
        return norm

    def rope(
        self, q_THD: Tensor, k_TGD: Tensor, cos_sin_CR: Tensor, positions_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Overwrites q and k."""
        rotation = self._rotation_of(cos_sin_CR, positions_T)
        _rotate_in_place(q_THD, rotation.cos_T1R, rotation.sin_T1R)
        _rotate_in_place(k_TGD, rotation.cos_T1R, rotation.sin_T1R)
        return q_THD, k_TGD

    def _rotation_of(self, cos_sin_CR: Tensor, positions_T: Tensor) -> _StepRotation:
        step = self._step_rotation
        if step is None or step.positions_T is not positions_T or step.cos_sin_CR is not cos_sin_CR:
            rotation = self._rotations.get(id(cos_sin_CR)) or self._keep_rotation(cos_sin_CR)
            cos_T1R, sin_T1R = rotation.table_C12R.index_select(0, positions_T).unbind(2)
            step = self._step_rotation = _StepRotation(cos_sin_CR, positions_T, cos_T1R, sin_T1R)
        return step

    def _keep_rotation(self, cos_sin_CR: Tensor) -> _Rotation:
        cos_CF, sin_CF = cos_sin_CR.chunk(2, dim=-1)
        cos_CR, sin_CR = torch.cat((cos_CF, cos_CF), 1), torch.cat((-sin_CF, sin_CF), 1)
        rotation = _Rotation(cos_sin_CR, torch.stack((cos_CR, sin_CR), 1).unsqueeze(1))
        self._rotations[id(cos_sin_CR)] = rotation
        return rotation

    def gated_linear(self, weight_2IE: LinearWeight, bias_2I: Tensor | None) -> LinearKernel:
        """The linear layer, then the product of its halves."""
        linear = self.linear(weight_2IE, bias_2I)
        return lambda x_TE: self.silu_and_mul(linear(x_TE))

    def silu_and_mul(self, gate_up_T2I: Tensor) -> Tensor:
        """silu is rounded before the product, as in the models' reference code."""
        gate_TI, up_TI = gate_up_T2I.chunk(2, dim=-1)
        return F.silu(gate_TI).mul_(up_TI)

    def write_kv(
        self, k_TGD: Tensor, v_TGD: Tensor, k_NPGD: Tensor, v_NPGD: Tensor, slots_T: Tensor
    ) -> None:
        """Store rows by token slot."""
        k_NPGD.flatten(0, 1).index_copy_(0, slots_T, k_TGD)
        v_NPGD.flatten(0, 1).index_copy_(0, slots_T, v_TGD)

    def prepare_heads(
        self,
        qkv_TFD: Tensor,
        heads: HeadTransform,
        positions_T: Tensor,
        cache: LayerKV,
        slots_T: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One operation after the other, queries and keys rotated in one. A CPU captures no steps:
        no slot is negative."""
        num_kv_heads, num_rows = heads.num_kv_heads, slots_T.shape[0]
        num_heads = qkv_TFD.shape[1] - 2 * num_kv_heads
        if heads.q_norm_D is None or heads.k_norm_D is None:
            rotation = self._rotation_of(heads.cos_sin_CR, positions_T)
            turning_TXD = qkv_TFD[:, : num_heads + num_kv_heads]
            _rotate_in_place(turning_TXD, rotation.cos_T1R, rotation.sin_T1R)
            sizes = (num_heads, num_kv_heads, num_kv_heads)
            q_THD, k_TGD, v_TGD = qkv_TFD.split_with_sizes(sizes, 1)
        else:
            q_THD, k_TGD, v_TGD = transform_heads(self, qkv_TFD, heads, positions_T)
        new_k_TGD, new_v_TGD = k_TGD, v_TGD
        if num_rows != qkv_TFD.shape[0]:
            new_k_TGD, new_v_TGD = k_TGD[:num_rows], v_TGD[:num_rows]
        self.write_kv(new_k_TGD, new_v_TGD, cache.k_NPGD, cache.v_NPGD, slots_T)
        return q_THD, k_TGD, v_TGD
