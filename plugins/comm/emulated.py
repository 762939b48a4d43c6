"""One rank of an axis without its peers, for timing: collectives become local copies.

Results have the shapes that peers would give them, and cost a copy of that size on the device; the
values mean nothing. Nothing waits for the device, so that every collective may be captured.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import ConfigError
from core.interfaces.comm import Communicator
from core.plugin.hookspecs import NoOptions


class EmulatedBackend:
    """The factory behind comm=emulated (core.interfaces.comm.StandInBackend)."""

    torch_backend = "emulated"

    def __init__(self, options: NoOptions) -> None:
        pass

    def stand_in(self, rank: int, size: int) -> Communicator:
        """Rank `rank` of `size`; the others are taken to bring what this one brings."""
        return EmulatedCommunicator(rank, size)

    def communicator(self, group: object) -> Communicator:
        """Raises ConfigError: where there are peers, they are to be spoken to."""
        raise ConfigError("comm=emulated stands in for ranks that are not there; set comm=auto")


class EmulatedCommunicator:
    """core.interfaces.comm.Communicator: everyone brings the same."""

    capturable = True

    def __init__(self, rank: int, size: int) -> None:
        assert 0 <= rank < size, (rank, size)
        self.rank = rank
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        """A copy: the sum itself would grow with every layer until it overflows."""
        return x.clone()

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """`x` once for every rank, along `dim`."""
        return torch.cat([x] * self.size, dim)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """A copy of this rank's rows."""
        assert x.shape[0] % self.size == 0, f"{x.shape[0]} rows, {self.size} ranks"
        return x.chunk(self.size)[self.rank].clone() if x.shape[0] else x

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """`x` as it is, or zeros where it would come from another rank: what callers hand over
        then may be no values at all."""
        return x if source == self.rank else x.zero_()

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Tensor:
        """As many rows as would come: those of `x` over and over, zeros where it has none."""
        assert sum(send_counts) == x.shape[0], f"{x.shape[0]} rows, {list(send_counts)} to send"
        num_rows = sum(receive_counts)
        if x.shape[0] == 0:
            return x.new_zeros(num_rows, *x.shape[1:])
        repeats = [-(-num_rows // x.shape[0])] + [1] * (x.dim() - 1)
        return x.repeat(repeats)[:num_rows]
