"""The operations of mixtures of experts on a GPU: routing, and experts' matrix products.

Nothing here waits for the device: how many rows each expert has stays there. The oracle is
core.ops.torch_moe. Shape legend: see there.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from core.devices.cuda.experts.triton_expert_tiles import cut_into_tiles
from core.devices.cuda.experts.triton_moe_bf16 import PlainExperts
from core.devices.cuda.experts.triton_moe_fp8 import Fp8Experts
from core.devices.cuda.experts.triton_moe_groups import group_into_tiles
from core.devices.cuda.experts.triton_moe_kernels import choose_experts_kernel
from core.devices.cuda.experts.triton_moe_permute import sum_results
from core.devices.cuda.linear.triton_linear import linear
from core.gpu_tools.dependent_launch import options
from core.gpu_tools.side_stream import SideStream
from core.interfaces.moe_a2a import Dispatched, Routes
from core.interfaces.ops import (
    Destinations,
    ExpertKernel,
    ExpertWeights,
    LinearKernel,
    Routing,
)
from core.interfaces.weights import BlockFp8, ExpertWeight
from core.ops.expert_tiles import ExpertRows, ExpertTiles
from core.ops.torch_moe import experts_of, matrix_of, stack_experts, write_matrix

_MOST_ROWS_BESIDE = 256  # beyond, products alone keep every processor busy
_MOST_ROWS_IN_ORDER = 16  # whose pairs each program looks through, instead of a launch that sorts


class TritonExperts:
    """core.interfaces.ops.ExpertKernel: two grouped products, gate and up and silu in the first.

    fp8 weights are multiplied by fp8 rows: those that came so, or that are quantised here.
    """

    def __init__(
        self, experts: Iterable[ExpertWeights], num_experts: int, dtype: torch.dtype
    ) -> None:
        self._gate_up_L2IE, self._down_LEI = stack_experts(experts, num_experts)
        self._dtype = dtype
        self._products = _products(self._gate_up_L2IE, self._down_LEI, dtype)

    def __call__(self, dispatched: Dispatched) -> Tensor:
        if dispatched.routes is not None:
            return self._sums(dispatched, dispatched.routes)
        hidden, counts_L = dispatched.hidden, dispatched.counts_L
        num_places = hidden.shape[:-1].numel()
        if num_places == 0:
            return torch.empty(hidden.shape, dtype=self._dtype, device=hidden.device)
        block_M = self._products.block_M(num_places, counts_L.shape[0])
        capacity = hidden.shape[1] if hidden.dim() == 3 else None
        tiles = cut_into_tiles(counts_L, num_places, capacity, block_M)
        return self._results(self._products.rows(dispatched), tiles).view(hidden.shape)

    def _sums(self, dispatched: Dispatched, routes: Routes) -> Tensor:
        """Of rows that lie as they came: products read each where it is."""
        x_TE = dispatched.hidden
        out_TE = torch.empty(x_TE.shape, dtype=self._dtype, device=x_TE.device)
        if routes.experts_TK.numel() == 0:
            return out_TE
        num_experts = experts_of(self._down_LEI)
        num_pairs, top_k = routes.experts_TK.numel(), routes.experts_TK.shape[1]
        block_M = self._products.block_M(num_pairs, num_experts)
        values, scales = self._products.operands(dispatched)
        if x_TE.shape[0] <= min(block_M, _MOST_ROWS_IN_ORDER):
            experts_TK = routes.experts_TK.contiguous()
            tiles = ExpertTiles(experts_TK, num_pairs, block_M, top_k)
            results_PE = self._results(ExpertRows(values, scales, None, num_pairs, top_k), tiles)
            return sum_results(results_PE, experts_TK, routes.weights_TK, out_TE, in_order=True)
        groups = group_into_tiles(routes.experts_TK, num_experts, block_M)
        rows = ExpertRows(values, scales, groups.source_P, num_pairs)
        results_PE = self._results(rows, groups.tiles)
        return sum_results(results_PE, groups.positions_TK, routes.weights_TK, out_TE)

    def _results(self, rows: ExpertRows, tiles: ExpertTiles) -> Tensor:
        """(P, E): what each place becomes."""
        shape = (rows.num_places, rows.values.shape[1])
        out_PE = torch.empty(shape, dtype=self._dtype, device=rows.values.device)
        self._products.down(self._products.gate_up(rows, tiles), tiles, out_PE)
        return out_PE

    def read(self, expert: int) -> tuple[ExpertWeight, ExpertWeight]:
        return matrix_of(self._gate_up_L2IE, expert), matrix_of(self._down_LEI, expert)

    def write(self, expert: int, gate_up_2IE: ExpertWeight, down_EI: ExpertWeight) -> None:
        write_matrix(self._gate_up_L2IE, expert, gate_up_2IE)
        write_matrix(self._down_LEI, expert, down_EI)


def _products(
    gate_up_L2IE: ExpertWeight, down_LEI: ExpertWeight, dtype: torch.dtype
) -> PlainExperts | Fp8Experts:
    if isinstance(gate_up_L2IE, BlockFp8):
        assert isinstance(down_LEI, BlockFp8)
        return Fp8Experts(gate_up_L2IE, down_LEI)
    assert isinstance(down_LEI, Tensor)
    return PlainExperts(gate_up_L2IE, down_LEI, dtype)


class TritonMoeOps:
    """The part of core.interfaces.ops.Ops that mixtures of experts need, on a GPU."""

    _side: SideStream | None = None  # of the one device that all calls are for

    def experts(
        self, experts: Iterable[ExpertWeights], num_experts: int, dtype: torch.dtype
    ) -> ExpertKernel:
        """Grouped products with float32 sums; float32 ones are exact."""
        return TritonExperts(experts, num_experts, dtype)

    def beside(self, work: LinearKernel, x_TE: Tensor) -> Callable[[], Tensor]:
        """On a second stream where rows are few; many keep the whole device busy."""
        if x_TE.device.type != "cuda" or x_TE.shape[0] > _MOST_ROWS_BESIDE:
            result = work(x_TE)
            return lambda: result
        if self._side is None:
            self._side = SideStream(x_TE.device)
        return self._side.begin(work, x_TE)

    def gate(self, weight_XE: Tensor) -> LinearKernel:
        """Kernels that stream the weight for few rows; else the vendor's GEMM. Both store their
        float32 sums."""
        if weight_XE.device.type != "cuda" or weight_XE.dtype is torch.float32:
            weight_XE = weight_XE.float()
            return lambda x_TE: F.linear(x_TE.float(), weight_XE)
        weight_EX = weight_XE.t()

        def vendor(x_TE: Tensor) -> Tensor:
            return torch.mm(x_TE, weight_EX, out_dtype=torch.float32)

        return linear("gate", weight_XE, None, vendor, dtype=torch.float32)

    def grouped_top_k(
        self, logits_TX: Tensor, bias_X: Tensor | None, routing: Routing
    ) -> tuple[Tensor, Tensor]:
        """One program a row; of equals the first is chosen."""
        return _choose_experts(logits_TX, bias_X, routing, None)

    def route(
        self, logits_TX: Tensor, bias_X: Tensor | None, routing: Routing, to: Destinations
    ) -> tuple[Tensor, Tensor]:
        """In the same launch."""
        return _choose_experts(logits_TX, bias_X, routing, to)


def _choose_experts(
    logits_TX: Tensor, bias_X: Tensor | None, routing: Routing, to: Destinations | None
) -> tuple[Tensor, Tensor]:
    """Weights, and ids: physical ones where `to` says where experts stand."""
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
    tensors = (ids_TK,) * 4 if to is None else (*to.copies, to.counts_X, to.num_real)
    choose_experts_kernel[(num_rows,)](
        logits_TX,
        logits_TX if bias_X is None else bias_X,
        weights_TK,
        ids_TK,
        *tensors,
        logits_TX.stride(0),
        routing.scale,
        0 if to is None else to.first_row,
        0 if to is None else to.first_copy,
        MOST_COPIES=0 if to is None else to.copies.physical_XC.shape[1],
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
        BLOCK_K=max(2, triton.next_power_of_2(routing.top_k)),
        num_warps=1,
        **options(device),
    )
    return weights_TK, ids_TK
