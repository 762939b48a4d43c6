"""Grouping pairs of a row and an expert by expert, by counting, and cutting the groups into tiles.

Nothing waits for the device, which alone knows how many pairs an expert has. For GPUs; on CPU
tensors the kernels run in Triton's interpreter (TRITON_INTERPRET=1), for tests. The oracle of
grouping is core.ops.moe_permute. Knows nothing of what becomes of places. Shape legend: see
there; P = T * K places, B pairs of one program, Q pairs or blocks looked at in one turn, C pairs of
a chunk, X keys: experts, none, and pairs past the end.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.devices.cuda.experts.triton_expert_tiles import cut_into_tiles, most_tiles, new_tiles
from core.gpu_tools.dependent_launch import let_successor_start, options, wait_for_predecessor
from core.ops.expert_tiles import ExpertTiles
from core.ops.moe_permute import group_rows

_BLOCK = 128  # pairs of one program
_TURN = 16  # blocks whose counts are read at once
_COMPARED = 1024  # pairs that each program compares its own with
_COMPARED_BLOCK = 8  # pairs of one program then
_COUNTED_BY_EACH = 4096  # pairs that every program counts by itself
_CHUNK = 512  # of them at once
MOST_PAIRS = 65536  # every program reads the counts of all blocks: beyond, sort


class Groups(NamedTuple):
    """Pairs sorted by expert."""

    source_P: Tensor  # int64: the row that each place reads; any row past the counted places
    positions_TK: Tensor  # int64: the place of each pair, -1 for none
    tiles: ExpertTiles


@triton.jit
def _keys(experts_ptr, pairs, num_pairs, num_experts, BEYOND: tl.constexpr):
    """The expert of each pair; none is the key behind all experts, and no pair is BEYOND."""
    experts = tl.load(experts_ptr + pairs, mask=pairs < num_pairs, other=0).to(tl.int32)
    keys = tl.where(experts < 0, num_experts, experts)
    return tl.where(pairs < num_pairs, keys, BEYOND)


@triton.jit
def _store_tiles(tiles_ptr, max_tiles, tiles_B, experts_B, places_B, ends_B, is_first_B):
    """Of the pairs that are the first of a tile."""
    tile_ptrs = tiles_ptr + 1 + tiles_B
    tl.store(tile_ptrs, experts_B, mask=is_first_B)
    tl.store(tile_ptrs + max_tiles, places_B, mask=is_first_B)
    tl.store(tile_ptrs + 2 * max_tiles, ends_B, mask=is_first_B)


@triton.jit
def _store_places(
    source_ptr,
    positions_ptr,
    pairs_B,
    places_B,
    keys_B,
    num_pairs,
    num_experts,
    TOP_K: tl.constexpr,
):
    """The row of each place, and the place of each pair; -1 for those that have no expert."""
    inside_B = pairs_B < num_pairs
    tl.store(source_ptr + places_B, (pairs_B // TOP_K).to(tl.int64), mask=inside_B)
    positions_B = tl.where(keys_B < num_experts, places_B, -1)
    tl.store(positions_ptr + pairs_B, positions_B.to(tl.int64), mask=inside_B)


@triton.jit(do_not_specialize=["num_pairs"])
def count_pairs_kernel(
    experts_ptr,
    block_counts_ptr,
    num_pairs,
    num_experts,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Pairs of each key among those of one block."""
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    block = tl.program_id(0)
    pairs_B = block * BLOCK + tl.arange(0, BLOCK)
    keys_B = _keys(experts_ptr, pairs_B, num_pairs, num_experts, KEYS - 1)
    counts_X = tl.histogram(keys_B, KEYS)
    tl.store(block_counts_ptr + block * KEYS + tl.arange(0, KEYS), counts_X)


@triton.jit
def _compared(
    experts_ptr, pairs_B, keys_B, num_pairs, num_experts, KEYS: tl.constexpr, ALL: tl.constexpr
):
    """(pairs of its own key before each pair, those of smaller keys, pairs of each key), of at most
    ALL pairs, each of which is compared with."""
    pairs_A = tl.arange(0, ALL)
    keys_A = _keys(experts_ptr, pairs_A, num_pairs, num_experts, KEYS - 1)
    earlier_BA = (keys_A[None, :] == keys_B[:, None]) & (pairs_A[None, :] < pairs_B[:, None])
    # Both numbers, each less than 2^16, in one sum.
    smaller_BA = (keys_A[None, :] < keys_B[:, None]).to(tl.int32)
    sums_B = tl.sum((smaller_BA << 16) + earlier_BA.to(tl.int32), 1)
    return sums_B & 65535, sums_B >> 16, tl.histogram(keys_A, KEYS)


@triton.jit
def _counted(
    experts_ptr, block_counts_ptr, block, pairs_B, keys_B, num_pairs, num_experts, num_blocks,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, TURN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The same of any number of pairs: those of its own block are compared with, those of others
    counted, CHUNK at once or, without, from what is known of TURN blocks at once."""
    pairs_Q = block * BLOCK + tl.arange(0, BLOCK)
    keys_Q = _keys(experts_ptr, pairs_Q, num_pairs, num_experts, KEYS - 1)
    earlier_BQ = (keys_Q[None, :] == keys_B[:, None]) & (pairs_Q[None, :] < pairs_B[:, None])
    own_ranks_B = tl.sum(earlier_BQ.to(tl.int32), 1)
    counts_X = tl.zeros((KEYS,), tl.int32)
    before_X = tl.zeros((KEYS,), tl.int32)
    if CHUNK > 0:
        for first in range(0, num_pairs, CHUNK):
            pairs_C = first + tl.arange(0, CHUNK)
            keys_C = _keys(experts_ptr, pairs_C, num_pairs, num_experts, KEYS - 1)
            counts_X += tl.histogram(keys_C, KEYS)
            if first < block * BLOCK:
                keys_C = tl.where(pairs_C < block * BLOCK, keys_C, KEYS - 1)
                before_X += tl.histogram(keys_C, KEYS)
    else:
        for first in range(0, num_blocks, TURN):
            blocks_Q = first + tl.arange(0, TURN)
            offsets_QX = blocks_Q[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
            inside_QX = (blocks_Q < num_blocks)[:, None]
            counts_QX = tl.load(block_counts_ptr + offsets_QX, mask=inside_QX, other=0)
            counts_X += tl.sum(counts_QX, 0)
            before_X += tl.sum(tl.where((blocks_Q < block)[:, None], counts_QX, 0), 0)
    starts_X = tl.cumsum(counts_X, 0) - counts_X
    ranks_B = tl.gather(before_X, keys_B, 0) + own_ranks_B
    return ranks_B, tl.gather(starts_X, keys_B, 0), counts_X


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "max_tiles"])
def place_pairs_kernel(
    experts_ptr,
    block_counts_ptr,
    source_ptr,
    positions_ptr,
    counts_ptr,
    tiles_ptr,
    num_pairs,
    num_experts,
    num_blocks,
    max_tiles,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    TURN: tl.constexpr,
    CHUNK: tl.constexpr,
    ALL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A pair's place is the number of pairs before it: those of smaller keys, and the earlier ones
    of its own; ALL > 0: of at most so many. With BLOCK_M places are cut into tiles too."""
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    block = tl.program_id(0)
    # Read before anything is counted, as loads are not moved past each other.
    pairs_B = block * BLOCK + tl.arange(0, BLOCK)
    keys_B = _keys(experts_ptr, pairs_B, num_pairs, num_experts, KEYS - 1)
    keys_X = tl.arange(0, KEYS)
    if ALL > 0:
        ranks_B, starts_B, counts_X = _compared(
            experts_ptr, pairs_B, keys_B, num_pairs, num_experts, KEYS, ALL
        )
    else:
        ranks_B, starts_B, counts_X = _counted(
            experts_ptr, block_counts_ptr, block, pairs_B, keys_B, num_pairs, num_experts,
            num_blocks, BLOCK, KEYS, TURN, CHUNK,
        )  # fmt: skip
    places_B = starts_B + ranks_B
    _store_places(
        source_ptr, positions_ptr, pairs_B, places_B, keys_B, num_pairs, num_experts, TOP_K
    )
    if block == 0:
        tl.store(counts_ptr + keys_X, counts_X.to(tl.int64), mask=keys_X < num_experts)
    if BLOCK_M > 0:
        tiles_X = tl.where(keys_X < num_experts, (counts_X + BLOCK_M - 1) // BLOCK_M, 0)
        ends_B = starts_B + tl.gather(counts_X, keys_B, 0)
        tiles_B = tl.gather(tl.cumsum(tiles_X, 0) - tiles_X, keys_B, 0) + ranks_B // BLOCK_M
        is_first_B = (ranks_B % BLOCK_M == 0) & (keys_B < num_experts)
        _store_tiles(tiles_ptr, max_tiles, tiles_B, keys_B, places_B, ends_B, is_first_B)
        if block == 0:
            tl.store(tiles_ptr, tl.sum(tiles_X, 0))


def group_pairs(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(source (P,), counts_L, positions_TK) of at most `MOST_PAIRS` pairs, of which there is at
    least one; see core.ops.moe_permute.group_rows."""
    return _place(experts_TK, num_experts, None)


def group_into_tiles(experts_TK: Tensor, num_experts: int, block_M: int) -> Groups:
    """Group pairs, of which there is at least one, and cut the groups into tiles of `block_M`."""
    num_pairs, device = experts_TK.numel(), experts_TK.device
    if num_pairs > MOST_PAIRS:
        grouping = group_rows(experts_TK, num_experts)
        tiles = cut_into_tiles(grouping.counts_L, num_pairs, None, block_M)
        return Groups(grouping.source, grouping.positions_TK, tiles)
    tiles = new_tiles(most_tiles(num_pairs, num_experts, block_M), block_M, device)
    source_P, _, positions_TK = _place(experts_TK, num_experts, tiles)
    return Groups(source_P, positions_TK, tiles)


def _place(
    experts_TK: Tensor, num_experts: int, tiles: ExpertTiles | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(source (P,), counts_L, positions_TK); fills the tiles."""
    experts_TK = experts_TK.contiguous()
    num_pairs, device = experts_TK.numel(), experts_TK.device
    source_P = torch.empty(num_pairs, dtype=torch.int64, device=device)
    counts_L = torch.empty(num_experts, dtype=torch.int64, device=device)
    positions_TK = torch.empty_like(experts_TK)
    compares = num_pairs <= _COMPARED
    block = _COMPARED_BLOCK if compares else _BLOCK
    num_blocks = triton.cdiv(num_pairs, block)
    num_keys = triton.next_power_of_2(num_experts + 2)
    block_counts, chunk = counts_L, _CHUNK
    if num_pairs > _COUNTED_BY_EACH:
        block_counts, chunk = _counts_of_blocks(experts_TK, num_experts, num_blocks, num_keys), 0
    place_pairs_kernel[(num_blocks,)](
        experts_TK,
        block_counts,
        source_P,
        positions_TK,
        counts_L,
        counts_L if tiles is None else tiles.tiles,
        num_pairs,
        num_experts,
        num_blocks,
        0 if tiles is None else tiles.max_tiles,
        TOP_K=experts_TK.shape[1],
        BLOCK_M=0 if tiles is None else tiles.block_M,
        BLOCK=block,
        KEYS=num_keys,
        TURN=_TURN,
        CHUNK=chunk,
        ALL=max(block, triton.next_power_of_2(num_pairs)) if compares else 0,
        num_warps=8,
        **options(device),
    )
    return source_P, counts_L, positions_TK


def _counts_of_blocks(
    experts_TK: Tensor, num_experts: int, num_blocks: int, num_keys: int
) -> Tensor:
    shape = (num_blocks, num_keys)
    block_counts = torch.empty(shape, dtype=torch.int32, device=experts_TK.device)
    count_pairs_kernel[(num_blocks,)](
        experts_TK,
        block_counts,
        experts_TK.numel(),
        num_experts,
        BLOCK=_BLOCK,
        KEYS=num_keys,
        num_warps=4,
        **options(experts_TK.device),
    )
    return block_counts
