"""Parts of a matrix of bytes that lies in a file, read some rows at a time.

Reads with pread, not through a mapping: mapped pages count as memory of the process, and a part's
columns touch every page of the whole matrix. Knows nothing of tensors' names or of file formats.
"""

import os
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from core.disk.plain_files import open_plain
from core.errors import ModelError

# Columns with at least so many unwanted bytes between two rows are read row by row; below that,
# the disk reads (and the system looks ahead over) what lies between anyway.
MIN_GAP_BYTES = 1 << 16


class RowFile:
    """An open file. Any number of threads may read at once."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = open_plain(path)
        weakref.finalize(self, os.close, self._fd)

    def rows(
        self,
        start: int,
        row_bytes: int,
        num_rows: int,
        columns: tuple[int, int],
        staging: Tensor,
        group: int = 1,
    ) -> Iterator[Tensor]:
        """Bytes `columns` of `num_rows` rows that lie back to back from byte `start` of the file.

        Yields uint8 matrices of some rows each (a multiple of `group`), which lie in `staging`
        (uint8, any size) and are valid until the next one is asked for.
        """
        first, last = columns
        width = last - first
        if width == 0:
            return
        gap = row_bytes - width
        pitch = width if gap >= MIN_GAP_BYTES else row_bytes  # bytes of a row in memory
        if staging.numel() < pitch * group:
            staging = torch.empty(pitch * group, dtype=torch.uint8)
        memory = memoryview(staging.numpy())  # type: ignore[arg-type]  # numpy says it is no buffer
        step = staging.numel() // (pitch * group) * group
        for row in range(0, num_rows, step):
            count = min(step, num_rows - row)
            if pitch == row_bytes:
                self._fill(memory[: count * pitch], start + row * row_bytes)
            else:
                for index in range(count):
                    part = memory[index * pitch : (index + 1) * pitch]
                    self._fill(part, start + (row + index) * row_bytes + first)
            matrix = staging[: count * pitch].view(count, pitch)
            yield matrix if pitch == width else matrix[:, first:last]

    def _fill(self, memory: memoryview, offset: int) -> None:
        """Fill `memory` from a place in the file."""
        done = 0
        while done < len(memory):
            try:
                count = os.preadv(self._fd, [memory[done:]], offset + done)
            except OSError as error:
                raise ModelError(
                    f"can't read {self._path} at byte {offset + done}: {error.strerror}"
                ) from error
            if count == 0:
                raise ModelError(
                    f"{self._path} ends at byte {offset + done}, in the midst of a tensor: it was "
                    "cut off while it was read; fetch the file again"
                )
            done += count
