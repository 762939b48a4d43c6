"""MoE all-to-all: dispatch tokens to the ranks of their experts, combine the results.

A dispatcher is built once for each phase and used by all layers. Every rank of the ep axis calls
`dispatch` and `combine` in every MoE layer of every step, even if it has no tokens itself.

A row is a token: one row of a matrix. Shape legend: T own rows, E hidden size, K experts of a row,
X physical experts of all ranks, L = X / ep physical experts of this rank, M received rows (one for
each pair of row and local expert), C most rows of one local expert.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from core.interfaces.comm import Communicator


@dataclass(frozen=True, slots=True)
class Grouping:
    """The position of each (row, expert) pair among the rows that the experts read."""

    source: Tensor  # int64 (M,) or (L, C): the row to read; past the counted ones, any row
    counts_L: Tensor  # int64: pairs of each expert
    positions_TK: Tensor  # int64: position of each pair in the flattened `source`; -1: no pair


class RowOps(Protocol):
    """Operations of a device that dispatchers use. `core.ops.row_ops.TorchRowOps` is the oracle."""

    def group_rows(
        self, experts_TK: Tensor, num_experts: int, num_pairs: int | None = None
    ) -> Grouping:
        """Group pairs by expert, and by row within an expert, without gaps (CONTIGUOUS).

        `experts_TK` is int64: 0 .. L-1, or negative for no expert of this rank. `num_pairs` is the
        number of pairs, if the host knows it. If it is None, a CPU counts them; on a GPU M is then
        T * K, and the rows past the counted ones must not be used."""
        ...

    def sum_results(
        self,
        results_ME: Tensor,
        positions_TK: Tensor,
        weights_TK: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return the sum of each row's results, (T, E), times `weights_TK` (float32) if given.

        Sums are computed in float32 and rounded to `dtype` once. `positions_TK` are rows of
        `results_ME`, or -1 for none. Rows of `results_ME` that have no position can contain
        anything, even NaN."""
        ...

    def quantize_rows(self, x_TE: Tensor, source_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return float8_e4m3fn values (T, E), and float32 scales (T, E / 128) of 128 columns each.

        If `source_T` is given, the result has the rows `x_TE[source_T]`."""
        ...


class ExpertLayout(enum.Enum):
    """The arrangement of received rows in `Dispatched.hidden`."""

    # (M, E): grouped by local expert, without padding between groups. If the host does not wait for
    # the device, rows past the sum of counts can follow. They are neither computed nor read.
    CONTIGUOUS = "contiguous"
    # (L, C, E): padded for each local expert; only its first `counts_L` rows are used.
    BATCHED = "batched"
    # (T, E): rows as they are, with `Dispatched.routes`. The result of a row is its weighted sum.
    ROUTED = "routed"


@dataclass(frozen=True, slots=True, kw_only=True)
class A2ASpec:
    """What a dispatcher is built for. It is the same for every MoE layer."""

    comm: Communicator  # of the ep axis
    num_experts: int  # X, physical: redundant copies included
    top_k: int  # K
    hidden_size: int  # E
    dtype: torch.dtype  # of rows
    device: torch.device
    ops: RowOps  # of that device
    max_rows: int  # most rows of one rank in a step; sizes of buffers follow from it
    phase: str  # "prefill" or "decode"
    fp8: bool = False  # rows may be sent as float8_e4m3fn with a scale for every 128 columns

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.comm.size


@dataclass(frozen=True, slots=True)
class Routes:
    """The experts of rows, for the layout ROUTED: the experts' kernel groups rows itself."""

    experts_TK: Tensor  # int64: local experts, or -1 for none
    weights_TK: Tensor  # float32


@dataclass(frozen=True, slots=True)
class Dispatched:
    """The rows that this rank received, and what `combine` needs to return their results."""

    hidden: Tensor  # in the dispatcher's layout; float8_e4m3fn where `scales` is given
    counts_L: Tensor  # int64 on the device: rows of each local expert; shape (0,) with `routes`
    handle: object
    scales: Tensor | None = None  # float32, hidden's shape with E / 128 columns
    routes: Routes | None = None  # only in the layout ROUTED


class Dispatcher(Protocol):
    """What the factory of a moe_a2a plugin returns.

    For each row, `combine(f(dispatch(x)))` is the sum over its experts of weight * f_expert(x).
    """

    layout: ExpertLayout
    capturable: bool  # can be captured in a CUDA graph: never waits for the device

    def dispatch(
        self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor, counts: Sequence[int]
    ) -> Dispatched:
        """Send each row of `x_TE` (the spec's dtype) to its experts.

        `experts_TK` is int64: physical ids in 0 .. X-1, or -1 for no expert (padding). The ids of
        one row differ. `weights_TK` is float32. `counts` has T of every rank of the ep axis, in
        axis order. All ranks know it. Some counts can be 0.
        """
        ...

    def combine(self, output: Tensor, dispatched: Dispatched) -> Tensor:
        """Return the results (T, E) of the rows that this rank dispatched; 0 without experts.

        `output` has the layout and shape of `dispatched.hidden`, and the spec's dtype."""
        ...
