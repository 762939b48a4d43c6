"""How the rows of a step reach a block that several ranks compute together, and come back.

A block takes and returns rows in the stream's layout (`BuildContext.stream`). In between, the ranks
of one axis compute partial sums for all rows of that axis. Knows nothing of what is computed.
"""

from typing import Protocol

from torch import Tensor

from core.interfaces.comm import Communicator
from core.interfaces.model import BuildContext
from core.kernels.ragged import gather_rows, scatter_rows
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


class _Alone:
    """An axis of one rank: it has its rows already."""

    def gather(self, x: Tensor, rows: StepRows) -> Tensor:
        return x

    def scatter(self, partial: Tensor, rows: StepRows) -> Tensor:
        return partial


class _Replicated:
    """Every rank has all rows before and after."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    def gather(self, x: Tensor, rows: StepRows) -> Tensor:
        return x

    def scatter(self, partial: Tensor, rows: StepRows) -> Tensor:
        return self._comm.all_reduce(partial) if partial.shape[0] else partial


class _SharedOut:
    """Each rank has rows of its own before and after."""

    def __init__(self, comm: Communicator, axis: str) -> None:
        self._comm, self._axis = comm, axis

    def gather(self, x: Tensor, rows: StepRows) -> Tensor:
        return gather_rows(self._comm, x, rows.along(self._axis))

    def scatter(self, partial: Tensor, rows: StepRows) -> Tensor:
        return scatter_rows(self._comm, partial, rows.along(self._axis))


def row_exchange(context: BuildContext, axis: str) -> RowExchange:
    """The exchange of blocks that the ranks of `axis` compute together; built once."""
    comm = context.comms.axes[axis]
    if comm.size == 1:
        return _Alone()
    if context.stream is Layout.REPLICATED:
        return _Replicated(comm)
    return _SharedOut(comm, axis)
