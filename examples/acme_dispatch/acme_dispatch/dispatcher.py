"""The dispatcher behind moe_a2a=acme: plain collectives of equal parts, no counts on the way.

Shape legend: T own rows, A rows of all ranks, P rows of the rank that has most, K experts of a row,
E hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.interfaces.moe_a2a import A2ASpec, Dispatched, ExpertLayout, Routes
from core.plugin.hookspecs import NoOptions


@dataclass(frozen=True, slots=True)
class _Handle:
    counts: tuple[int, ...]


class AcmeDispatcher:
    """Implements core.interfaces.moe_a2a.Dispatcher."""

    layout = ExpertLayout.ROUTED

    def __init__(self, options: NoOptions, spec: A2ASpec) -> None:
        self.capturable = spec.comm.capturable
        self._spec = spec
        self._no_counts = torch.empty(0, dtype=torch.int64, device=spec.device)

    def dispatch(
        self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor, counts: Sequence[int]
    ) -> Dispatched:
        """All rows, with those of their experts that this rank has."""
        first = self._spec.comm.rank * self._spec.num_local_experts
        local_AK = self._gather(experts_TK, counts) - first
        is_local = (local_AK >= 0) & (local_AK < self._spec.num_local_experts)
        routes = Routes(torch.where(is_local, local_AK, -1), self._gather(weights_TK, counts))
        x_AE = self._gather(x_TE, counts)
        return Dispatched(x_AE, self._no_counts, _Handle(tuple(counts)), routes=routes)

    def combine(self, output: Tensor, dispatched: Dispatched) -> Tensor:
        """The own rows of the sums over all ranks, added up in float32 and rounded once."""
        handle = dispatched.handle
        assert isinstance(handle, _Handle)
        total_AE = self._spec.comm.all_reduce(output.float())
        rank = self._spec.comm.rank
        begin = sum(handle.counts[:rank])
        return total_AE[begin : begin + handle.counts[rank]].to(self._spec.dtype)

    def _gather(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """Every rank's rows, in axis order. Collectives need equal parts: they are padded."""
        most = max(counts)
        padded = own.new_zeros((most, *own.shape[1:]))
        padded[: len(own)] = own
        all_parts = self._spec.comm.all_gather(padded, 0)
        begins = [rank * most for rank in range(len(counts))]
        return torch.cat(
            [all_parts[b : b + count] for b, count in zip(begins, counts, strict=True)]
        )
