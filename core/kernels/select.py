"""Which set of operations a device gets. The only place that decides it."""

import torch

from core.interfaces.ops import Ops


def select_ops(device: torch.device) -> Ops:
    """The fastest operations there are for `device`; called once, when a worker starts."""
    from core.kernels.torch_ops import TorchOps

    return TorchOps()
