"""Cuts experts' rows into tiles on the device, which alone knows how many rows each expert has.

A fixed number of programs then takes tiles in turn, so that neither the host waits nor empty tiles
cost a launch. Knows nothing of the products. Shape legend: L local experts, T tiles of a program, M
places of a tile or rows of pairs, K experts of a row.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.gpu_tools.dependent_launch import let_successor_start, options, wait_for_predecessor
from core.gpu_tools.tuning import Choice, choose
from core.ops.expert_tiles import ExpertTiles

_TILES_OF_A_PROGRAM = 32
_LARGE_M = 64  # places of tiles that are best for any number of places beyond
_INTERPRETED_PROGRAMS = 4


@triton.jit(
    do_not_specialize=["capacity", "max_tiles"], do_not_specialize_on_alignment=["counts_ptr"]
)
def expert_tiles_kernel(
    counts_ptr,
    tiles_ptr,
    num_experts,
    capacity,
    max_tiles,
    BATCHED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Cut each expert's rows into tiles of BLOCK_M: `tiles` is their number (int32), then for each
    the expert, then its first row, then the end of its expert's rows (`max_tiles` each)."""
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    experts_L = tl.arange(0, BLOCK_L)
    counts_L = tl.load(counts_ptr + experts_L, mask=experts_L < num_experts, other=0).to(tl.int32)
    num_tiles_L = (counts_L + BLOCK_M - 1) // BLOCK_M
    ends_L = tl.cumsum(num_tiles_L, axis=0)
    starts_L = experts_L * capacity if BATCHED else tl.cumsum(counts_L, axis=0) - counts_L
    tiles_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert_T = tl.sum((ends_L[None, :] <= tiles_T[:, None]).to(tl.int32), axis=1)
    owner_TL = experts_L[None, :] == expert_T[:, None]
    first_tile_T = tl.sum(tl.where(owner_TL, (ends_L - num_tiles_L)[None, :], 0), axis=1)
    start_T = tl.sum(tl.where(owner_TL, starts_L[None, :], 0), axis=1)
    count_T = tl.sum(tl.where(owner_TL, counts_L[None, :], 0), axis=1)
    inside_T = tiles_T < max_tiles
    places_T = tiles_ptr + 1 + tiles_T
    tl.store(places_T, expert_T, mask=inside_T)
    tl.store(places_T + max_tiles, start_T + (tiles_T - first_tile_T) * BLOCK_M, mask=inside_T)
    tl.store(places_T + 2 * max_tiles, start_T + count_T, mask=inside_T)
    if tl.program_id(0) == 0:
        tl.store(tiles_ptr, tl.sum(num_tiles_L, axis=0))


@triton.jit
def num_tiles(tiles_ptr, max_tiles, TOP_K: tl.constexpr):
    """That a product goes through; see core.ops.expert_tiles.ExpertTiles."""
    if TOP_K > 0:
        return max_tiles
    else:
        return tl.load(tiles_ptr)


@triton.jit
def tile_at(tiles_ptr, max_tiles, index, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first place, last place, places_M, which of those are the tile's). A pair that is
    not the first of its expert, or has none, is a tile without places; its weights are not read."""
    if TOP_K > 0:
        expert = tl.load(tiles_ptr + index).to(tl.int32)
        choices_K = tl.arange(0, triton.next_power_of_2(TOP_K))
        pairs_MK = tl.arange(0, BLOCK_M)[:, None] * TOP_K + choices_K[None, :]
        exists_MK = (choices_K < TOP_K)[None, :] & (pairs_MK < max_tiles)
        experts_MK = tl.load(tiles_ptr + pairs_MK, mask=exists_MK, other=-1).to(tl.int32)
        mine_MK = (experts_MK == expert) & (expert >= 0)
        first_M = tl.min(tl.where(mine_MK, pairs_MK, max_tiles), axis=1)
        is_first = tl.min(first_M, axis=0) == index
        places_M = tl.where(first_M < max_tiles, first_M, index)  # a row has an expert but once
        return expert, index, index, places_M, (first_M < max_tiles) & is_first
    else:
        tile_ptr = tiles_ptr + 1 + index
        start = tl.load(tile_ptr + max_tiles)
        end = tl.load(tile_ptr + 2 * max_tiles)
        places_M = start + tl.arange(0, BLOCK_M)
        return tl.load(tile_ptr), start, end - 1, places_M, places_M < end


def cut_into_tiles(
    counts_L: Tensor, num_places: int, capacity: int | None, block_M: int
) -> ExpertTiles:
    """Cut the rows of each expert into tiles that no other expert has rows in.

    `counts_L` int64: rows of each expert. `capacity`: places of each expert in the batched layout;
    None: they lie one behind another, in `num_places`.
    """
    num_experts = counts_L.shape[0]
    if capacity is not None:
        max_tiles = num_experts * triton.cdiv(capacity, block_M)
    else:
        max_tiles = most_tiles(num_places, num_experts, block_M)
    tiles = new_tiles(max_tiles, block_M, counts_L.device)
    expert_tiles_kernel[(triton.cdiv(max_tiles, _TILES_OF_A_PROGRAM),)](
        counts_L,
        tiles.tiles,
        num_experts,
        capacity or 0,
        max_tiles,
        BATCHED=capacity is not None,
        BLOCK_M=block_M,
        BLOCK_L=triton.next_power_of_2(num_experts),
        BLOCK_T=_TILES_OF_A_PROGRAM,
        num_warps=4,
        **options(counts_L.device),
    )
    return tiles


def most_tiles(num_places: int, num_experts: int, block_M: int) -> int:
    """That places can be cut into, however they are spread over experts."""
    return min(num_places, (num_places + num_experts * (block_M - 1)) // block_M)


def new_tiles(max_tiles: int, block_M: int, device: torch.device) -> ExpertTiles:
    """For a kernel to fill."""
    tiles = torch.empty(1 + 3 * max_tiles, dtype=torch.int32, device=device)
    return ExpertTiles(tiles, max_tiles, block_M)


def choose_tiles(found: tuple[Choice, ...], num_places: int) -> Choice | None:
    """What was measured for so many places, of what core.gpu_tools.tuning.choices gave. For more,
    what was best for the most of them, if its tiles are as large as those of any more would be."""
    choice = choose(found, num_places)
    if choice is None and found and found[-1]["BLOCK_M"] >= _LARGE_M:
        return found[-1]
    return choice


def usual_block_M(num_places: int, num_experts: int, largest: int) -> int:
    """Places of a tile: those of one expert, if rows are spread evenly."""
    even = triton.cdiv(num_places, num_experts)
    return int(min(max(triton.next_power_of_2(even), 16), largest))


@lru_cache(maxsize=16)
def has_tma(device: torch.device) -> bool:
    """The interpreter plays descriptors too; older processors have none."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache(maxsize=64)  # the driver's answer takes microseconds, and never changes
def num_programs(device: torch.device, of_a_processor: int) -> int:
    """Programs that run at the same time."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * of_a_processor
