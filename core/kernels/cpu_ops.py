"""The operations of a layer on a CPU, as few torch calls as possible each.

At batch 1 a torch call costs as much as the work in it, so the number of calls is what counts;
with many rows it is the passes over memory. Needs no compiler at run time. The oracle is
core.kernels.torch_ops. Shape legend: see core.interfaces.ops; F is D/2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.interfaces.ops import LinearKernel

# Rows oneDNN lays a packed weight out for. Layouts for 16 to 2048 rows were the same in effect,
# and the one for 1 row is slower from 128 rows on (Xeon with AMX).
_PACKED_FOR_ROWS = 16


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype natively on this machine, so that packing pays.

    Not for float32: there packing is slower at 1 row and equal from 128 rows on.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False


def _packed_linear(weight_OI: Tensor, bias_O: Tensor | None) -> LinearKernel:
    """The layer over a copy of the weight in oneDNN's own layout; does not keep `weight_OI`.

    F.linear reorders the weight at every call instead: 130 us against 60 us for 3072 x 576 at
    1 to 4 rows.
    """
    weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), _PACKED_FOR_ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def linear(x_TI: Tensor) -> Tensor:
        result_TO: Tensor = multiply(x_TI, weight, bias_O, "none", [], "")
        return result_TO

    return linear


def _joined_heads(q_THD: Tensor, k_TGD: Tensor) -> Tensor | None:
    """q and k as one (T, H+G, D) view where they lie side by side in one projection's result."""
    num_heads, head_dim = q_THD.shape[1:]
    if (
        q_THD.stride() != k_TGD.stride()
        or q_THD.stride(1) != head_dim
        or q_THD.untyped_storage().data_ptr() != k_TGD.untyped_storage().data_ptr()
        or q_THD.storage_offset() + num_heads * head_dim != k_TGD.storage_offset()
        or q_THD.stride(0) < (num_heads + k_TGD.shape[1]) * head_dim
    ):
        return None
    shape = (q_THD.shape[0], num_heads + k_TGD.shape[1], head_dim)
    return q_THD.as_strided(shape, q_THD.stride())


def _rotate_in_place(x_THD: Tensor, cos_T1F: Tensor, sin_T1F: Tensor) -> None:
    wide_THD = x_THD.to(cos_T1F.dtype, copy=True)
    first_THF, second_THF = wide_THD.chunk(2, dim=-1)
    new_first_THF = (first_THF * cos_T1F).addcmul_(second_THF, sin_T1F, value=-1)
    new_second_THF = (second_THF * cos_T1F).addcmul_(first_THF, sin_T1F)
    first_out_THF, second_out_THF = x_THD.chunk(2, dim=-1)
    first_out_THF.copy_(new_first_THF)
    second_out_THF.copy_(new_second_THF)


class CpuOps:
    """Operations on a CPU. bf16 and fp16 weights are packed; float32 stays exact float32."""

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> LinearKernel:
        """A packed layer where the machine multiplies the dtype natively, F.linear elsewhere."""
        if _packs(weight_OI.dtype):
            return _packed_linear(weight_OI, bias_O)
        return lambda x_TI: F.linear(x_TI, weight_OI, bias_O)

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        """Normalise the last dimension in float32; rounded once, at the end."""
        if x_TE.dtype is torch.float32:
            return F.rms_norm(x_TE, (x_TE.shape[-1],), weight_E, eps)
        wide_TE = x_TE.float()
        scale_T1 = wide_TE.square().mean(-1, True).add_(eps).rsqrt_()
        return wide_TE.mul_(scale_T1).mul_(weight_E).to(x_TE.dtype)

    def add_rms_norm(
        self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The sum overwrites `residual_TE`."""
        residual_TE.add_(x_TE)
        return self.rms_norm(residual_TE, weight_E, eps), residual_TE

    def rope(
        self, q_THD: Tensor, k_TGD: Tensor, cos_sin_CD: Tensor, positions_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Overwrites q and k, in one pass where they lie side by side."""
        cos_T1F, sin_T1F = cos_sin_CD.index_select(0, positions_T).unsqueeze(1).chunk(2, dim=-1)
        joined_TXD = _joined_heads(q_THD, k_TGD)
        if joined_TXD is None:
            _rotate_in_place(q_THD, cos_T1F, sin_T1F)
            _rotate_in_place(k_TGD, cos_T1F, sin_T1F)
        else:
            _rotate_in_place(joined_TXD, cos_T1F, sin_T1F)
        return q_THD, k_TGD

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
