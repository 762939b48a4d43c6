"""The operations of mixtures of experts as Triton kernels: routing, and experts' matrix products.

Nothing here waits for the device: how many rows each expert has stays there. The oracle is
core.kernels.torch_moe. Shape legend: see there; C most rows of an expert in the batched layout.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from core.interfaces.moe_a2a import Dispatched
from core.interfaces.ops import ExpertKernel, ExpertWeights, LinearKernel, Routing
from core.interfaces.weights import BlockFp8, LinearWeight
from core.kernels.block_fp8 import BLOCK, FP8, num_blocks
from core.kernels.torch_moe import matrix_of, plain_rows, stack_experts, write_matrix
from core.kernels.triton_fp8 import quantize_rows
from core.kernels.triton_moe_kernels import (
    expert_tiles_kernel,
    experts_kernel,
    grouped_top_k_kernel,
)

_TILES_OF_A_PROGRAM = 32
_PROGRAMS_OF_A_PROCESSOR = 2
_INTERPRETED_PROCESSORS = 2


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of experts as one matrix, with scales where they are fp8."""

    values_ME: Tensor
    scales: Tensor | None = None
    scale_strides: tuple[int, int, int] = (0, 0, 0)  # by expert (beyond its rows), row, column


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Which rows are whose, on the device (see `expert_tiles_kernel`)."""

    tiles: Tensor
    max_tiles: int
    block_M: int


class TritonExperts:
    """core.interfaces.ops.ExpertKernel: two grouped products, gate and up and silu in the first.

    fp8 weights are multiplied by fp8 rows: those that came so, or that are quantised here.
    """

    def __init__(
        self, experts: Iterable[ExpertWeights], num_experts: int, dtype: torch.dtype
    ) -> None:
        self._gate_up_L2IE, self._down_LEI = gate_up, _ = stack_experts(experts, num_experts)
        self._dtype = dtype
        # The scales of up follow those of gate: a block of both would belong to neither.
        assert isinstance(gate_up, Tensor) or gate_up.values_OI.shape[1] % 256 == 0

    def __call__(self, dispatched: Dispatched) -> Tensor:
        hidden = dispatched.hidden
        out = torch.empty(hidden.shape, dtype=self._dtype, device=hidden.device)
        if hidden.shape[:-1].numel() == 0:
            return out
        tiles = _tiles(dispatched)
        rows = self._rows(dispatched)
        middle = self._multiply(rows, self._gate_up_L2IE, tiles, gated=True)
        self._multiply(middle, self._down_LEI, tiles, gated=False, out=out)
        return out

    def read(self, expert: int) -> tuple[LinearWeight, LinearWeight]:
        return matrix_of(self._gate_up_L2IE, expert), matrix_of(self._down_LEI, expert)

    def write(self, expert: int, gate_up_2IE: LinearWeight, down_EI: LinearWeight) -> None:
        write_matrix(self._gate_up_L2IE, expert, gate_up_2IE)
        write_matrix(self._down_LEI, expert, down_EI)

    def _rows(self, dispatched: Dispatched) -> _Rows:
        """The received rows, in fp8 where the weights are."""
        if not isinstance(self._gate_up_L2IE, BlockFp8):
            return _Rows(plain_rows(dispatched, self._dtype).flatten(0, -2))
        hidden, scales = dispatched.hidden, dispatched.scales
        if scales is None:
            rows_ME = hidden.flatten(0, -2)
            values_ME, scales_MC = quantize_rows(rows_ME.contiguous())
            return _Rows(values_ME, scales_MC, (0, scales_MC.stride(0), scales_MC.stride(1)))
        if scales.dim() == 2:
            strides = (0, scales.stride(0), scales.stride(1))
        else:  # DeepEP lays scales out by columns, so that they are no matrix
            by_expert, by_row, by_column = scales.stride()
            strides = (by_expert - hidden.shape[1] * by_row, by_row, by_column)
        return _Rows(hidden.flatten(0, -2), scales, strides)

    def _multiply(
        self,
        rows: _Rows,
        weight: LinearWeight,
        tiles: _Tiles,
        *,
        gated: bool,
        out: Tensor | None = None,
    ) -> _Rows:
        """One product of every expert; the gated one's result is what the second reads."""
        values, scales = _parts(weight)
        num_outputs, size = values.shape[1] // (2 if gated else 1), values.shape[2]
        num_rows, device = rows.values_ME.shape[0], rows.values_ME.device
        fp8 = isinstance(weight, BlockFp8)
        out_fp8 = gated and isinstance(self._down_LEI, BlockFp8)
        out_scales = None
        if out is None:
            dtype = FP8 if out_fp8 else self._dtype
            out = torch.empty((num_rows, num_outputs), dtype=dtype, device=device)
        if out_fp8:
            shape = (num_rows, num_blocks(num_outputs))
            out_scales = torch.empty(shape, dtype=torch.float32, device=device)
        block_N = BLOCK if fp8 or out_fp8 else 64
        columns = triton.cdiv(num_outputs, block_N)
        programs = min(_num_programs(device), tiles.max_tiles * columns)
        experts_kernel[(programs,)](
            rows.values_ME,
            values if rows.scales is None else rows.scales,
            values,
            values if scales is None else scales,
            out,
            out if out_scales is None else out_scales,
            tiles.tiles,
            tiles.max_tiles,
            rows.values_ME.stride(0),
            *rows.scale_strides,
            SIZE_D=size,
            SIZE_N=num_outputs,
            GATED=gated,
            FP8=fp8,
            # The interpreter's dot takes no bfloat16.
            WIDE=values.dtype is torch.float32 or device.type == "cpu",
            OUT_FP8=out_fp8,
            BLOCK_M=tiles.block_M,
            BLOCK_N=block_N,
            BLOCK_D=BLOCK if fp8 else (64 if values.element_size() == 2 else 32),
            num_warps=8 if tiles.block_M >= 64 and block_N == BLOCK else 4,
            num_stages=3,
        )
        if out_scales is None:
            return _Rows(out)
        return _Rows(out, out_scales, (0, out_scales.stride(0), 1))


class TritonMoeOps:
    """The part of core.interfaces.ops.Ops that mixtures of experts need, on a GPU."""

    def experts(
        self, experts: Iterable[ExpertWeights], num_experts: int, dtype: torch.dtype
    ) -> ExpertKernel:
        """Grouped products with float32 sums; float32 ones are exact."""
        return TritonExperts(experts, num_experts, dtype)

    def gate(self, weight_XE: Tensor) -> LinearKernel:
        """The vendor's GEMM, storing its float32 sums."""
        if weight_XE.device.type != "cuda" or weight_XE.dtype is torch.float32:
            weight_XE = weight_XE.float()
            return lambda x_TE: F.linear(x_TE.float(), weight_XE)
        weight_EX = weight_XE.t()
        return lambda x_TE: torch.mm(x_TE, weight_EX, out_dtype=torch.float32)

    def grouped_top_k(
        self, logits_TX: Tensor, bias_X: Tensor | None, routing: Routing
    ) -> tuple[Tensor, Tensor]:
        """One program a row; of equals the first is chosen."""
        num_rows, num_experts = logits_TX.shape
        device = logits_TX.device
        weights_TK = torch.empty((num_rows, routing.top_k), dtype=torch.float32, device=device)
        ids_TK = torch.empty((num_rows, routing.top_k), dtype=torch.int64, device=device)
        if num_rows == 0:
            return weights_TK, ids_TK
        assert logits_TX.stride(1) == 1
        if routing.scoring == "uniform_random":
            bias_X = None
        group_size = num_experts // routing.num_groups
        grouped_top_k_kernel[(num_rows,)](
            logits_TX,
            logits_TX if bias_X is None else bias_X,
            weights_TK,
            ids_TK,
            logits_TX.stride(0),
            routing.scale,
            GROUP_SIZE=group_size,
            NUM_GROUPS=routing.num_groups,
            NUM_CHOSEN=routing.num_chosen_groups,
            GROUP_TOP=routing.group_top,
            TOP_K=routing.top_k,
            SCORING=routing.scoring,
            NORMALISE=routing.normalise,
            HAS_BIAS=bias_X is not None,
            BLOCK_G=triton.next_power_of_2(routing.num_groups),
            BLOCK_S=triton.next_power_of_2(group_size),
            BLOCK_K=triton.next_power_of_2(routing.top_k),
            num_warps=1,
        )
        return weights_TK, ids_TK


def _tiles(dispatched: Dispatched) -> _Tiles:
    """Cut the rows of each expert into tiles that no other expert has rows in."""
    hidden, counts_L = dispatched.hidden, dispatched.counts_L
    num_experts = counts_L.shape[0]
    batched = hidden.dim() == 3
    num_rows = hidden.shape[:-1].numel()
    # Rows of one expert, if all that may be here are and are spread evenly.
    even = hidden.shape[1] if batched else triton.cdiv(num_rows, num_experts)
    block_M = min(max(triton.next_power_of_2(even), 16), 64)
    if batched:
        max_tiles = num_experts * triton.cdiv(hidden.shape[1], block_M)
    else:
        max_tiles = min(num_rows, (num_rows + num_experts * (block_M - 1)) // block_M)
    tiles = torch.empty(1 + 3 * max_tiles, dtype=torch.int32, device=hidden.device)
    expert_tiles_kernel[(triton.cdiv(max_tiles, _TILES_OF_A_PROGRAM),)](
        counts_L,
        tiles,
        num_experts,
        hidden.shape[1],
        max_tiles,
        BATCHED=batched,
        BLOCK_M=block_M,
        BLOCK_L=triton.next_power_of_2(num_experts),
        BLOCK_T=_TILES_OF_A_PROGRAM,
        num_warps=4,
    )
    return _Tiles(tiles, max_tiles, block_M)


def _parts(weight: LinearWeight) -> tuple[Tensor, Tensor | None]:
    return (weight.values_OI, weight.scales) if isinstance(weight, BlockFp8) else (weight, None)


@lru_cache(maxsize=16)  # the driver's answer takes microseconds, and never changes
def _num_programs(device: torch.device) -> int:
    """Programs that run at the same time."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return int(processors) * _PROGRAMS_OF_A_PROCESSOR
