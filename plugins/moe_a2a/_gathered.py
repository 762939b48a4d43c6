"""Every rank gets all rows, computes those of its experts, and the sums are scattered back.

Moves (ep - 1) times the rows each way: good for the ranks of one host. The numbers of rows are
agreed on before a step, so that nothing waits for the device in a layer. Its layouts of grouped
rows are the oracle for the others.
Shape legend: T own rows, A rows of all ranks in axis order, K experts of a row, E hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.interfaces.moe_a2a import A2ASpec, Dispatched, ExpertLayout, Routes
from core.ops.moe_permute import pad_groups
from core.ops.ragged import gather_rows, scatter_rows
from plugins.moe_a2a._packing import RowFormat


@dataclass(frozen=True, slots=True)
class _Handle:
    """What `combine` needs of a dispatch."""

    counts: tuple[int, ...]
    positions_AK: Tensor | None = None  # None: the experts have summed the results of each row
    weights_AK: Tensor | None = None


class GatherDispatcher:
    """One gather of packed rows, one scatter of sums."""

    def __init__(self, spec: A2ASpec, layout: ExpertLayout = ExpertLayout.ROUTED) -> None:
        self.layout = layout
        self.capturable = spec.comm.capturable
        self._spec = spec
        self._no_counts = torch.empty(0, dtype=torch.int64, device=spec.device)
        self._format = RowFormat(spec.hidden_size, spec.top_k, spec.dtype, torch.int32)

    def dispatch(
        self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor, counts: Sequence[int]
    ) -> Dispatched:
        """This rank's experts' rows of all ranks."""
        spec = self._spec
        packed_TB = self._format.pack(x_TE, None, weights_TK)
        self._format.ids(packed_TB).copy_(experts_TK)
        packed_AB = gather_rows(spec.comm, packed_TB, counts)
        num_local = spec.num_local_experts
        local_AK = self._format.ids(packed_AB).long() - spec.comm.rank * num_local
        local_AK = torch.where((local_AK >= 0) & (local_AK < num_local), local_AK, -1)
        values_AE = self._format.values(packed_AB)
        # A copy: a view would keep all packed rows while the experts compute.
        weights_AK = self._format.weights(packed_AB).contiguous()
        if self.layout is ExpertLayout.ROUTED:
            routes = Routes(local_AK, weights_AK)
            return Dispatched(values_AE, self._no_counts, _Handle(tuple(counts)), routes=routes)
        grouping = spec.ops.group_rows(local_AK, num_local)
        if self.layout is ExpertLayout.BATCHED:  # a row is at most once among an expert's
            grouping = pad_groups(grouping, local_AK, capacity=sum(counts))
        handle = _Handle(tuple(counts), grouping.positions_TK, weights_AK)
        return Dispatched(values_AE[grouping.source], grouping.counts_L, handle)

    def combine(self, output: Tensor, dispatched: Dispatched) -> Tensor:
        """The sums of this rank's rows: in the model's dtype where experts sum, else added up in
        float32 and rounded once."""
        handle = dispatched.handle
        assert isinstance(handle, _Handle)
        if handle.positions_AK is not None:
            flat = output.flatten(0, -2) if output.dim() == 3 else output
            output = self._spec.ops.sum_results(flat, handle.positions_AK, handle.weights_AK)
        return scatter_rows(self._spec.comm, output, handle.counts).to(self._spec.dtype)
