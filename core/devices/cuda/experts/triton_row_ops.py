"""What is done to rows on their way to experts, as Triton kernels, one launch each."""

import torch
from torch import Tensor

from core.devices.cuda.experts import triton_moe_groups, triton_moe_permute
from core.devices.cuda.linear import triton_fp8
from core.interfaces.moe_a2a import Grouping
from core.ops import moe_permute


class TritonRowOps:
    """See core.interfaces.moe_a2a.RowOps."""

    def group_rows(
        self, experts_TK: Tensor, num_experts: int, num_pairs: int | None = None
    ) -> Grouping:
        if not 0 < experts_TK.numel() <= triton_moe_groups.MOST_PAIRS:
            return moe_permute.group_rows(experts_TK, num_experts, num_pairs)
        source, counts_L, positions_TK = triton_moe_groups.group_pairs(experts_TK, num_experts)
        return Grouping(source[:num_pairs], counts_L, positions_TK)

    def sum_results(
        self,
        results_ME: Tensor,
        positions_TK: Tensor,
        weights_TK: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        shape = (positions_TK.shape[0], results_ME.shape[1])
        if results_ME.shape[0] == 0 or positions_TK.numel() == 0:
            return results_ME.new_zeros(shape, dtype=dtype)
        out_TE = results_ME.new_empty(shape, dtype=dtype)
        return triton_moe_permute.sum_results(results_ME, positions_TK, weights_TK, out_TE)

    def quantize_rows(self, x_TE: Tensor, source_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return triton_fp8.quantize_rows(x_TE.contiguous(), source_T)
