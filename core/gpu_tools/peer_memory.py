"""Buffers of the GPUs of one host that all of them can write into, over NVLink.

torch's symmetric memory connects them; multicast is not used. Knows nothing of what is written.
"""

import logging
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

log = logging.getLogger(__name__)

_MOST_RANKS = 8  # of one host


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """A buffer on every rank of a group, each within reach of all."""

    rank: int
    size: int
    own: Tensor  # uint8: this rank's buffer, zeros at first
    buffers: Tensor  # int64 (size,) on the device: addresses of the ranks' buffers
    epochs: Tensor  # int32 (programs,) on the device, zeros at first


def connect(
    group: ProcessGroup, num_bytes: int, num_programs: int, *, key: str, instead: str
) -> PeerMemory | None:
    """Buffers of so many bytes that all ranks of a group can write into; None where some can't,
    which all ranks then agree on, and the log says. All ranks call this. `key`: what asks for
    them, `instead`: what is done without, for people."""
    device = torch.device("cuda", torch.cuda.current_device())
    size = dist.get_world_size(group)
    if not _all_can(_reaches_all(device, size), group, device):
        log.info("%s: %d ranks can't reach each other's memory; %s", key, size, instead)
        return None
    memory = None
    try:
        memory = _exchange_buffers(group, size, device, num_bytes, num_programs)
    except RuntimeError as error:  # a container may not allow it
        log.warning("%s: %s; %s", key, str(error).splitlines()[0], instead)
    # Nobody pushes before the flags of all are zero, which this waits for.
    if not _all_can(memory is not None, group, device):
        log.warning("%s: not all of %d ranks could connect; %s", key, size, instead)
        return None
    return memory


def _exchange_buffers(
    group: ProcessGroup, size: int, device: torch.device, num_bytes: int, num_programs: int
) -> PeerMemory:
    """Raises RuntimeError where the driver or the system refuses."""
    import torch.distributed._symmetric_memory as symm_mem

    buffer = symm_mem.empty(num_bytes, dtype=torch.uint8, device=device)
    handle = symm_mem.rendezvous(buffer, group.group_name)
    buffer.zero_()
    _kept.append((buffer, handle))
    torch.cuda.synchronize(device)
    return PeerMemory(
        rank=dist.get_rank(group),
        size=size,
        own=buffer,
        buffers=torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device),
        epochs=torch.zeros(num_programs, dtype=torch.int32, device=device),
    )


def _all_can(this_rank: bool, group: ProcessGroup, device: torch.device) -> bool:
    """Whether all ranks can; waits for them."""
    can = torch.tensor([int(this_rank)], device=device)
    dist.all_reduce(can, dist.ReduceOp.MIN, group=group)
    return bool(can.item())


_kept: list[object] = []  # what the addresses belong to: connected as long as the process lives


def _reaches_all(device: torch.device, size: int) -> bool:
    """Whether the ranks can be GPUs of this host, all within reach of this one. Ranks may share a
    GPU, slowly, where torch's own variable allows that: for trying with few GPUs."""
    others = [index for index in range(torch.cuda.device_count()) if index != device.index]
    sharing = os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1"
    most = _MOST_RANKS if sharing else min(_MOST_RANKS, len(others) + 1)
    if not 1 < size <= most:
        return False
    return all(torch.cuda.can_device_access_peer(device, other) for other in others)
