"""Communication over one mesh axis: the interface of plugins, and the bridges of layers.

A layer does not ask for the backend or the number of ranks. It names a source and a target layout,
and gets a function. On an axis of size 1 this function is the identity.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from core.parallel.layout import Layout
from core.parallel.plan import AXES, Plan

Bridge = Callable[[Tensor], Tensor]


class Communicator(Protocol):
    """Collectives over the ranks of one axis. Every rank calls the same ones in the same order.

    A result may alias the argument only if the docstring says so. A call may return before the
    device has finished; its work is ordered on the current CUDA stream. Sizes must be the same on
    all ranks, except in `all_to_all`.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def capturable(self) -> bool:
        """Whether its collectives can be captured in a CUDA graph."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over ranks. It may be written into `x`, which is then returned."""
        ...

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Return the equal parts of all ranks, concatenated along `dim` in rank order."""
        ...

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum over ranks, and return to rank i the i-th equal part along dimension 0."""
        ...

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """Write the value of axis rank `source` into `x` on every rank, and return `x`."""
        ...

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Tensor:
        """Exchange rows (dimension 0). The result is a new tensor.

        `x` has `send_counts[i]` rows for axis rank i, in rank order. The result has
        `receive_counts[i]` rows from axis rank i, in rank order. Counts may be 0."""
        ...


@dataclass(frozen=True, slots=True)
class SoloCommunicator:
    """The communicator of an axis of size 1. Every collective returns its argument."""

    rank: int = 0
    size: int = 1
    capturable: bool = True

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return x

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return x

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return x

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Tensor:
        return x


def _identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, slots=True)
class Comms:
    """The communicators of one rank, by mesh axis ("tp", ...), and the bridges over them."""

    axes: Mapping[str, Communicator]

    def bridge(self, axis: str, *, src: Layout, dst: Layout) -> Bridge:
        """Return a function that converts layout `src` to `dst`. Built once, with the layer."""
        comm = self.axes[axis]
        if comm.size == 1 or src is dst:
            return _identity
        table: dict[tuple[Layout, Layout], Bridge] = {
            (Layout.PARTIAL, Layout.REPLICATED): comm.all_reduce,
            (Layout.PARTIAL, Layout.ROWS): comm.reduce_scatter,
            (Layout.ROWS, Layout.REPLICATED): lambda x: comm.all_gather(x, 0),
            (Layout.COLUMNS, Layout.REPLICATED): lambda x: comm.all_gather(x, -1),
        }
        assert (src, dst) in table, f"no bridge from {src} to {dst}"
        return table[src, dst]


SOLO = Comms({axis: SoloCommunicator() for axis in AXES})


@dataclass(frozen=True, slots=True)
class AxisPlace:
    """The position of a rank on an axis, to build a model without running it. No collectives."""

    rank: int
    size: int
    capturable: bool = False

    def _refuse(self) -> Tensor:
        raise AssertionError("this rank is only measured; it has no peers to talk to")

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._refuse()

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return self._refuse()

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self._refuse()

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return self._refuse()

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Tensor:
        return self._refuse()


def places(plan: Plan, rank: int) -> Comms:
    """Return the position of a rank on every axis of a plan, to measure what it would hold."""
    return Comms(
        {axis: AxisPlace(plan.axis_index(axis, rank), plan.axis_size(axis)) for axis in AXES}
    )


# (this rank's part of a sum (T, E), residual (T, E), the norm's weight (E,), its eps) ->
# core.interfaces.ops.Ops.add_rms_norm of the sum over ranks; may overwrite the first two.
SumAddNorm = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


@runtime_checkable
class FusesNorm(Protocol):
    """A communicator that can do an all-reduce and the norm after it in one, for some sizes."""

    def fused_add_norm(self, otherwise: SumAddNorm) -> SumAddNorm:
        """Return a function with the result of `otherwise`, which is called for all other sizes.

        Sums are rounded to the dtype of the summands, as in `all_reduce`. Called once per layer,
        when the model is built."""
        ...


class CommBackend(Protocol):
    """What the factory of a comm plugin returns: how process groups are created and wrapped."""

    torch_backend: str  # for torch.distributed, e.g. "gloo" or "nccl"

    def communicator(self, group: object) -> Communicator:
        """Return the communicator of a torch.distributed process group that has this rank."""
        ...


@runtime_checkable
class StandInBackend(Protocol):
    """A comm plugin whose communicators work without peers, to time one rank of a larger plan.

    Results have the right shapes but no meaning; the memory traffic has the right size."""

    def stand_in(self, rank: int, size: int) -> Communicator:
        """Return the communicator of rank `rank` on an axis of `size` ranks that does not exist."""
        ...


def connect(groups: Mapping[str, object | None], backends: Mapping[str, CommBackend]) -> Comms:
    """Return the communicators of one rank.

    `groups` are those that `core.parallel.mesh` created, by axis; None if the rank has no peers.
    `backends` has the plugin of every axis that has a group."""
    return Comms(
        {
            axis: SoloCommunicator() if group is None else backends[axis].communicator(group)
            for axis, group in groups.items()
        }
    )
