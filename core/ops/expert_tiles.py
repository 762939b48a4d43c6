"""What the grouped products of a mixture of experts read: rows, and tiles of places.

A place is a position in the order sorted by expert; of few rows pairs of row and expert stay in
theirs. Only data: knows no kernel, no layout of the network and no weights. Shape legend: T rows, E
hidden size, P places, K experts of a row.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertTiles:
    """Which places belong to which expert, on the device."""

    # int32 (1 + 3 * max_tiles,): how many, then (expert, first place, end place); with `top_k`
    # int64 (T, K): the expert of each pair, or -1 for none.
    tiles: Tensor
    max_tiles: int  # the host's bound of the grid
    block_M: int  # places of one tile
    # K where places are pairs, of at most block_M rows: the first pair of an expert is the tile of
    # all of its pairs. 0: places are sorted.
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """What the first product reads. Places past the counted ones may be read, and don't matter."""

    values: Tensor  # (T, E): bfloat16, float32, or fp8 with
    # float32 (T, E / 128), or (L, C, E / 128) in the batched layout, of any strides
    scales: Tensor | None
    source_P: Tensor | None  # int: the row of each place; None: place p reads row p // shared_by
    num_places: int  # P, the host's bound
    shared_by: int = 1  # places that read the same row, one behind another


@dataclass(frozen=True, slots=True)
class ProductTile:
    """How one product is cut: `block_N` x `block_D` of weights a step."""

    block_N: int
    block_D: int
    num_warps: int
    num_stages: int
    swap: bool = False  # weights are the left operand: full-width instructions for few rows
    programs: int = 0  # of each processor, taking tiles in turn; 0: one program for each tile
