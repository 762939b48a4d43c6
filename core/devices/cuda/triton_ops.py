"""The operations of a layer as Triton kernels, one launch each.

For GPUs; on CPU tensors they run in Triton's interpreter (TRITON_INTERPRET=1), for tests. The
oracle is core.ops.torch_ops. Shape legend: see core.interfaces.ops.
"""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from core.devices.cuda.experts.triton_moe import TritonMoeOps
from core.devices.cuda.linear import triton_fp8, triton_linear
from core.devices.cuda.triton_heads import TritonHeadOps
from core.devices.cuda.triton_kernels import (
    rms_norm_kernel,
    rope_kernel,
    silu_and_mul_kernel,
    write_kv_kernel,
)
from core.devices.cuda.triton_latent import TritonLatentOps
from core.gpu_tools.dependent_launch import options
from core.interfaces.ops import LinearKernel
from core.interfaces.weights import BlockFp8, LinearWeight, plain

_NORM_BLOCK = 1024  # elements one program normalises at least, in whole rows
_SILU_BLOCK = 1024


def _rows(x: Tensor) -> Tensor:
    """`x` as (rows, last dimension) with contiguous rows; copied only where it must be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _flat_heads(x_TGD: Tensor) -> Tensor:
    """(T, G * D) with contiguous rows."""
    return _rows(x_TGD.flatten(1))


def _num_warps(block: int) -> int:
    return min(16, max(1, block // 512))


def _vendor_logits(weight_VE: Tensor) -> LinearKernel:
    if weight_VE.device.type == "cpu" or weight_VE.dtype is torch.float32:
        return lambda x_RE: F.linear(x_RE.float(), weight_VE.float())
    weight_EV = weight_VE.t()
    return lambda x_RE: torch.mm(x_RE, weight_EV, out_dtype=torch.float32)


class TritonOps(TritonHeadOps, TritonLatentOps, TritonMoeOps):
    """Operations on a GPU; float32 matrix products are exact, the rest is torch's own GEMM."""

    def linear(self, weight_OI: LinearWeight, bias_O: Tensor | None) -> LinearKernel:
        """Few rows of 16-bit weights, and fp8 blocks, are multiplied by kernels of ours, the rest
        by the vendor's GEMM, through torch."""
        if isinstance(weight_OI, BlockFp8):
            return triton_fp8.linear(weight_OI, bias_O)
        matrix_OI = plain(weight_OI)
        vendor: LinearKernel = lambda x_TI: F.linear(x_TI, matrix_OI, bias_O)  # noqa: E731
        return triton_linear.linear("linear", matrix_OI, bias_O, vendor)

    def logits(self, weight_VE: Tensor, *, quantized: bool = False) -> LinearKernel:
        """As `linear`, storing the float32 sums."""
        vendor = _vendor_logits(weight_VE)
        return triton_linear.linear("logits", weight_VE, None, vendor, dtype=torch.float32)

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        """Normalise the last dimension, of any shape before it."""
        x = _rows(x_TE)
        return self._norm(x, None, weight_E, eps).view(x_TE.shape)

    def add_rms_norm(
        self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The sum overwrites `residual_TE`, in its dtype; its rows must be contiguous."""
        assert residual_TE.dim() == 2
        assert residual_TE.stride(1) == 1
        return self._norm(_rows(x_TE), residual_TE, weight_E, eps), residual_TE

    def _norm(
        self, x_TE: Tensor, residual_TE: Tensor | None, weight_E: Tensor, eps: float
    ) -> Tensor:
        num_rows, size = x_TE.shape
        out_TE = torch.empty((num_rows, size), dtype=x_TE.dtype, device=x_TE.device)
        if num_rows == 0:
            return out_TE
        block_E = triton.next_power_of_2(size)
        block_T = max(1, _NORM_BLOCK // block_E)
        residual = x_TE if residual_TE is None else residual_TE
        rms_norm_kernel[(triton.cdiv(num_rows, block_T),)](
            x_TE,
            residual,
            weight_E,
            out_TE,
            num_rows,
            x_TE.stride(0),
            residual.stride(0),
            SIZE=size,
            EPS=eps,
            ADD=residual_TE is not None,
            BLOCK_T=block_T,
            BLOCK_E=block_E,
            num_warps=_num_warps(block_T * block_E),
            **options(x_TE.device),
        )
        return out_TE

    def rope(
        self, q_THD: Tensor, k_TGD: Tensor, cos_sin_CR: Tensor, positions_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Overwrites q and k, whose heads must be contiguous."""
        assert q_THD.stride(2) == 1
        assert k_TGD.stride(2) == 1
        num_rows, num_heads, _ = q_THD.shape
        if num_rows == 0:
            return q_THD, k_TGD
        num_kv_heads, half = k_TGD.shape[1], cos_sin_CR.shape[1] // 2
        block_H, block_G = (triton.next_power_of_2(n) for n in (num_heads, num_kv_heads))
        block_F = triton.next_power_of_2(half)
        rope_kernel[(num_rows,)](
            q_THD,
            k_TGD,
            cos_sin_CR,
            positions_T,
            q_THD.stride(0),
            q_THD.stride(1),
            k_TGD.stride(0),
            k_TGD.stride(1),
            num_heads,
            num_kv_heads,
            half,
            BLOCK_H=block_H,
            BLOCK_G=block_G,
            BLOCK_F=block_F,
            num_warps=_num_warps(block_H * block_F),
        )
        return q_THD, k_TGD

    def gated_linear(self, weight_2IE: LinearWeight, bias_2I: Tensor | None) -> LinearKernel:
        """Few rows: one kernel; else the linear layer, then the product of its halves."""
        if isinstance(weight_2IE, BlockFp8):
            return triton_fp8.gated_linear(weight_2IE, bias_2I, self.silu_and_mul)
        matrix_2IE = plain(weight_2IE)
        return triton_linear.linear(
            "gated_linear",
            matrix_2IE,
            bias_2I,
            lambda x_TE: self.silu_and_mul(F.linear(x_TE, matrix_2IE, bias_2I)),
            gated=True,
        )

    def silu_and_mul(self, gate_up_T2I: Tensor) -> Tensor:
        """Rounded once, at the end."""
        rows = _rows(gate_up_T2I)
        num_rows, size = rows.shape[0], rows.shape[1] // 2
        out_TI = torch.empty((num_rows, size), dtype=rows.dtype, device=rows.device)
        if num_rows:
            silu_and_mul_kernel[(num_rows, triton.cdiv(size, _SILU_BLOCK))](
                rows,
                out_TI,
                rows.stride(0),
                SIZE=size,
                BLOCK_I=_SILU_BLOCK,
                num_warps=4,
                **options(rows.device),
            )
        return out_TI.view(*gate_up_T2I.shape[:-1], size)

    def write_kv(
        self, k_TGD: Tensor, v_TGD: Tensor, k_NPGD: Tensor, v_NPGD: Tensor, slots_T: Tensor
    ) -> None:
        """Store rows by token slot; the caches must be contiguous and of k's dtype."""
        assert k_NPGD.is_contiguous()
        assert v_NPGD.is_contiguous()
        if slots_T.shape[0] == 0:
            return
        k, v = _flat_heads(k_TGD), _flat_heads(v_TGD)
        block = triton.next_power_of_2(k.shape[1])
        write_kv_kernel[(k.shape[0],)](
            k,
            v,
            k_NPGD,
            v_NPGD,
            slots_T,
            k.stride(0),
            v.stride(0),
            k.shape[1],
            BLOCK=block,
            num_warps=_num_warps(block),
        )
