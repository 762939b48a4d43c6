"""Communication over one mesh axis: the protocol plugins fill, and the bridges layers use.

A layer never asks which backend or how many ranks there are: it declares a source and a target
layout, and gets a function. On an axis of size 1 that function is the identity.
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

    Results may alias the argument where the docstring says so; calls may return before the
    device finished, ordered on the current stream.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def capturable(self) -> bool:
        """Whether its collectives may be recorded in a CUDA graph."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks; may be written into `x`, which is returned then."""
        ...

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Equal parts of every rank, concatenated along `dim` in rank order."""
        ...

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Rank i gets the i-th equal part, along dimension 0, of the sum over ranks."""
        ...

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """The value of axis rank `source`, written into `x` everywhere and returned."""
        ...

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Tensor:
        """Rows (dimension 0) of `x` in rank order, `send_counts[i]` of them for axis rank i;
        returns what came, `receive_counts[i]` rows of rank i, in rank order. A new tensor."""
        ...


@dataclass(frozen=True, slots=True)
class SoloCommunicator:
    """The communicator of an axis of size 1: every collective is the identity."""

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
    """The communicators of one rank by mesh axis ("tp", ...), and the bridges over them."""

    axes: Mapping[str, Communicator]

    def bridge(self, axis: str, *, src: Layout, dst: Layout) -> Bridge:
        """A function that turns a tensor in layout `src` into layout `dst`; built once."""
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
    """A rank's place on an axis, for building (not running) a model: has no collectives."""

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
    """Where a rank of a plan stands on every axis, to measure what it would hold."""
    return Comms(
        {axis: AxisPlace(plan.axis_index(axis, rank), plan.axis_size(axis)) for axis in AXES}
    )


# (this rank's part of a sum (T, E), residual (T, E), the norm's weight (E,), its eps) ->
# core.interfaces.ops.Ops.add_rms_norm of the sum over ranks; may overwrite the first two.
SumAddNorm = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


@runtime_checkable
class FusesNorm(Protocol):
    """A communicator that can do an all-reduce and the norm behind it at once, for some sizes."""

    def fused_add_norm(self, otherwise: SumAddNorm) -> SumAddNorm:
        """The same as `otherwise`, one after the other, which takes all other sizes. Sums are
        rounded to the dtype of what is summed, as `all_reduce` leaves them. Called once a layer."""
        ...


class CommBackend(Protocol):
    """What a comm plugin's factory returns: how process groups are made and wrapped."""

    torch_backend: str  # for torch.distributed, e.g. "gloo" or "nccl"

    def communicator(self, group: object) -> Communicator:
        """Wrap a torch.distributed process group that this rank belongs to."""
        ...


@runtime_checkable
class StandInBackend(Protocol):
    """A comm plugin whose communicators do without peers: what they return has the right shapes
    and takes memory traffic of the right size, for timing one rank of a larger plan."""

    def stand_in(self, rank: int, size: int) -> Communicator:
        """Rank `rank` of an axis of `size` ranks, of which it is the only one there."""
        ...


def connect(groups: Mapping[str, object | None], backends: Mapping[str, CommBackend]) -> Comms:
    """The communicators of one rank: `groups` as `core.parallel.mesh` made them, None where the
    rank has no peers; `backends` holds the plugin of every axis that has a group."""
    return Comms(
        {
            axis: SoloCommunicator() if group is None else backends[axis].communicator(group)
            for axis, group in groups.items()
        }
    )
