"""Rows to the ranks of their experts in collectives whose sizes are known before a step.

Every rank gets all rows, packed with weights and ids, and answers each row's rank with its experts'
sum. Nobody waits for counts, so that steps may be recorded in CUDA graphs. More bytes travel than
with counts where a row has experts on few ranks (`bytes_ratio`).
Shape legend: T own rows, A rows of all ranks in axis order, R ranks, K experts of a row, E hidden
size, B bytes of a packed row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.interfaces.moe_a2a import A2ASpec, Dispatched, ExpertLayout, Routes
from core.ops.block_fp8 import FP8
from core.ops.ragged import gather_rows
from plugins.moe_a2a._packing import RowFormat, ids_dtype


def bytes_ratio(ranks: int, top_k: int) -> float:
    """How many times the bytes of an exchange with counts travel: a row goes to every other rank
    instead of those that have one of its experts, drawn at random."""
    return 1.0 / (1.0 - (1.0 - 1.0 / ranks) ** top_k)


@dataclass(frozen=True, slots=True)
class _Handle:
    """What `combine` needs of a dispatch."""

    counts: tuple[int, ...]


class FixedDispatcher:
    """A gather of packed rows, an all-to-all of sums."""

    layout = ExpertLayout.ROUTED

    def __init__(self, spec: A2ASpec, *, fp8: bool) -> None:
        self.capturable = spec.comm.capturable
        self._spec, self._fp8 = spec, fp8
        self._no_counts = torch.empty(0, dtype=torch.int64, device=spec.device)
        self._format = RowFormat(
            spec.hidden_size,
            spec.top_k,
            FP8 if fp8 else spec.dtype,
            ids_dtype(spec.num_experts),
        )

    def dispatch(
        self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor, counts: Sequence[int]
    ) -> Dispatched:
        """The rows of all ranks, and which of this rank's experts each has."""
        spec, form = self._spec, self._format
        values, scales = self._spec.ops.quantize_rows(x_TE) if self._fp8 else (x_TE, None)
        packed_TB = form.pack(values, scales, weights_TK)
        form.ids(packed_TB).copy_(experts_TK)
        packed_AB = gather_rows(spec.comm, packed_TB, counts)
        num_local = spec.num_local_experts
        local_AK = form.ids(packed_AB).long() - spec.comm.rank * num_local
        local_AK = torch.where((local_AK >= 0) & (local_AK < num_local), local_AK, -1)
        # Copies: kernels read whole rows, and views would keep all packed ones.
        return Dispatched(
            form.values(packed_AB).contiguous(),
            self._no_counts,
            _Handle(tuple(counts)),
            form.scales(packed_AB).contiguous() if self._fp8 else None,
            Routes(local_AK, form.weights(packed_AB).contiguous()),
        )

    def combine(self, output: Tensor, dispatched: Dispatched) -> Tensor:
        """The sums of this rank's rows, added up in float32 in the ranks' order and rounded once.
        What travels is in the spec's dtype."""
        handle, comm = dispatched.handle, self._spec.comm
        assert isinstance(handle, _Handle)
        mine = handle.counts[comm.rank]
        if sum(handle.counts) == 0:
            return output
        received = comm.all_to_all(output, handle.counts, [mine] * comm.size)
        parts_RTE = received.view(comm.size, mine, output.shape[1])
        return parts_RTE.sum(0, dtype=torch.float32).to(self._spec.dtype)
