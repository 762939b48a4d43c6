"""GPUs that reach each other's memory over NVLink: small collectives without NCCL's protocols.

Of a step with few rows NCCL's all-reduces take longer than the bytes need: its latency, and at some
sizes its choice of protocol. Here one kernel pushes values straight into the peers' buffers
(`plugins.comm._symm_kernels`), and NCCL carries what is larger than a slot, and all that it does as
well. torch's symmetric memory connects the buffers; multicast is not used.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from core.hookspecs import NoOptions
from core.interfaces.comm import Communicator
from core.kernels.peer_memory import PeerMemory, connect
from plugins.comm._nccl_group import NcclCommunicator, require_nccl
from plugins.comm._symm_exchange import PeerExchange, buffer_bytes

NUM_PROGRAMS = 64  # of every launch
_SLOT_BYTES = 4 * 2**20  # beyond, NCCL's bandwidth counts, and its all-reduce sends less

# By the name of a group: axes of the same ranks share it, and take turns on one stream.
_memory_of: dict[str, PeerMemory | None] = {}


class SymmMemBackend:
    """The factory behind comm=symm_mem; groups are NCCL's."""

    torch_backend = "nccl"

    def __init__(self, options: NoOptions) -> None:
        """Raises ConfigError where this machine or this torch has no NCCL."""
        require_nccl("symm_mem")

    def communicator(self, group: object) -> Communicator:
        """Connect the buffers of a group's ranks, all of which call this. Where they can't reach
        each other's memory NCCL carries everything, and the log says so."""
        assert isinstance(group, ProcessGroup)
        if group.group_name not in _memory_of:
            num_bytes = buffer_bytes(group.size(), _SLOT_BYTES, NUM_PROGRAMS)
            _memory_of[group.group_name] = connect(
                group, num_bytes, NUM_PROGRAMS, key="comm=symm_mem", instead="NCCL is used"
            )
        memory = _memory_of[group.group_name]
        return NcclCommunicator(group) if memory is None else SymmMemCommunicator(group, memory)


class SymmMemCommunicator(NcclCommunicator):
    """Small sums and gathers over peers' memory, everything else by NCCL; ordered on the current
    stream, and never waited for by the host."""

    def __init__(self, group: ProcessGroup, memory: PeerMemory) -> None:
        super().__init__(group)
        self._peers = PeerExchange(memory, _SLOT_BYTES)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks; written into `x` where that is contiguous."""
        x = x.contiguous()
        return self._peers.reduce(x) if self._peers.can_sum(x) else super().all_reduce(x)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """This rank's rows of the sum; a new tensor."""
        self._check_rows(x)
        x = x.contiguous()
        if self._peers.can_sum(x, self.size):
            return self._peers.reduce_part(x)
        return super().reduce_scatter(x)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Equal parts of every rank, concatenated along `dim` in rank order; a new tensor."""
        x = x.contiguous()
        if not self._peers.can_carry(x):
            return super().all_gather(x, dim)
        parts = self._peers.gather(x)
        if dim % x.dim() == 0:
            return parts.flatten(0, 1)
        return torch.cat(parts.unbind(0), dim)
