"""Grouped products of mixtures of experts in bfloat16 and float32: gate and up with silu, and down.

Knows which sorted places belong to which expert (`ExpertTiles`), and not how rows were routed or
how results are summed. Which tile sizes serve which number of pairs is data, in
core/gpu_tools/tuned/moe_bf16.json: one row for both products, as both read the same tiles of rows.
Shape legend: T rows, P places (pairs of row and expert, sorted by expert), L local experts, E
hidden size, I middle size, M places of a tile, N and D columns of a product's result and operands.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from core.devices.cuda.experts.triton_expert_tiles import (
    choose_tiles,
    has_tma,
    num_programs,
    num_tiles,
    tile_at,
    usual_block_M,
)
from core.gpu_tools.dependent_launch import let_successor_start, options, wait_for_predecessor
from core.gpu_tools.tuning import choices
from core.interfaces.moe_a2a import Dispatched
from core.ops.expert_tiles import ExpertRows, ExpertTiles, ProductTile
from core.ops.torch_moe import plain_rows

_TMA_ALIGNMENT = 16  # bytes, of addresses and strides


@triton.jit
def _weights(
    weight,
    row,
    step,
    SIZE_N: tl.constexpr,
    SIZE_D: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    first_N,
):
    """BLOCK_N rows of one matrix that begins at `row`; values past the end do not matter."""
    if TMA:
        weight_ND = weight.load([row + first_N, step])
    else:
        columns_D = step + tl.arange(0, BLOCK_D)
        rows_N = row + (first_N + tl.arange(0, BLOCK_N)) % SIZE_N
        places_ND = rows_N.to(tl.int64)[:, None] * SIZE_D + columns_D[None, :]
        weight_ND = tl.load(weight + places_ND, mask=(columns_D < SIZE_D)[None, :], other=0.0)
    return weight_ND


@triton.jit
def _add_product(total, x_MD, weight_ND, WIDE: tl.constexpr, SWAP: tl.constexpr):
    if WIDE:
        x_MD, weight_ND = x_MD.to(tl.float32), weight_ND.to(tl.float32)
    if SWAP:
        total = tl.dot(weight_ND, x_MD.T, total, input_precision="ieee")
    else:
        total = tl.dot(x_MD, weight_ND.T, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["max_tiles"], do_not_specialize_on_alignment=["tiles_ptr"])
def grouped_product_kernel(
    x_ptr,
    source_ptr,
    weight,
    out_ptr,
    tiles_ptr,
    max_tiles,
    x_stride,
    SIZE_D: tl.constexpr,
    SIZE_N: tl.constexpr,
    GATED: tl.constexpr,
    GATHER: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED_BY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """x @ W.T of each expert's places; with GATED silu(x @ W[:N].T) * (x @ W[N:].T).

    With GATHER place p reads row source[p] of x, else row p // SHARED_BY. With TMA `weight` is a
    descriptor of all experts' rows as one matrix, whose columns past the end read as zero; else a
    pointer.
    """
    EVEN: tl.constexpr = SIZE_D % BLOCK_D == 0
    ROWS: tl.constexpr = 2 * SIZE_N if GATED else SIZE_N
    NUM_COLUMNS: tl.constexpr = (SIZE_N + BLOCK_N - 1) // BLOCK_N
    TOTAL_M: tl.constexpr = BLOCK_N if SWAP else BLOCK_M
    TOTAL_N: tl.constexpr = BLOCK_M if SWAP else BLOCK_N
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    work = num_tiles(tiles_ptr, max_tiles, TOP_K) * NUM_COLUMNS
    columns_D = tl.arange(0, BLOCK_D)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        expert, _, _, places_M, inside_M = tile_at(
            tiles_ptr, max_tiles, item // NUM_COLUMNS, TOP_K, BLOCK_M
        )
        row = expert * ROWS
        rows_M = places_M // SHARED_BY
        if GATHER:
            rows_M = tl.load(source_ptr + places_M, mask=inside_M, other=0)
        x_ptrs = x_ptr + rows_M.to(tl.int64)[:, None] * x_stride + columns_D[None, :]
        first_N = item % NUM_COLUMNS * BLOCK_N
        first = tl.zeros((TOTAL_M, TOTAL_N), tl.float32)
        second = tl.zeros((TOTAL_M, TOTAL_N), tl.float32)
        end_D = SIZE_D
        if TOP_K > 0:
            end_D = tl.where(tl.max(inside_M.to(tl.int32), axis=0) > 0, SIZE_D, 0)
        for step in range(0, end_D, BLOCK_D):
            mask = inside_M[:, None]
            if not EVEN:
                mask = mask & (columns_D < SIZE_D - step)[None, :]
            x_MD = tl.load(x_ptrs + step, mask=mask, other=0.0)
            gate_ND = _weights(weight, row, step, SIZE_N, SIZE_D, TMA, BLOCK_N, BLOCK_D, first_N)
            first = _add_product(first, x_MD, gate_ND, WIDE, SWAP)
            if GATED:
                up_ND = _weights(
                    weight, row + SIZE_N, step, SIZE_N, SIZE_D, TMA, BLOCK_N, BLOCK_D, first_N
                )
                second = _add_product(second, x_MD, up_ND, WIDE, SWAP)
        if GATED:
            first = first / (1.0 + tl.exp(-first)) * second
        out_MN = first.to(out_ptr.dtype.element_ty)
        if SWAP:
            out_MN = out_MN.T
        columns_N = first_N + tl.arange(0, BLOCK_N)
        tl.store(
            out_ptr + places_M.to(tl.int64)[:, None] * SIZE_N + columns_N[None, :],
            out_MN,
            mask=inside_M[:, None] & (columns_N < SIZE_N)[None, :],
        )


class PlainExperts:
    """Both products of all local experts; operands of one dtype, sums in float32.

    A place past its tile's end is neither read nor written. Nothing waits for the device.
    """

    def __init__(self, gate_up_L2IE: Tensor, down_LEI: Tensor, dtype: torch.dtype) -> None:
        assert gate_up_L2IE.is_contiguous()
        assert down_LEI.is_contiguous()
        self._gate_up_L2IE, self._down_LEI, self._dtype = gate_up_L2IE, down_LEI, dtype
        num_experts, size_E, size_I = down_LEI.shape
        self._found = choices(
            "moe_bf16",
            down_LEI.device,
            experts=num_experts,
            hidden=size_E,
            middle=size_I,
            value_bytes=down_LEI.element_size(),
        )

    def block_M(self, num_pairs: int, num_experts: int) -> int:
        """Places of one tile, for at most so many pairs of row and local expert."""
        choice = choose_tiles(self._found, num_pairs)
        if choice is not None:
            return int(choice["BLOCK_M"])
        largest = 128 if self._down_LEI.element_size() == 2 else 64
        return usual_block_M(num_pairs, num_experts, largest)

    def rows(self, dispatched: Dispatched) -> ExpertRows:
        """The received rows, dequantised if they travelled as fp8."""
        rows_PE = plain_rows(dispatched, self._dtype).flatten(0, -2)
        return ExpertRows(rows_PE, None, None, rows_PE.shape[0])

    def operands(self, dispatched: Dispatched) -> tuple[Tensor, None]:
        """Rows as the first product reads them, and their scales."""
        return plain_rows(dispatched, self._dtype), None

    def gate_up(self, rows: ExpertRows, tiles: ExpertTiles) -> ExpertRows:
        """silu(x @ gate.T) * (x @ up.T): (P, I)."""
        values, places = rows.values, rows.num_places
        shape = (places, self._down_LEI.shape[2])
        middle_PI = torch.empty(shape, dtype=values.dtype, device=values.device)
        tile = self._tile(places, tiles.block_M, gated=True)
        multiply(rows, self._gate_up_L2IE, middle_PI, tiles, tile, gated=True)
        return ExpertRows(middle_PI, None, None, places)

    def down(self, middle: ExpertRows, tiles: ExpertTiles, out_PE: Tensor) -> None:
        """middle @ down.T, into `out_PE`."""
        tile = self._tile(middle.num_places, tiles.block_M, gated=False)
        multiply(middle, self._down_LEI, out_PE, tiles, tile, gated=False)

    def _tile(self, num_places: int, block_M: int, *, gated: bool) -> ProductTile:
        choice = choose_tiles(self._found, num_places)
        if choice is not None and choice["BLOCK_M"] == block_M:
            return ProductTile(**choice["gate_up" if gated else "down"])
        return usual_tile(block_M, self._down_LEI.element_size(), gated=gated)


def usual_tile(block_M: int, value_bytes: int, *, gated: bool) -> ProductTile:
    """For shapes and devices that no table speaks of."""
    if value_bytes != 2:
        return ProductTile(32 if gated else 64, 32, 4, 2, programs=2)
    if block_M >= 128:
        return ProductTile(128, 64, 8, 3, programs=1)
    return ProductTile(64, 64, 4, 3, programs=2)


def multiply(
    rows: ExpertRows,
    weight_LND: Tensor,
    out_PN: Tensor,
    tiles: ExpertTiles,
    tile: ProductTile,
    *,
    gated: bool,
) -> None:
    """One product of every expert; with `gated` the weights hold the gate's rows, then up's."""
    num_experts, num_rows, size_D = weight_LND.shape
    size_N = num_rows // 2 if gated else num_rows
    x = rows.values
    assert x.stride(1) == 1
    assert out_PN.is_contiguous()
    assert out_PN.shape[1] == size_N
    if tiles.max_tiles == 0:
        return
    device = x.device
    tma = has_tma(device) and size_D * weight_LND.element_size() % _TMA_ALIGNMENT == 0
    weight: Tensor | TensorDescriptor = weight_LND
    if tma:
        shape, strides = [num_experts * num_rows, size_D], [size_D, 1]
        weight = TensorDescriptor(weight_LND, shape, strides, [tile.block_N, tile.block_D])
    programs = tiles.max_tiles * triton.cdiv(size_N, tile.block_N)
    if tile.programs or device.type != "cuda":
        programs = min(programs, num_programs(device, tile.programs))
    grouped_product_kernel[(programs,)](
        x,
        tiles.tiles if rows.source_P is None else rows.source_P,
        weight,
        out_PN,
        tiles.tiles,
        tiles.max_tiles,
        x.stride(0),
        SIZE_D=size_D,
        SIZE_N=size_N,
        GATED=gated,
        GATHER=rows.source_P is not None,
        TMA=tma,
        # The interpreter's dot takes no bfloat16.
        WIDE=x.dtype is torch.float32 or device.type == "cpu",
        SWAP=tile.swap,
        BLOCK_M=tiles.block_M,
        BLOCK_N=tile.block_N,
        BLOCK_D=tile.block_D,
        TOP_K=tiles.top_k,
        SHARED_BY=rows.shared_by,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **options(device),
    )
