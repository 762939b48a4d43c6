"""GPUs that reach each other's memory over NVLink: small collectives without NCCL's protocols.

Of a step with few rows NCCL's all-reduces take longer than the bytes need: its latency, and at some
sizes its choice of protocol. Here one kernel pushes values straight into the peers' buffers
(`plugins.comm._symm_kernels`), and NCCL carries what is larger than a slot, and all that it does as
well. torch's symmetric memory connects the buffers; multicast is not used.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from core.gpu_tools.peer_memory import PeerMemory, connect
from core.interfaces.comm import Communicator, SumAddNorm
from plugins.comm._nccl_group import NcclCommunicator, require_nccl
from plugins.comm._options import SymmMemOptions
from plugins.comm._symm_exchange import PeerExchange, buffer_bytes
from plugins.comm._symm_norm import PeerNorm

NUM_PROGRAMS = 64  # of every launch
_SLOT_BYTES = 4 * 2**20  # beyond, NCCL's bandwidth counts, and its all-reduce sends less
# Of a sum with its norm. As long as each program has one row it saves a launch; with several it
# computes them one after the other, on half of a GPU.
_NORM_PROGRAMS = 128
_NORM_SLOT_BYTES = 2 * 2**20

# By the name of a group, bytes of a slot and programs: axes of the same ranks share it, and take
# turns on one stream.
_memory_of: dict[tuple[str, int, int], PeerMemory | None] = {}


class SymmMemBackend:
    """The factory behind comm=symm_mem; groups are NCCL's."""

    torch_backend = "nccl"

    def __init__(self, options: SymmMemOptions) -> None:
        """Raises ConfigError where this machine or this torch has no NCCL."""
        require_nccl("symm_mem")
        self._fuses_norm = options.fuse_norm

    def communicator(self, group: object) -> Communicator:
        """Connect the buffers of a group's ranks, all of which call this. Where they can't reach
        each other's memory NCCL carries everything, and the log says so."""
        assert isinstance(group, ProcessGroup)
        memory = _memory(group, _SLOT_BYTES, NUM_PROGRAMS)
        if memory is None:
            return NcclCommunicator(group)
        if self._fuses_norm:
            norm_memory = _memory(group, _NORM_SLOT_BYTES, _NORM_PROGRAMS)
            if norm_memory is not None:
                return FusingCommunicator(group, memory, norm_memory)
        return SymmMemCommunicator(group, memory)


def _memory(group: ProcessGroup, slot_bytes: int, num_programs: int) -> PeerMemory | None:
    """Connected once a group and size."""
    name = group.group_name, slot_bytes, num_programs
    if name not in _memory_of:
        num_bytes = buffer_bytes(group.size(), slot_bytes, num_programs)
        _memory_of[name] = connect(
            group, num_bytes, num_programs, key="comm=symm_mem", instead="NCCL is used"
        )
    return _memory_of[name]


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


class FusingCommunicator(SymmMemCommunicator):
    """Sums of few rows with the residual's addition and the norm behind them in one launch."""

    def __init__(self, group: ProcessGroup, memory: PeerMemory, norm_memory: PeerMemory) -> None:
        super().__init__(group, memory)
        self._norm = PeerNorm(norm_memory, _NORM_SLOT_BYTES)

    def fused_add_norm(self, otherwise: SumAddNorm) -> SumAddNorm:
        """In one launch where every program has at most one row (core.interfaces.comm)."""
        norm = self._norm

        def sum_add_norm(
            x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float
        ) -> tuple[Tensor, Tensor]:
            few = x_TE.shape[0] <= _NORM_PROGRAMS
            if few and norm.can_take(x_TE, residual_TE, weight_E):
                return norm(x_TE, residual_TE, weight_E, eps)
            return otherwise(x_TE, residual_TE, weight_E, eps)

        return sum_add_norm
