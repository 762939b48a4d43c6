"""The physical experts of the logical experts that a row chose.

Shape legend: X logical experts, C most copies of one expert.
"""

from typing import NamedTuple

from torch import Tensor


class Copies(NamedTuple):
    """The copies of every expert, on the device. Updated in place when experts move."""

    physical_XC: Tensor  # int64: physical ids; -1 past the copies of an expert
    num_copies_X: Tensor  # int64


class Destinations(NamedTuple):
    """Maps the logical experts of the rows of one step to physical experts.

    Row t is padding, which has no expert, if first_row + t >= num_real. Rows use the copies of an
    expert in turn: row t takes copy (first_copy + t) modulo the number of copies.
    """

    copies: Copies
    counts_X: Tensor  # int64: the real rows of each logical expert are added to it
    num_real: Tensor  # int32 (1,), on the device
    first_row: int
    first_copy: int
