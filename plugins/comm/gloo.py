"""Gloo: collectives of CPU tensors over sockets. Knows nothing of how groups are made."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from core.interfaces.comm import Communicator
from core.parallel.collectives import GroupCommunicator
from core.plugin.hookspecs import NoOptions

_HALVES = (torch.bfloat16, torch.float16)


class GlooBackend:
    """The factory behind comm=gloo."""

    torch_backend = "gloo"

    def __init__(self, options: NoOptions) -> None:
        pass

    def communicator(self, group: object) -> Communicator:
        """Wrap a gloo group that this rank belongs to."""
        assert isinstance(group, ProcessGroup)
        return GlooCommunicator(group)


class GlooCommunicator(GroupCommunicator):
    """Sums of 16-bit floats are taken in float32: one rounding whatever the number of ranks,
    and no slower. CUDA tensors travel through host memory."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, written into `x` where that is contiguous on the CPU."""
        if x.device.type == "cpu" and x.dtype not in _HALVES:
            return super().all_reduce(x)
        wide = torch.float32 if x.dtype in _HALVES else x.dtype
        total = super().all_reduce(x.to("cpu", wide))
        return total.to(x.device, x.dtype)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Equal parts of every rank, concatenated along `dim` in rank order."""
        return super().all_gather(x.cpu(), dim).to(x.device)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """This rank's rows of the sum. Not every supported torch has it for gloo, so the whole
        sum is taken."""
        self._check_rows(x)
        total = self.all_reduce(x.clone())
        return total.chunk(self.size)[self.rank].clone() if x.shape[0] else total

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """The value of axis rank `source`, written into `x`."""
        if x.device.type == "cpu":
            return super().broadcast(x, source)
        return x.copy_(super().broadcast(x.cpu(), source))

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Tensor:
        """Rows to every rank, and those of every rank to this one."""
        return super().all_to_all(x.cpu(), send_counts, receive_counts).to(x.device)
