"""What the Triton backends need to know of the device they run on.

On CPU tensors their kernels run in Triton's interpreter (TRITON_INTERPRET=1), for tests. Knows
nothing of attention.
"""

from dataclasses import dataclass

import torch
from triton.runtime import driver

# The interpreter has no parallelism; there this number only decides that tests split.
_INTERPRETED_MULTIPROCESSORS = 4


@dataclass(frozen=True, slots=True)
class TritonDevice:
    """A GPU, or the interpreter."""

    interpreted: bool
    num_multiprocessors: int
    shared_bytes: int  # of one program, at most

    def num_stages(self, kept_bytes: int, tile_bytes: int) -> int:
        """How many tiles of keys and values fit shared memory beside what is kept: 1 to 3."""
        return max(1, min(3, (self.shared_bytes - kept_bytes) // tile_bytes))


def describe(device: torch.device) -> TritonDevice:
    """Look the device up; once, when a backend is built."""
    if device.type == "cpu":
        return TritonDevice(True, _INTERPRETED_MULTIPROCESSORS, 0)
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = driver.active.utils.get_device_properties(index)
    return TritonDevice(False, properties["multiprocessor_count"], properties["max_shared_mem"])
