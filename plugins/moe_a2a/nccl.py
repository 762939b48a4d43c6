"""Rows to the ranks of their experts by the collectives of comm.ep: NCCL on GPUs, gloo on CPUs.

`counted`: a row goes once to each rank that holds any of its experts, together with weights and
ids, and comes back from each as one weighted sum. Three collectives a layer: counts, rows, sums.
The host waits for the counts, so this is not for graphs. `fixed` (plugins.moe_a2a._fixed) sends
rows to all ranks, so that sizes are known before a step.
Shape legend: T own rows, K experts of a row, R ranks of the axis, S sent rows (one for each pair
of row and destination rank), N received rows, E hidden size, B bytes of a packed row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.interfaces.moe_a2a import A2ASpec, Dispatched, Dispatcher, ExpertLayout
from core.ops.block_fp8 import FP8
from core.ops.moe_permute import count_values
from plugins.moe_a2a._fixed import FixedDispatcher, bytes_ratio
from plugins.moe_a2a._options import NcclOptions
from plugins.moe_a2a._packing import RowFormat, ids_dtype, take_rows

_MOST_BYTES_RATIO = 2.0  # that prompts send of what they must, so that the host needn't wait


def create(options: NcclOptions, spec: A2ASpec) -> Dispatcher:
    """The dispatcher of a phase. All ranks of the axis make theirs at once."""
    if spec.device.type == "cuda":
        _connect(spec)
    if sizes_are_fixed(options, spec):
        return FixedDispatcher(spec, fp8=options.fp8 and spec.fp8)
    return NcclDispatcher(options, spec)


def _connect(spec: A2ASpec) -> None:
    """Ranks that send to each other connect now, not beside kernels that wait for one another (see
    plugins.comm._nccl_group)."""
    ones = [1] * spec.comm.size
    spec.comm.all_to_all(torch.zeros(spec.comm.size, device=spec.device), ones, ones)
    torch.cuda.synchronize()


def sizes_are_fixed(options: NcclOptions, spec: A2ASpec) -> bool:
    """Whether rows go to all ranks. A GPU's host has to run ahead, which counts forbid in every
    layer: few rows always cost less than that, those of prompts up to so many times the bytes."""
    if options.exchange != "auto":
        return options.exchange == "fixed"
    if spec.device.type != "cuda":
        return False
    ratio = bytes_ratio(spec.comm.size, spec.top_k)
    return spec.phase == "decode" or ratio <= _MOST_BYTES_RATIO


@dataclass(frozen=True, slots=True)
class _Handle:
    """What `combine` needs of a dispatch."""

    positions_NK: Tensor  # of the experts' results, for every received row
    weights_NK: Tensor
    received: list[int]  # rows of each rank
    sent: list[int]  # rows for each rank
    returns_TJ: Tensor  # of the sums that come back, for every own row; J = min(K, R)
    idle: bool


class NcclDispatcher:
    """All-to-all with counts over the ep axis' communicator, whatever that is."""

    layout = ExpertLayout.CONTIGUOUS
    capturable = False

    def __init__(self, options: NcclOptions, spec: A2ASpec) -> None:
        self._spec = spec
        self._fp8 = options.fp8 and spec.fp8
        self._format = RowFormat(
            spec.hidden_size,
            spec.top_k,
            FP8 if self._fp8 else spec.dtype,
            ids_dtype(spec.num_local_experts),
        )
        self._ranks_R = torch.arange(spec.comm.size, device=spec.device)

    def dispatch(
        self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor, counts: Sequence[int]
    ) -> Dispatched:
        """The rows that this rank's experts have to compute; blocks until their number is known."""
        spec, ranks, num_local = self._spec, self._spec.comm.size, self._spec.num_local_experts
        idle = sum(counts) == 0  # known to all, who then skip every collective
        destination_TK = experts_TK.div(num_local, rounding_mode="floor")  # -1 stays -1: no rank
        goes_TR = (destination_TK[:, :, None] == self._ranks_R).any(1)
        pairs_R = count_values(destination_TK + 1, ranks + 1)[1:]
        sent, received, num_pairs = (
            ([0] * ranks, [0] * ranks, 0) if idle else self._agree(goes_TR.sum(0), pairs_R)
        )

        sending = spec.ops.group_rows(
            torch.where(goes_TR, self._ranks_R, -1), ranks, num_pairs=sum(sent)
        )
        source_S = sending.source
        to_S = torch.repeat_interleave(
            self._ranks_R, sending.counts_L, output_size=source_S.shape[0]
        )
        packed_SB = take_rows(self._pack(x_TE, weights_TK), source_S)
        ids_SK = experts_TK[source_S] - (to_S * num_local)[:, None]
        here_SK = destination_TK[source_S] == to_S[:, None]
        self._format.ids(packed_SB).copy_(torch.where(here_SK, ids_SK, -1))
        packed_NB = packed_SB if idle else spec.comm.all_to_all(packed_SB, sent, received)

        local_NK = self._format.ids(packed_NB).long()
        grouping = spec.ops.group_rows(local_NK, num_local, num_pairs)
        returns_TJ = sending.positions_TK
        if spec.top_k < ranks:  # a row comes back from so many ranks at most
            returns_TJ = returns_TJ.topk(spec.top_k, 1).values
        return Dispatched(
            self._format.values(packed_NB)[grouping.source],
            grouping.counts_L,
            _Handle(
                positions_NK=grouping.positions_TK,
                # A copy: a view would keep all packed rows while the experts compute.
                weights_NK=self._format.weights(packed_NB).contiguous(),
                received=received,
                sent=sent,
                returns_TJ=returns_TJ,
                idle=idle,
            ),
            self._format.scales(packed_NB)[grouping.source] if self._fp8 else None,
        )

    def combine(self, output: Tensor, dispatched: Dispatched) -> Tensor:
        """The sums of this rank's rows over all ranks. What travels is in the spec's dtype."""
        handle = dispatched.handle
        assert isinstance(handle, _Handle)
        sums_NE = self._spec.ops.sum_results(
            output, handle.positions_NK, handle.weights_NK, self._spec.dtype
        )
        if handle.idle:
            return sums_NE
        returned_SE = self._spec.comm.all_to_all(sums_NE, handle.received, handle.sent)
        return self._spec.ops.sum_results(returned_SE, handle.returns_TJ, None, self._spec.dtype)

    def _pack(self, x_TE: Tensor, weights_TK: Tensor) -> Tensor:
        if self._fp8:
            return self._format.pack(*self._spec.ops.quantize_rows(x_TE), weights_TK)
        return self._format.pack(x_TE, None, weights_TK)

    def _agree(self, rows_R: Tensor, pairs_R: Tensor) -> tuple[list[int], list[int], int]:
        """Rows for each rank, rows of each rank, and how many pairs of row and expert come."""
        ranks = self._spec.comm.size
        ours_R2 = torch.stack([rows_R, pairs_R], 1)
        ones = [1] * ranks
        theirs_R2 = self._spec.comm.all_to_all(ours_R2, ones, ones)
        host: list[list[list[int]]] = torch.stack([ours_R2, theirs_R2]).tolist()
        sent = [rows for rows, _ in host[0]]
        received = [rows for rows, _ in host[1]]
        return sent, received, sum(pairs for _, pairs in host[1])
