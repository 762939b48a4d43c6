"""NCCL: collectives of CUDA tensors, ordered on the current stream. Makes no groups."""

import torch
from torch.distributed import ProcessGroup, is_nccl_available

from core.errors import ConfigError
from core.hookspecs import NoOptions
from core.interfaces.comm import Communicator
from core.parallel.collectives import GroupCommunicator


class NcclBackend:
    """The factory behind comm=nccl."""

    torch_backend = "nccl"

    def __init__(self, options: NoOptions, name: str = "nccl") -> None:
        """Raises ConfigError where this machine or this torch has no NCCL."""
        if not (torch.cuda.is_available() and is_nccl_available()):
            raise ConfigError(
                f"comm.tp={name} needs a CUDA device and a torch built with NCCL (this one is "
                f"{torch.__version__}, CUDA devices: {torch.cuda.device_count()}); set comm.tp=gloo"
            )

    def communicator(self, group: object) -> Communicator:
        """Wrap an NCCL group that this rank belongs to; collectives return before they ran."""
        assert isinstance(group, ProcessGroup)
        return NcclCommunicator(group)


class NcclCommunicator(GroupCommunicator):
    """Ordered on the current stream, and never waited for by the host."""

    capturable = True
