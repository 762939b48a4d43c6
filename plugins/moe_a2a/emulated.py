"""One rank of an expert axis without its peers, for timing.

With routing in balance a rank receives as many pairs of row and expert as it sends. So its own
pairs stand in for those that would come, spread over its own experts at random: rows are quantised
and laid out as they would arrive, computed, and summed. What it returns means nothing. The links'
time is not in it. Nothing waits for the device.
Shape legend: T own rows, K experts of a row, L local experts, C most rows of one of them, M pairs,
E hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.interfaces.moe_a2a import A2ASpec, Dispatched, ExpertLayout
from core.kernels.moe_permute import Grouping, group_rows, pad_groups, sum_results
from plugins.moe_a2a._fp8 import quantize_rows
from plugins.moe_a2a._options import EmulatedOptions


@dataclass(frozen=True, slots=True)
class _Handle:
    """What `combine` needs of a dispatch."""

    positions_TK: Tensor
    weights_TK: Tensor


class EmulatedDispatcher:
    """Every pair comes to this rank, for one of its experts drawn when this was made."""

    capturable = True

    def __init__(self, options: EmulatedOptions, spec: A2ASpec) -> None:
        self.layout = ExpertLayout(options.layout)
        self._spec = spec
        self._fp8 = options.fp8 and spec.fp8
        generator = torch.Generator().manual_seed(options.seed)
        local_TK = torch.randint(
            0, spec.num_local_experts, (spec.max_rows, spec.top_k), generator=generator
        )
        self._local_TK = local_TK.to(spec.device)

    def dispatch(
        self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor, counts: Sequence[int]
    ) -> Dispatched:
        """T * K rows, fewer where some have no expert."""
        num_rows, num_local = x_TE.shape[0], self._spec.num_local_experts
        assert num_rows <= self._spec.max_rows, f"{num_rows} rows, of {self._spec.max_rows} at most"
        local_TK = torch.where(experts_TK < 0, -1, self._local_TK[:num_rows])
        grouping = group_rows(local_TK, num_local)
        sent, scales = quantize_rows(x_TE) if self._fp8 else (x_TE, None)
        if self.layout is ExpertLayout.BATCHED:
            # Two pairs of one row may have the same expert here: places for all of them.
            grouping = pad_groups(grouping, local_TK, capacity=local_TK.numel())
        return Dispatched(
            _take(sent, grouping),
            grouping.counts_L,
            _Handle(grouping.positions_TK, weights_TK),
            None if scales is None else _take(scales, grouping),
        )

    def combine(self, output: Tensor, dispatched: Dispatched) -> Tensor:
        """The weighted sum of each row's results."""
        handle = dispatched.handle
        assert isinstance(handle, _Handle)
        flat = output.flatten(0, -2) if output.dim() == 3 else output
        return sum_results(flat, handle.positions_TK, handle.weights_TK, self._spec.dtype)


def _take(x_TE: Tensor, grouping: Grouping) -> Tensor:
    """Rows as they lie before the experts; float8 is moved in words, as torch can't index it."""
    if x_TE.element_size() == 1:
        words = x_TE.view(torch.uint8)
        wide = torch.int64 if words.shape[-1] % 8 == 0 else torch.uint8
        return words.view(wide)[grouping.source].view(x_TE.dtype)
    return x_TE[grouping.source]
