"""What is done to rows on their way to experts, in plain torch: the oracle, and what a CPU runs."""

import torch
from torch import Tensor

from core.interfaces.moe_a2a import Grouping
from core.ops import block_fp8, moe_permute


class TorchRowOps:
    """See core.interfaces.moe_a2a.RowOps."""

    def group_rows(
        self, experts_TK: Tensor, num_experts: int, num_pairs: int | None = None
    ) -> Grouping:
        return moe_permute.group_rows(experts_TK, num_experts, num_pairs)

    def sum_results(
        self,
        results_ME: Tensor,
        positions_TK: Tensor,
        weights_TK: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        return moe_permute.sum_results(results_ME, positions_TK, weights_TK, dtype)

    def quantize_rows(self, x_TE: Tensor, source_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return block_fp8.quantize_rows(x_TE if source_T is None else x_TE[source_T])
