"""MoE all-to-all: what carries rows to the ranks that hold their experts, and back.

A dispatcher is built once for each phase and used by all layers. Every rank of the ep axis calls
`dispatch` and `combine` in every MoE layer of every step, also with no rows of its own.

Shape legend: T own rows, E hidden size, K experts of a row, X physical experts of all ranks,
L = X / ep those of this rank, M received rows (one for each pair of row and local expert), C most
rows of one local expert.
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
    """Where each pair of a row and an expert stands among the rows that the experts read."""

    source: Tensor  # int64 (M,) or (L, C): the row to read; any row past the counted ones
    counts_L: Tensor  # int64: pairs of each expert
    positions_TK: Tensor  # int64: place of each pair in `source`, flattened; -1: no pair


class RowOps(Protocol):
    """What a device does to rows on their way. `core.ops.row_ops.TorchRowOps` is the oracle."""

    def group_rows(
        self, experts_TK: Tensor, num_experts: int, num_pairs: int | None = None
    ) -> Grouping:
        """Pairs one behind another, grouped by expert and in the order of rows (CONTIGUOUS).

        `experts_TK` int64: 0 .. L-1, or negative for no expert here. `num_pairs`: how many pairs
        there are, where the host knows. Otherwise the CPU counts, and on a GPU M is T * K: the rows
        past the counted ones must not be used."""
        ...

    def sum_results(
        self,
        results_ME: Tensor,
        positions_TK: Tensor,
        weights_TK: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """For each row the sum of its results, times their weights if given: (T, E), added up in
        float32 and rounded to `dtype` once.

        `positions_TK`: places in `results_ME`, or -1 for none. Rows of `results_ME` that no
        position names may hold anything, NaN too."""
        ...

    def quantize_rows(self, x_TE: Tensor, source_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(T, E) -> float8_e4m3fn (T, E) and a float32 scale for every 128 columns; of the rows
        `source_T` where it is given."""
        ...


class ExpertLayout(enum.Enum):
    """How received rows lie in `Dispatched.hidden`."""

    # (M, E): grouped by local expert, no padding between. On devices that the host doesn't wait
    # for, rows past the sum of counts may follow: nobody computes or reads them.
    CONTIGUOUS = "contiguous"
    # (L, C, E): padded for each local expert; only its first rows count.
    BATCHED = "batched"
    # (T, E): own rows as they are, with `Dispatched.routes`; results are those of rows.
    ROUTED = "routed"


@dataclass(frozen=True, slots=True, kw_only=True)
class A2ASpec:
    """What a dispatcher is built for; the same for every MoE layer."""

    comm: Communicator  # of the ep axis
    num_experts: int  # X, physical: redundant copies included
    top_k: int  # K
    hidden_size: int  # E
    dtype: torch.dtype  # of rows
    device: torch.device
    ops: RowOps  # of that device
    max_rows: int  # most rows one rank enters with; buffers are sized by it
    phase: str  # "prefill" or "decode"
    fp8: bool = False  # rows may travel as float8_e4m3fn with a scale for every 128 columns

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.comm.size


@dataclass(frozen=True, slots=True)
class Routes:
    """Where rows go that the experts' kernel groups by itself."""

    experts_TK: Tensor  # int64: local experts, or -1 for none
    weights_TK: Tensor  # float32


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows that came to this rank, and what `combine` needs to send their results back."""

    hidden: Tensor  # in the dispatcher's layout; float8_e4m3fn where `scales` is given
    counts_L: Tensor  # int64 on the device: rows of each local expert; (0,) where `routes` say it
    handle: object
    scales: Tensor | None = None  # float32, hidden's shape with E / 128 columns
    routes: Routes | None = None  # given in the layout ROUTED alone


class Dispatcher(Protocol):
    """What a moe_a2a plugin's factory returns.

    `combine(f(dispatch(x)))` is, for each row, the sum over its experts of weight * f_expert(x).
    """

    layout: ExpertLayout
    capturable: bool  # may be recorded in a CUDA graph: never waits for the device

    def dispatch(
        self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor, counts: Sequence[int]
    ) -> Dispatched:
        """Send each row to its experts.

        `experts_TK` int64: physical ids in 0 .. X-1, or -1 for "no expert" (padding rows); the
        ids of one row differ. `weights_TK` float32. `counts`: T of every rank of the ep axis,
        in axis order, known to all ranks; some may be 0.
        """
        ...

    def combine(self, output: Tensor, dispatched: Dispatched) -> Tensor:
        """Send the experts' results back: `output` has the layout and shape of
        `dispatched.hidden` and the spec's dtype; returns (T, E). Rows without experts get 0."""
        ...
