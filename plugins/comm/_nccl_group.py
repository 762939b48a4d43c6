"""What backends over NCCL share: its communicator, and whether it can be had. Makes no groups."""

import torch
from torch.distributed import ProcessGroup, is_nccl_available

from core.errors import ConfigError
from core.parallel.collectives import GroupCommunicator


def require_nccl(backend: str) -> None:
    """Raises ConfigError where this machine or this torch has no NCCL."""
    if not (torch.cuda.is_available() and is_nccl_available()):
        raise ConfigError(
            f"comm.tp={backend} needs a CUDA device and a torch built with NCCL (this one is "
            f"{torch.__version__}, CUDA devices: {torch.cuda.device_count()}); set comm.tp=gloo"
        )


class NcclCommunicator(GroupCommunicator):
    """Ordered on the current stream, and never waited for by the host."""

    capturable = True

    def __init__(self, group: ProcessGroup) -> None:
        """All ranks of the group make theirs at once: NCCL connects here, and not at its first
        collective. There it might wait for a peer's driver, which loads a kernel only when the one
        before has ended, which may be a collective that waits for this rank."""
        super().__init__(group)
        part = torch.zeros(1, device="cuda")
        whole = super().all_gather(part, 0)
        super().reduce_scatter(super().all_reduce(whole))
        torch.cuda.synchronize()
