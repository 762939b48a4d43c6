"""Which kernels a device gets. The only place that decides it.

Each set is imported only when it is chosen: Triton need not be installed to serve on a CPU.
"""

import torch

from core.interfaces.moe_a2a import RowOps
from core.interfaces.ops import Ops
from core.ops.row_ops import TorchRowOps
from core.ops.stage import Staging, TorchStaging


def select_ops(device: torch.device) -> Ops:
    """The fastest operations there are for `device`; called once, when a worker starts.

    On a CPU this also sets how the process reuses freed memory (core.devices.cpu.host_memory).
    """
    if device.type == "cpu":
        from core.devices.cpu.cpu_ops import CpuOps
        from core.devices.cpu.host_memory import keep_freed_memory

        keep_freed_memory()
        return CpuOps()
    from core.devices.cuda.triton_ops import TritonOps

    return TritonOps()


def select_row_ops(device: torch.device) -> RowOps:
    """What is done to rows on their way to experts."""
    if device.type == "cpu":
        return TorchRowOps()
    from core.devices.cuda.experts.triton_row_ops import TritonRowOps

    return TritonRowOps()


def select_staging(device: torch.device) -> Staging:
    """What stages captured decode steps."""
    if device.type == "cpu":
        return TorchStaging()
    from core.devices.cuda.triton_stage import TritonStaging

    return TritonStaging()
