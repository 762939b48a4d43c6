"""Sums that come out the same whatever the transport does: every part is brought to every rank and
added there, in the order of ranks and in float32, with one rounding in the end.

An all-reduce that a library chooses by size and topology may add in another order tomorrow. This
one carries as many times more bytes as there are ranks.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from acme_comm import AcmeOptions
from core.parallel.collectives import GroupCommunicator

_HALVES = (torch.bfloat16, torch.float16)


class AcmeBackend:
    """Fills core.interfaces.comm.CommBackend."""

    def __init__(self, options: AcmeOptions) -> None:
        self.torch_backend = options.transport

    def communicator(self, group: object) -> "OrderedCommunicator":
        """Wrap a group of torch.distributed that this rank belongs to."""
        assert isinstance(group, ProcessGroup)
        return OrderedCommunicator(group)


class OrderedCommunicator(GroupCommunicator):
    """Fills core.interfaces.comm.Communicator; what is not summed is torch.distributed's."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks; a new tensor."""
        parts = self.all_gather(x.contiguous().unsqueeze(0), 0)
        wide = torch.float32 if x.dtype in _HALVES else x.dtype
        total = parts[0].to(wide)
        for part in parts[1:]:
            total = total + part
        return total.to(x.dtype)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """This rank's rows of the sum."""
        assert x.shape[0] % self.size == 0, "rows can't be cut into equal parts"
        total = self.all_reduce(x)
        return total.chunk(self.size)[self.rank].clone() if x.shape[0] else total
