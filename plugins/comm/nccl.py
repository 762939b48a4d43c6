"""NCCL: collectives of CUDA tensors, ordered on the current stream. Makes no groups."""

from torch.distributed import ProcessGroup

from core.interfaces.comm import Communicator
from core.plugin.hookspecs import NoOptions
from plugins.comm._nccl_group import NcclCommunicator, require_nccl


class NcclBackend:
    """The factory behind comm=nccl."""

    torch_backend = "nccl"

    def __init__(self, options: NoOptions) -> None:
        """Raises ConfigError where this machine or this torch has no NCCL."""
        require_nccl("nccl")

    def communicator(self, group: object) -> Communicator:
        """Wrap an NCCL group that this rank belongs to; collectives return before they ran."""
        assert isinstance(group, ProcessGroup)
        return NcclCommunicator(group)
