"""What the host says to a captured step: packed numbers, copied to the device once a step.

Knows nothing of graphs. The copy reads pinned memory after the host went on, so that a step writes
to another block of it than the steps before, and waits only for the one that wrote here last.
Packing: see core.ops.stage.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from core.engine.step.batch import Ints
from core.interfaces.messages import ScheduledStep
from core.ops.stage import HEADER, DecodeRows, PromptRows, packed_length

# One step runs and one waits behind it; the others are there so that nobody ever has to wait.
NUM_BLOCKS = 4

Numbers = npt.NDArray[np.int32]


class _Read(Protocol):
    """When the device has read a block. A CUDA event is one."""

    def record(self) -> None:
        """What was sent until now is meant."""
        ...

    def synchronize(self) -> None:
        """Blocks until that was read."""
        ...


class _AtOnce:
    """A copy on the host is done when the call returns."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _read(device: torch.device) -> _Read:
    if device.type != "cuda":
        return _AtOnce()
    event: _Read = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return event


class _Block:
    """Host memory of one step.

    A step runs this once, long after the one before, when hardly any of its code and data is left
    in the host's caches: every call of torch saved is tens of microseconds.
    """

    __slots__ = ("_array", "_packed", "_read", "_tensor", "_views")

    def __init__(self, packed: torch.Tensor) -> None:
        """`packed` is where it goes."""
        pinned = packed.device.type == "cuda"
        self._packed = packed
        self._tensor = torch.zeros(packed.shape[0], dtype=torch.int32, pin_memory=pinned)
        self._array: Numbers = self._tensor.numpy()  # the same memory
        self._views: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by length: to, from
        self._read = _read(packed.device)

    def array(self, length: int) -> Numbers:
        """To be filled: waits until the device has read what was sent before."""
        self._read.synchronize()
        return self._array[:length]

    def send(self, length: int) -> None:
        """Copy the first numbers; doesn't wait for that."""
        views = self._views.get(length)
        if views is None:
            views = self._views[length] = self._packed[:length], self._tensor[:length]
        views[0].copy_(views[1], non_blocking=True)
        self._read.record()


class StepInput:
    """`packed` is the device's copy, int32; every captured step reads the beginning of it."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.packed = torch.zeros(length, dtype=torch.int32, device=device)
        self._blocks = [_Block(self.packed) for _ in range(NUM_BLOCKS)]
        self._next = 0

    def clear(self) -> None:
        """No row, no new page-table entry."""
        self.packed.zero_()

    def send(self, length: int, fill: Callable[[Numbers], None]) -> None:
        """Have `fill` write the first `length` numbers, and copy them; doesn't wait for that."""
        block = self._blocks[self._next]
        self._next = (self._next + 1) % NUM_BLOCKS
        fill(block.array(length))
        block.send(length)


def send_decodes(
    source: StepInput, scheduled: ScheduledStep, rows: DecodeRows
) -> tuple[Ints, Ints]:
    """Copy a step's rows, and its new page-table entries where they fit; slots and positions of
    its rows. `rows` are those of the size that reads it."""
    size = rows.input_ids_S.shape[0]
    slots = np.array(scheduled.slots, dtype=np.int64)
    positions = np.array(scheduled.starts, dtype=np.int64)
    num_entries = len(scheduled.table_slots) if len(scheduled.table_slots) <= size else 0

    def fill(array: Numbers) -> None:
        array[:HEADER] = len(slots), num_entries
        lists = array[HEADER:].reshape(-1, size)
        lists[0, : len(slots)] = slots
        lists[1, : len(slots)] = positions
        if num_entries:
            lists[2, :num_entries] = scheduled.table_slots
            lists[3, :num_entries] = scheduled.table_columns
            lists[4, :num_entries] = scheduled.table_pages

    source.send(packed_length(size), fill)
    return slots, positions


def send_prompts(
    source: StepInput, scheduled: ScheduledStep, rows: PromptRows
) -> tuple[Ints, Ints]:
    """Copy a step's sequences; slots of them, and the positions after their tokens."""
    slots = np.array(scheduled.slots, dtype=np.int64)
    lengths = np.array(scheduled.lengths, dtype=np.int64)
    contexts = np.array(scheduled.starts, dtype=np.int64) + lengths
    ends = np.cumsum(lengths)
    num_sequences, size = len(slots), rows.num_sequences

    def fill(array: Numbers) -> None:
        array[:] = 0
        num_rows = int(lengths.sum())
        array[:HEADER] = num_rows, num_sequences
        starts = array[HEADER : HEADER + size + 1]
        starts[1 : num_sequences + 1] = ends
        starts[num_sequences + 1 :] = num_rows
        lists = array[HEADER + size + 1 :].reshape(-1, size)
        lists[0, :num_sequences] = slots
        lists[1, :num_sequences] = contexts
        lists[2, :num_sequences] = np.where(scheduled.samples, contexts, -1)

    source.send(rows.packed.shape[0], fill)
    return slots, contexts
