"""Rows to experts over NVLink: GPUs of one host write them into each other's memory.

A row goes once to each rank that holds any of its experts, as float8 where the experts read that,
and lands at the place that it has among all ranks' rows. So nothing is counted, and nobody waits
for the device; steps may be recorded in CUDA graphs. Each rank's experts sum their results of a
row, the sums are written into the memory of the row's rank, and are added up there in the ranks'
order: the same rows always give the same bits. Steps of more rows than buffers hold are carried as
`allgather` has them. Knows where rows and sums lie (plugins.moe_a2a._peer_layout), not how GPUs are
connected. Shape legend: T own rows, A rows of all ranks in axis order, K experts of a row, E hidden
size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.distributed import ProcessGroup

from core.errors import ConfigError
from core.gpu_tools.dependent_launch import options as launch_options
from core.gpu_tools.peer_memory import PeerMemory, connect
from core.interfaces.moe_a2a import A2ASpec, Dispatched, Dispatcher, ExpertLayout, Routes
from core.ops.block_fp8 import num_blocks
from plugins.moe_a2a._gathered import GatherDispatcher
from plugins.moe_a2a._options import SymmMemOptions
from plugins.moe_a2a._peer_kernels import send_rows_kernel, send_sums_kernel
from plugins.moe_a2a._peer_layout import PeerLayout, layout_of, rows_within

NUM_PROGRAMS = 128  # of every launch: about one for each of a large GPU's processors
_LEAST_BLOCK, _MOST_BLOCK = 128, 1024  # columns of a row that a program moves at once


def create(options: SymmMemOptions, spec: A2ASpec) -> Dispatcher:
    """The dispatcher of a phase; all ranks of the ep axis call this. Where they can't reach each
    other's memory rows travel as `allgather` has them, and the log says so. Raises ConfigError."""
    key = f"moe_a2a.{spec.phase}"
    if spec.comm.size == 1:
        return GatherDispatcher(spec)
    if spec.device.type != "cuda":
        raise ConfigError(
            f"{key}=symm_mem needs a CUDA device, but this rank computes on {spec.device}; set "
            f"engine.device=cuda, or {key}=nccl"
        )
    group = getattr(spec.comm, "group", None)
    if not isinstance(group, ProcessGroup):
        raise ConfigError(
            f"{key}=symm_mem connects the ranks of a torch.distributed group by itself, but the "
            "communicator of comm.ep has none; set comm.ep=auto"
        )
    layout = layout_within(options, spec)
    memory = connect(
        group,
        layout.num_bytes,
        NUM_PROGRAMS,
        key=f"{key}=symm_mem",
        instead="rows are gathered by comm.ep",
    )
    rest = GatherDispatcher(spec)
    return rest if memory is None else SymmMemDispatcher(spec, layout, memory, rest)


def layout_within(options: SymmMemOptions, spec: A2ASpec) -> PeerLayout:
    """The parts of a buffer as large as options allow. Raises ConfigError where not even one row
    of each rank fits."""
    fp8 = options.fp8 and spec.fp8
    max_rows = rows_within(spec, options.buffer_mib * 2**20, NUM_PROGRAMS, fp8=fp8)
    if max_rows == 0:
        raise ConfigError(
            f"moe_a2a.{spec.phase}.options.buffer_mib={options.buffer_mib} holds no row of "
            f"{spec.hidden_size} values of {spec.comm.size} ranks; raise it"
        )
    return layout_of(spec, max_rows, NUM_PROGRAMS, fp8=fp8)


@dataclass(frozen=True, slots=True)
class _Handle:
    """What `combine` needs of a dispatch."""

    counts: tuple[int, ...]
    experts_TK: Tensor


class SymmMemDispatcher:
    """Two launches a layer. What is dispatched lies in this rank's buffer until it is combined."""

    layout = ExpertLayout.ROUTED

    def __init__(
        self, spec: A2ASpec, layout: PeerLayout, memory: PeerMemory, rest: Dispatcher
    ) -> None:
        """`memory` of `layout.num_bytes`, for this dispatcher alone; `rest` carries steps with
        more rows than that holds."""
        self.capturable = rest.capturable or layout.max_rows >= spec.max_rows
        self._spec, self._layout, self._memory, self._rest = spec, layout, memory, rest
        self._scaled = layout.row_dtype != spec.dtype
        self._no_counts = torch.empty(0, dtype=torch.int64, device=spec.device)
        block = min(max(triton.next_power_of_2(spec.hidden_size), _LEAST_BLOCK), _MOST_BLOCK)
        self._constants = {
            "SIZE": spec.hidden_size,
            "TOP_K": spec.top_k,
            "RANK": memory.rank,
            "NUM_RANKS": memory.size,
            "BLOCK_K": triton.next_power_of_2(spec.top_k),
            "BLOCK_E": block,
            "num_warps": 4,
            **launch_options(spec.device),
        }
        places = memory.size * layout.max_rows
        self._rows_AE = self._view(layout.rows, layout.row_dtype, places, spec.hidden_size)
        blocks = num_blocks(spec.hidden_size) if self._scaled else 0
        self._scales = self._view(layout.scales, torch.float32, places, blocks)
        self._ids_AK = self._view(layout.ids, torch.int64, places, spec.top_k)
        self._weights_AK = self._view(layout.weights, torch.float32, places, spec.top_k)

    def dispatch(
        self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor, counts: Sequence[int]
    ) -> Dispatched:
        """All ranks' rows, of which those are there that have experts here."""
        layout, memory, total = self._layout, self._memory, sum(counts)
        if max(counts) > layout.max_rows:
            return self._rest.dispatch(x_TE, experts_TK, weights_TK, counts)
        experts_TK = experts_TK.contiguous()
        handle = _Handle(tuple(counts), experts_TK)
        if total == 0:  # known to all
            routes = Routes(experts_TK, weights_TK)
            return Dispatched(x_TE, self._no_counts, handle, routes=routes)
        send_rows_kernel[(memory.epochs.shape[0],)](
            x_TE.contiguous(),
            experts_TK,
            weights_TK.contiguous(),
            memory.buffers,
            memory.epochs,
            *self._sizes(counts),
            layout.spans,
            layout.rows,
            layout.scales,
            layout.ids,
            layout.weights,
            FP8=self._scaled,
            **self._constants,
        )
        return Dispatched(
            self._rows_AE[:total],
            self._no_counts,
            handle,
            self._scales[:total] if self._scaled else None,
            Routes(self._ids_AK[:total], self._weights_AK[:total]),
        )

    def combine(self, output: Tensor, dispatched: Dispatched) -> Tensor:
        """The sums of this rank's rows over all ranks, added up in float32 and rounded once. What
        travels is in the spec's dtype."""
        handle, layout, memory = dispatched.handle, self._layout, self._memory
        if not isinstance(handle, _Handle):
            return self._rest.combine(output, dispatched)
        counts = handle.counts
        out_TE = output.new_empty(counts[memory.rank], output.shape[1], dtype=self._spec.dtype)
        if sum(counts) == 0:
            return out_TE
        send_sums_kernel[(memory.epochs.shape[0],)](
            output.contiguous(),
            handle.experts_TK,
            out_TE,
            memory.buffers,
            memory.epochs,
            *self._sizes(counts),
            layout.max_rows,
            layout.spans,
            layout.ids,
            layout.sums,
            **self._constants,
        )
        return out_TE

    def _sizes(self, counts: Sequence[int]) -> tuple[int, int, int, int]:
        """Own rows, the first of them among all, the most of any rank, experts of a rank."""
        rank = self._memory.rank
        return counts[rank], sum(counts[:rank]), max(counts), self._spec.num_local_experts

    def _view(self, offset: int, dtype: torch.dtype, *shape: int) -> Tensor:
        """A part of this rank's own buffer."""
        num_bytes = shape[0] * shape[1] * dtype.itemsize
        return self._memory.own[offset : offset + num_bytes].view(dtype).view(shape)
