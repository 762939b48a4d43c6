"""How the rows of a step reach a block that several ranks compute together, and come back.

A block takes and returns rows in the stream's layout (`BuildContext.stream`). In between, the ranks
of one axis compute partial sums for all rows of that axis. What follows a block is always the
addition to the residual and a norm, so that ranks which can do the sum and these at once do. Knows
nothing of what is computed.
"""

from typing import Protocol

from torch import Tensor

from core.interfaces.comm import Communicator, FusesNorm, SumAddNorm
from core.interfaces.model import BuildContext
from core.interfaces.ops import Ops
from core.layers.basic.norm import RMSNorm
from core.ops.ragged import gather_rows, scatter_rows
from core.parallel.layout import Layout
from core.parallel.rows import StepRows


class RowExchange(Protocol):
    """Around a block over one axis; every rank of the axis calls both, also without rows."""

    def gather(self, x: Tensor, rows: StepRows) -> Tensor:
        """Rows in the stream's layout -> the rows of all ranks of the axis."""
        ...

    def scatter(self, partial: Tensor, rows: StepRows) -> Tensor:
        """Partial sums for those rows -> their sum over the axis, in the stream's layout. May
        overwrite its argument."""
        ...

    def add_norm(
        self, partial: Tensor, residual: Tensor, rows: StepRows, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """`norm.add(scatter(partial, rows), residual)`, at once where the ranks can."""
        ...


class _Alone:
    """An axis of one rank: it has its rows already."""

    def gather(self, x: Tensor, rows: StepRows) -> Tensor:
        return x

    def scatter(self, partial: Tensor, rows: StepRows) -> Tensor:
        return partial

    def add_norm(
        self, partial: Tensor, residual: Tensor, rows: StepRows, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        return norm.add(partial, residual)


ALONE: RowExchange = _Alone()


class _Replicated:
    """Every rank has all rows before and after."""

    def __init__(self, comm: Communicator, ops: Ops) -> None:
        self._comm = comm
        self._add_norm = sum_add_norm(comm, ops)

    def gather(self, x: Tensor, rows: StepRows) -> Tensor:
        return x

    def scatter(self, partial: Tensor, rows: StepRows) -> Tensor:
        return self._comm.all_reduce(partial) if partial.shape[0] else partial

    def add_norm(
        self, partial: Tensor, residual: Tensor, rows: StepRows, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        return self._add_norm(partial, residual, norm.weight_E, norm.eps)


def sum_add_norm(comm: Communicator, ops: Ops) -> SumAddNorm:
    """What ends a block whose rows all ranks have: at once where `comm` can, else one by one."""

    def one_by_one(
        partial: Tensor, residual: Tensor, weight_E: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = comm.all_reduce(partial) if partial.shape[0] else partial
        return ops.add_rms_norm(total, residual, weight_E, eps)

    return comm.fused_add_norm(one_by_one) if isinstance(comm, FusesNorm) else one_by_one


class _SharedOut:
    """Each rank has rows of its own before and after."""

    def __init__(self, comm: Communicator, axis: str) -> None:
        self._comm, self._axis = comm, axis

    def gather(self, x: Tensor, rows: StepRows) -> Tensor:
        return gather_rows(self._comm, x, rows.along(self._axis))

    def scatter(self, partial: Tensor, rows: StepRows) -> Tensor:
        return scatter_rows(self._comm, partial, rows.along(self._axis))

    def add_norm(
        self, partial: Tensor, residual: Tensor, rows: StepRows, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        return norm.add(self.scatter(partial, rows), residual)


def row_exchange(context: BuildContext, axis: str) -> RowExchange:
    """The exchange of blocks that the ranks of `axis` compute together; built once."""
    comm = context.comms.axes[axis]
    if comm.size == 1:
        return ALONE
    if context.stream is Layout.REPLICATED:
        return _Replicated(comm, context.ops)
    return _SharedOut(comm, axis)
