"""Where the experts that a row chose stand.

Shape legend: X logical experts, C most copies of one expert.
"""

from typing import NamedTuple

from torch import Tensor


class Copies(NamedTuple):
    """Where the copies of every expert stand, on the device; written in place when they move."""

    physical_XC: Tensor  # int64; -1 past an expert's copies
    num_copies_X: Tensor  # int64


class Destinations(NamedTuple):
    """Logical experts -> the physical ones of one step's rows.

    Row t is padding, which has no expert, where first_row + t >= num_real. Of an expert's copies
    row t takes number first_copy + t, in turn.
    """

    copies: Copies
    counts_X: Tensor  # int64: real rows of each logical expert are added
    num_real: Tensor  # int32 (1,), on the device
    first_row: int
    first_copy: int
