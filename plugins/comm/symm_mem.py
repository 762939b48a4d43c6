"""GPUs that reach each other's memory over NVLink: small collectives without NCCL's protocols.

Of a step with few rows NCCL's all-reduces take longer than the bytes need: its latency, and at some
sizes its choice of protocol. Here one kernel pushes values straight into the peers' buffers
(`plugins.comm._symm_kernels`), and NCCL carries what is larger than a slot, and all that it does as
well. torch's symmetric memory connects the buffers; multicast is not used.
"""

import logging

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from core.hookspecs import NoOptions
from core.interfaces.comm import Communicator
from plugins.comm._nccl_group import NcclCommunicator, require_nccl
from plugins.comm._symm_exchange import PeerExchange, PeerMemory, buffer_bytes

log = logging.getLogger(__name__)

NUM_PROGRAMS = 64  # of every launch
_SLOT_BYTES = 4 * 2**20  # beyond, NCCL's bandwidth counts, and its all-reduce sends less
_MOST_RANKS = 8  # of one host

# By the name of a group: axes of the same ranks share it, and take turns on one stream. Buffers are
# connected as long as the process lives.
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
            _memory_of[group.group_name] = _connect(group)
        memory = _memory_of[group.group_name]
        return NcclCommunicator(group) if memory is None else SymmMemCommunicator(group, memory)


class SymmMemCommunicator(NcclCommunicator):
    """Small sums and gathers over peers' memory, everything else by NCCL; ordered on the current
    stream, and never waited for by the host."""

    def __init__(self, group: ProcessGroup, memory: PeerMemory) -> None:
        super().__init__(group)
        self._peers = PeerExchange(memory)

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


def _connect(group: ProcessGroup) -> PeerMemory | None:
    """Buffers that all ranks of a group can write into; None where some can't, which all ranks then
    agree on."""
    device = torch.device("cuda", torch.cuda.current_device())
    size = dist.get_world_size(group)
    if not _all_can(_reaches_all(device, size), group, device):
        log.info("comm=symm_mem: %d ranks can't reach each other's memory; NCCL is used", size)
        return None
    memory = None
    try:
        memory = _exchange_buffers(group, size, device)
    except RuntimeError as error:  # a container may not allow it
        log.warning("comm=symm_mem: %s (comm=nccl does without)", str(error).splitlines()[0])
    # Nobody pushes before the flags of all are zero, which this waits for.
    if not _all_can(memory is not None, group, device):
        log.warning("comm=symm_mem: not all of %d ranks could connect; NCCL is used", size)
        return None
    return memory


def _exchange_buffers(group: ProcessGroup, size: int, device: torch.device) -> PeerMemory:
    """Raises RuntimeError where the driver or the system refuses."""
    import torch.distributed._symmetric_memory as symm_mem

    num_bytes = buffer_bytes(size, _SLOT_BYTES, NUM_PROGRAMS)
    buffer = symm_mem.empty(num_bytes, dtype=torch.uint8, device=device)
    handle = symm_mem.rendezvous(buffer, group.group_name)
    buffer.zero_()
    _kept.append((buffer, handle))
    torch.cuda.synchronize(device)
    return PeerMemory(
        rank=dist.get_rank(group),
        size=size,
        slot_bytes=_SLOT_BYTES,
        buffers=torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device),
        epochs=torch.zeros(NUM_PROGRAMS, dtype=torch.int32, device=device),
    )


def _all_can(this_rank: bool, group: ProcessGroup, device: torch.device) -> bool:
    """Whether all ranks can; waits for them."""
    can = torch.tensor([int(this_rank)], device=device)
    dist.all_reduce(can, dist.ReduceOp.MIN, group=group)
    return bool(can.item())


_kept: list[object] = []  # what the addresses in `_memory_of` belong to


def _reaches_all(device: torch.device, size: int) -> bool:
    """Whether the ranks can be GPUs of this host, all within reach of this one."""
    others = [index for index in range(torch.cuda.device_count()) if index != device.index]
    if not 1 < size <= min(_MOST_RANKS, len(others) + 1):
        return False
    return all(torch.cuda.can_device_access_peer(device, other) for other in others)
