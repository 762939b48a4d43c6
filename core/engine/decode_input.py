"""What the host says to a captured decode step: packed numbers, copied to the device once a step.

Knows nothing of graphs. The copy reads pinned memory after the host went on, so that a step writes
to another block of it than the steps before, and waits only for the one that wrote here last.
Packing: see core.kernels.stage.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from core.engine.batch import Ints
from core.interfaces.messages import StepPlan
from core.kernels.stage import HEADER, DecodeRows, packed_length

# One step runs and one waits behind it; the others are there so that nobody ever has to wait.
NUM_BLOCKS = 4


@dataclass(slots=True)
class _Block:
    """Host memory of one step. `wait` returns when the device has read it."""

    tensor: torch.Tensor
    array: npt.NDArray[np.int32]  # the same memory
    wait: Callable[[], None]


def _nobody_reads() -> None:
    """A block that was never sent."""


class DecodeInput:
    """`packed` is the device's copy, int32; every captured step reads the beginning of it."""

    def __init__(self, most_rows: int, device: torch.device) -> None:
        length = packed_length(most_rows)
        self._device = device
        self.packed = torch.zeros(length, dtype=torch.int32, device=device)
        self._blocks = [self._block(length) for _ in range(NUM_BLOCKS)]
        self._next = 0

    def clear(self) -> None:
        """No row, no new page-table entry."""
        self.packed.zero_()

    def send(self, plan: StepPlan, rows: DecodeRows) -> tuple[Ints, Ints]:
        """Copy a plan's rows, and its new page-table entries where they fit; slots and positions
        of its rows. `rows` are those of the size that reads it."""
        size = rows.input_ids_S.shape[0]
        block = self._blocks[self._next]
        self._next = (self._next + 1) % NUM_BLOCKS
        block.wait()
        slots = np.array(plan.slots, dtype=np.int64)
        positions = np.array(plan.starts, dtype=np.int64)
        num_entries = len(plan.table_slots) if len(plan.table_slots) <= size else 0
        array = block.array
        array[:HEADER] = len(slots), num_entries
        lists = array[HEADER : packed_length(size)].reshape(-1, size)
        lists[0, : len(slots)] = slots
        lists[1, : len(slots)] = positions
        if num_entries:
            lists[2, :num_entries] = plan.table_slots
            lists[3, :num_entries] = plan.table_columns
            lists[4, :num_entries] = plan.table_pages
        rows.packed.copy_(block.tensor[: rows.packed.shape[0]], non_blocking=True)
        block.wait = self._when_read()
        return slots, positions

    def _block(self, length: int) -> _Block:
        pinned = self._device.type == "cuda"
        tensor = torch.zeros(length, dtype=torch.int32, pin_memory=pinned)
        return _Block(tensor, tensor.numpy(), _nobody_reads)

    def _when_read(self) -> Callable[[], None]:
        if self._device.type != "cuda":
            return _nobody_reads  # copied already
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        wait: Callable[[], None] = event.synchronize
        return wait
