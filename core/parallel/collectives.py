"""Collectives over a torch.distributed group, as `core.interfaces.comm.Communicator` wants them.

The common part of comm plugins that go through torch.distributed; makes no groups
(`core.parallel.mesh` does) and knows no backend's limits.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these two; the old names warn there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class GroupCommunicator:
    """This rank's end of one process group. Does not own the group.

    `group` is for libraries with collectives of their own, which ask for the ranks they connect
    (DeepEP). A communicator without this attribute is not of torch.distributed.
    """

    capturable = False  # what waits on the host can't be recorded

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    @property
    def group(self) -> dist.ProcessGroup:
        """The wrapped group; still owned by the mesh."""
        return self._group

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in x's dtype; written into `x` where that is contiguous."""
        x = x.contiguous()
        dist.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Equal parts of every rank, concatenated along `dim` in rank order; a new tensor."""
        rows = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        _all_gather(_bytes(rows), _bytes(x.contiguous()), group=self._group)
        return (
            rows if dim % x.dim() == 0 else torch.cat(rows.view(self.size, *x.shape).unbind(0), dim)
        )

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Rank i gets the i-th equal part, along dimension 0, of the sum over ranks; a new
        tensor."""
        self._check_rows(x)
        part = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        _reduce_scatter(part, x.contiguous(), group=self._group)
        return part

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """The value of axis rank `source`, written into `x` (contiguous) and returned."""
        assert x.is_contiguous(), "broadcast writes into its argument"
        dist.broadcast(_bytes(x), group=self._group, group_src=source)
        return x

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Tensor:
        """Rows of `x` to the ranks in order, `send_counts[i]` of them to rank i; returns what
        came, `receive_counts[i]` rows of rank i. A new tensor."""
        assert len(send_counts) == len(receive_counts) == self.size, "a count for every rank"
        assert sum(send_counts) == x.shape[0], f"{x.shape[0]} rows, {list(send_counts)} to send"
        came = x.new_empty(sum(receive_counts), *x.shape[1:])
        row_bytes = math.prod(x.shape[1:]) * x.element_size()
        dist.all_to_all_single(
            _bytes(came),
            _bytes(x.contiguous()),
            [count * row_bytes for count in receive_counts],
            [count * row_bytes for count in send_counts],
            group=self._group,
        )
        return came

    def _check_rows(self, x: Tensor) -> None:
        assert x.shape[0] % self.size == 0, (
            f"{x.shape[0]} rows can't be cut into {self.size} equal parts"
        )


def _bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor, as one row of uint8. What is only carried travels so:
    not every backend has every dtype (gloo lacks float8)."""
    return x.view(-1).view(torch.uint8)
