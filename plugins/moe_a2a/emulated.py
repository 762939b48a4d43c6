"""One rank of an expert axis without its peers, for timing.

With routing in balance a rank receives as many pairs of row and expert as it sends. So its own
pairs stand in for those that would come, spread over its own experts at random: rows are quantised
and laid out as they would arrive, computed, and summed. In the routed layout they lie once for each
rank, with the experts that this rank would have of that rank's rows. What it returns means nothing.
The links' time is not in it, nor that of finding out where rows go, which the links' kernels do.
Decode steps don't wait for the device.
Shape legend: T own rows, A rows of all ranks, K experts of a row, L local experts, C most rows of
one of them, M pairs, R ranks, E hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.interfaces.moe_a2a import A2ASpec, Dispatched, ExpertLayout, Grouping, Routes
from core.ops.moe_permute import group_rows, pad_groups
from plugins.moe_a2a._options import EmulatedOptions


@dataclass(frozen=True, slots=True)
class _Handle:
    """What `combine` needs of a dispatch."""

    positions_TK: Tensor
    weights_TK: Tensor


class EmulatedDispatcher:
    """Every pair comes to this rank, for one of its experts drawn when this was made. Rows of
    padding come as others do."""

    capturable = True

    def __init__(self, options: EmulatedOptions, spec: A2ASpec) -> None:
        self.layout = ExpertLayout(options.layout)
        self._spec = spec
        self._fp8 = options.fp8 and spec.fp8
        generator = torch.Generator().manual_seed(options.seed)
        self._local_TK = torch.randint(
            0, spec.num_local_experts, (spec.max_rows, spec.top_k), generator=generator
        )
        self._owner_TK = torch.randint(
            0, spec.comm.size, (spec.max_rows, spec.top_k), generator=generator
        )
        self._no_counts = torch.empty(0, dtype=torch.int64, device=spec.device)
        self._routes: dict[int, Tensor] = {}
        # By T. Captured steps keep their addresses, so that none is ever dropped.
        self._groupings: dict[int, Grouping] = {}

    def dispatch(
        self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor, counts: Sequence[int]
    ) -> Dispatched:
        """T * K rows, or T of each rank in the routed layout."""
        if self.layout is ExpertLayout.ROUTED:
            return self._routed(x_TE, weights_TK)
        grouping = self._grouping(x_TE.shape[0])
        source = grouping.source  # (P,), or (L, C) in the batched layout
        handle = _Handle(grouping.positions_TK, weights_TK)
        if not self._fp8:
            return Dispatched(x_TE[source], grouping.counts_L, handle, None)
        # Each place quantises its row: a peer would, once, but one launch then lays them out.
        rows_PE, scales = self._spec.ops.quantize_rows(x_TE, source.flatten())
        rows_PE = rows_PE.view(*source.shape, rows_PE.shape[1])
        scales = scales.view(*source.shape, scales.shape[1])
        return Dispatched(rows_PE, grouping.counts_L, handle, scales)

    def _routed(self, x_TE: Tensor, weights_TK: Tensor) -> Dispatched:
        """Own rows once for each rank; every pair is one rank's."""
        ranks, num_rows = self._spec.comm.size, x_TE.shape[0]
        ids_AK = self._routes.get(num_rows)
        if ids_AK is None:
            owner_TK, local_TK = self._owner_TK[:num_rows], self._local_TK[:num_rows]
            ids = [torch.where(owner_TK == rank, local_TK, -1) for rank in range(ranks)]
            ids_AK = torch.cat(ids).to(self._spec.device)
            if self._spec.phase == "decode":
                self._routes[num_rows] = ids_AK
        values, scales = self._spec.ops.quantize_rows(x_TE) if self._fp8 else (x_TE, None)
        return Dispatched(
            values.repeat(ranks, 1),
            self._no_counts,
            None,
            None if scales is None else scales.repeat(ranks, 1),
            Routes(ids_AK, weights_TK.repeat(ranks, 1)),
        )

    def _grouping(self, num_rows: int) -> Grouping:
        """Made on the CPU, and kept for decode steps, of which there are few sizes."""
        found = self._groupings.get(num_rows)
        if found is not None:
            return found
        spec = self._spec
        assert num_rows <= spec.max_rows, f"{num_rows} rows, of {spec.max_rows} at most"
        local_TK = self._local_TK[:num_rows]
        grouping = group_rows(local_TK, spec.num_local_experts)
        if self.layout is ExpertLayout.BATCHED:
            grouping = pad_groups(grouping, local_TK, capacity=int(grouping.counts_L.max()))
        found = Grouping(
            *(
                x.to(spec.device)
                for x in (grouping.source, grouping.counts_L, grouping.positions_TK)
            )
        )
        if spec.phase == "decode":
            self._groupings[num_rows] = found
        return found

    def combine(self, output: Tensor, dispatched: Dispatched) -> Tensor:
        """The weighted sum of each row's results."""
        handle = dispatched.handle
        if handle is None:
            ranks = self._spec.comm.size
            parts_RTE = output.view(ranks, output.shape[0] // ranks, output.shape[1])
            return parts_RTE.sum(0, dtype=torch.float32).to(self._spec.dtype)
        assert isinstance(handle, _Handle)
        flat = output.flatten(0, -2) if output.dim() == 3 else output
        return self._spec.ops.sum_results(
            flat, handle.positions_TK, handle.weights_TK, self._spec.dtype
        )
