"""Where the parts of a rank's buffer lie, into which peers write rows and sums. Knows no device.

Shape legend: R ranks, N rows of a rank at most, E hidden size, K experts of a row, C blocks of 128
columns.
"""

from dataclasses import dataclass

import torch

from core.interfaces.moe_a2a import A2ASpec
from core.ops.block_fp8 import FP8, num_blocks

_ALIGNMENT = 128  # bytes


@dataclass(frozen=True, slots=True)
class PeerLayout:
    """Offsets in bytes of a buffer's parts, the flags first. The same on all ranks."""

    max_rows: int  # N
    row_dtype: torch.dtype  # in which rows travel
    spans: int  # int32 (R, 2): first place and number of each rank's rows
    rows: int  # (R * N, E)
    scales: int  # float32 (R * N, C); of fp8 rows
    ids: int  # int64 (R * N, K)
    weights: int  # float32 (R * N, K)
    sums: int  # (R, N, E): what each rank's experts make of this rank's rows
    num_bytes: int


def layout_of(spec: A2ASpec, max_rows: int, num_programs: int, *, fp8: bool) -> PeerLayout:
    """The parts for so many rows of each rank, written by so many programs of a launch."""
    ranks, dtype = spec.comm.size, FP8 if fp8 else spec.dtype
    places, hidden = ranks * max_rows, spec.hidden_size
    sizes = (
        4 * ranks * num_programs,
        4 * 2 * ranks,
        places * hidden * dtype.itemsize,
        4 * places * num_blocks(hidden) if fp8 else 0,
        8 * places * spec.top_k,
        4 * places * spec.top_k,
        places * hidden * spec.dtype.itemsize,
    )
    offsets = [0]
    for size in sizes:
        offsets.append(-(-(offsets[-1] + size) // _ALIGNMENT) * _ALIGNMENT)
    return PeerLayout(max_rows, dtype, *offsets[1:])


def rows_within(spec: A2ASpec, num_bytes: int, num_programs: int, *, fp8: bool) -> int:
    """How many rows of each rank a buffer of so many bytes holds, at most `spec.max_rows`."""
    fixed = layout_of(spec, 0, num_programs, fp8=fp8).num_bytes
    one = layout_of(spec, 1, num_programs, fp8=fp8).num_bytes - fixed
    most = min((num_bytes - fixed) // max(one, 1), spec.max_rows)
    # Parts are rounded up apart from each other, so that the last rows may not fit.
    while most > 0 and layout_of(spec, most, num_programs, fp8=fp8).num_bytes > num_bytes:
        most -= 1
    return max(most, 0)
