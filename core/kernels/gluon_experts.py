"""Mixtures of experts for few rows on Hopper, as one stream of weights, in Gluon: bfloat16.

With a row or two to each expert, time is what reading weights takes, and every launch interrupts
the reading. So one launch does both products and the sums. Work is a list of items, 64 rows of one
weight each, those of all first products before those of the second ones; programs draw the next
item when they asked for all of the last one. A warp of every program brings weights in by the copy
engine, as far ahead as there is room, and waits for nothing but room. A warpgroup multiplies each
tile, as the left operand, by every row of the batch at once, and keeps the results of the rows that
chose the expert. It takes up an expert's second product once all of its first was counted, and
whoever counts the last result of some columns sums them. Sums are float32; results are rounded
between, as in the other kernels.

Knows nothing of which kernel suits how many rows (core.kernels.triton_moe_bf16). Imported only
where a Hopper GPU is: Gluon kernels run in no interpreter. Shape legend: T rows, K choices of a
row, P pairs of both, L local experts, E hidden size, I middle size, N places of rows, W rows of a
weight's tile, D inputs of a copy, X experts' numbers in registers, C columns of the result.
"""

# Kernels are written in Gluon, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from core.kernels.dependent_launch import options
from core.kernels.gluon_common import (
    let_successor_start,
    release,
    wait_for_predecessor,
    warps_barrier,
)

WEIGHT_ROWS = 64  # of a tile; in the first product 32 of the gate, and what it multiplies
INPUTS = 64  # of a copy
COPIES = 2  # of a step
PLACES = (8, 16)  # that the kernel is made for, of at most so many rows
_STEP_BYTES = WEIGHT_ROWS * INPUTS * COPIES * 2
_SHARED_BYTES = 224 * 1024  # of a multiprocessor, less what barriers and small sums take
_LEAST_STAGES = 6  # or too little is on its way

_W = gl.constexpr(WEIGHT_ROWS)
_D = gl.constexpr(INPUTS)
_COPIES = gl.constexpr(COPIES)
WEIGHT_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
ROWS_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_WEIGHT_SHARED = gl.constexpr(WEIGHT_SHARED)
_ROWS_SHARED = gl.constexpr(ROWS_SHARED)
_RESULTS = gl.constexpr(gl.BlockedLayout([8, 1], [4, 8], [1, 4], [0, 1]))  # (W, N)
_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [2, 2], [1, 0]))  # (N, D)


@gluon.jit
def _add(first, second):
    return first + second


@gluon.jit
def _turns(experts_ptr, num_pairs, P: gl.constexpr, X: gl.constexpr, WARPS: gl.constexpr):
    """(of each expert its turn among those that some pair chose, or -1; how many those are)."""
    layout: gl.constexpr = gl.BlockedLayout([P, X // (32 * WARPS)], [1, 32], [1, WARPS], [0, 1])
    pairs_P = gl.arange(0, P, layout=gl.SliceLayout(1, layout))
    experts_X = gl.arange(0, X, layout=gl.SliceLayout(0, layout))
    chosen_P = gl.load(experts_ptr + pairs_P, mask=pairs_P < num_pairs, other=-1).to(gl.int32)
    is_chosen_X = gl.max((chosen_P[:, None] == experts_X[None, :]).to(gl.int32), axis=0)
    line: gl.constexpr = gl.BlockedLayout([X // (32 * WARPS)], [32], [WARPS], [0])
    is_chosen_X = gl.convert_layout(is_chosen_X, line)
    ends_X = gl.associative_scan(is_chosen_X, 0, _add)
    return gl.where(is_chosen_X > 0, ends_X - 1, -1), gl.sum(is_chosen_X, axis=0)


@gluon.jit
def _expert_of(turn, turns_X, X: gl.constexpr):
    experts_X = gl.arange(0, X, layout=turns_X.type.layout)
    return gl.max(gl.where(turns_X == turn, experts_X, 0), axis=0)


@gluon.jit
def _announce(item, items_S, place):
    """Say which item a step begins; the barrier of the step makes it known."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    items_S.index(place).store(gl.full([1], item, gl.int32, layout))
    warps_barrier()


@gluon.jit
def _copy_steps(
    blocks, row, num_steps: gl.constexpr, item, count, weight, items_S, full_S, free_S,
    STAGES: gl.constexpr,
):  # fmt: skip
    """All columns of 64 rows of a weight; the number of steps so far."""
    for step in range(num_steps):
        place = count % STAGES
        mbarrier.wait(free_S.index(place), (count // STAGES & 1) ^ 1)
        if step == 0:
            _announce(item, items_S, place)
        full = full_S.index(place)
        mbarrier.expect(full, 2 * _COPIES * _W * _D)
        for copy in gl.static_range(_COPIES):
            column = (step * _COPIES + copy) * _D
            tma.async_copy_global_to_shared(
                blocks, [row, 0, 0, column], full, weight.index(place * _COPIES + copy)
            )
        count += 1
    return count


@gluon.jit
def _copy_weights(
    x_blocks, gate_up_blocks, down_blocks, experts_ptr, progress_ptr, num_pairs, x, weight, items_S,
    x_full, full_S, free_S, P: gl.constexpr, L: gl.constexpr, X: gl.constexpr,
    SIZE_E: gl.constexpr, SIZE_I: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What this program reads, in the order in which it is read; behind the last item -1."""
    FIRST: gl.constexpr = 2 * SIZE_I // _W
    SECOND: gl.constexpr = SIZE_E // _W
    mbarrier.expect(x_full, 2 * N * SIZE_E)
    for index in gl.static_range(SIZE_E // _D):
        tma.async_copy_global_to_shared(x_blocks, [0, index * _D], x_full, x.index(index))
    turns_X, num_chosen = _turns(experts_ptr, num_pairs, P, X, 1)
    num_first = num_chosen * FIRST
    num_items = num_first + num_chosen * SECOND
    drawn_ptr = progress_ptr + L + SECOND
    count = 0  # of steps so far: buffers take turns
    item = gl.program_id(0)
    while item < num_items:
        if item < num_first:
            row = _expert_of(item // FIRST, turns_X, X) * (2 * SIZE_I // 8)
            row += item % FIRST * (_W // 16)
            count = _copy_steps(
                gate_up_blocks, row, SIZE_E // (_COPIES * _D), item, count, weight, items_S, full_S,
                free_S, STAGES,
            )  # fmt: skip
        else:
            left = item - num_first
            row = _expert_of(left // SECOND, turns_X, X) * (SIZE_E // 16)
            row += left % SECOND * (_W // 16)
            count = _copy_steps(
                down_blocks, row, SIZE_I // (_COPIES * _D), item, count, weight, items_S, full_S,
                free_S, STAGES,
            )  # fmt: skip
        drawn = gl.atomic_add(drawn_ptr, 1, sem="relaxed")
        if drawn == num_items - 1:  # one for each item: nobody draws after this
            gl.atomic_xchg(drawn_ptr, 0, sem="relaxed")
        item = gl.num_programs(0) + drawn
    place = count % STAGES
    mbarrier.wait(free_S.index(place), (count // STAGES & 1) ^ 1)
    _announce(-1, items_S, place)
    mbarrier.arrive(full_S.index(place), count=1)


@gluon.jit
def _multiply_steps(
    rows, num_steps: gl.constexpr, count, weight, full_S, free_S, N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """(64, N): 64 rows of a weight times all `rows`; the number of steps so far."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16]
    )
    sums_WN = gl.zeros([_W, N], gl.float32, layout)
    for step in range(num_steps):
        place = count % STAGES
        mbarrier.wait(full_S.index(place), count // STAGES & 1)
        for copy in gl.static_range(_COPIES):
            weight_WD = weight.index(place * _COPIES + copy).reshape([_W, _D])
            rows_DN = rows.index(step * _COPIES + copy).permute((1, 0))
            sums_WN = warpgroup_mma(weight_WD, rows_DN, sums_WN, is_async=True)
        sums_WN = warpgroup_mma_wait(0, deps=[sums_WN])
        release(free_S.index(place))
        count += 1
    return sums_WN, count


@gluon.jit
def _pairs_of(expert, chosen_NK, pairs_NK, layout: gl.constexpr):
    """(N,): the pair by which each row chose an expert, or -1."""
    return gl.convert_layout(gl.max(gl.where(chosen_NK == expert, pairs_NK, -1), axis=1), layout)


@gluon.jit
def _sum_columns(
    block, experts_ptr, weights_ptr, results_ptr, out_ptr, num_rows, K: gl.constexpr,
    SIZE_E: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """The weighted sum of 64 columns of all rows' results."""
    rows_N = gl.arange(0, N, layout=gl.SliceLayout(1, _ROWS))
    columns_C = block * _W + gl.arange(0, _W, layout=gl.SliceLayout(0, _ROWS))
    sums_NC = gl.zeros([N, _W], gl.float32, _ROWS)
    for choice in gl.static_range(K):
        pairs_N = rows_N * K + choice
        chosen_N = gl.load(experts_ptr + pairs_N, mask=rows_N < num_rows, other=-1) >= 0
        weights_N = gl.load(weights_ptr + pairs_N, mask=chosen_N, other=0.0)
        places_NC = pairs_N.to(gl.int64)[:, None] * SIZE_E + columns_C[None, :]
        results_NC = gl.load(results_ptr + places_NC, mask=chosen_N[:, None], other=0.0)
        sums_NC += weights_N[:, None] * results_NC.to(gl.float32)
    places_NC = rows_N.to(gl.int64)[:, None] * SIZE_E + columns_C[None, :]
    gl.store(out_ptr + places_NC, sums_NC.to(gl.bfloat16), mask=(rows_N < num_rows)[:, None])


@gluon.jit
def _first_product(
    item, expert, chosen_NK, pairs_NK, middle_ptr, progress_ptr, x, count, weight, full_S, free_S,
    SIZE_E: gl.constexpr, SIZE_I: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """32 columns of silu(x @ gate.T) * (x @ up.T) for the expert's rows."""
    sums_WN, count = _multiply_steps(
        x, SIZE_E // (_COPIES * _D), count, weight, full_S, free_S, N, STAGES
    )
    halves = sums_WN.reshape([_W // 16, 2, 8, N]).permute((0, 2, 3, 1))
    gate, up = gl.split(halves)
    result = (gate / (1.0 + gl.exp(-gate)) * up).to(gl.bfloat16).reshape([_W // 2, N])
    pairs_N = _pairs_of(expert, chosen_NK, pairs_NK, gl.SliceLayout(0, _RESULTS))
    first_column = item % (2 * SIZE_I // _W) * (_W // 2)
    columns_W = first_column + gl.arange(0, _W // 2, layout=gl.SliceLayout(1, _RESULTS))
    gl.store(
        middle_ptr + pairs_N.to(gl.int64)[None, :] * SIZE_I + columns_W[:, None],
        gl.convert_layout(result, _RESULTS),
        mask=(pairs_N >= 0)[None, :],
    )
    warps_barrier()  # all of it is stored before it counts
    gl.atomic_add(progress_ptr + expert, 1, sem="release")
    return count


@gluon.jit
def _second_product(
    block, expert, chosen_NK, pairs_NK, middle_ptr, results_ptr, progress_ptr, middle, count,
    weight, full_S, free_S, SIZE_E: gl.constexpr, SIZE_I: gl.constexpr, N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """64 columns of middle @ down.T for the expert's rows."""
    FIRST: gl.constexpr = 2 * SIZE_I // _W
    inputs_D = gl.arange(0, _D, layout=gl.SliceLayout(0, _ROWS))
    while gl.atomic_add(progress_ptr + expert, 0, sem="acquire") < FIRST:
        pass
    rows_N = _pairs_of(expert, chosen_NK, pairs_NK, gl.SliceLayout(1, _ROWS))
    row_ptrs = middle_ptr + rows_N.to(gl.int64)[:, None] * SIZE_I
    for index in gl.static_range(SIZE_I // _D):
        part_ND = gl.load(
            row_ptrs + (index * _D + inputs_D)[None, :], mask=(rows_N >= 0)[:, None], other=0.0
        )
        middle.index(index).store(part_ND)
    fence_async_shared()
    warps_barrier()
    sums_WN, count = _multiply_steps(
        middle, SIZE_I // (_COPIES * _D), count, weight, full_S, free_S, N, STAGES
    )
    pairs_N = _pairs_of(expert, chosen_NK, pairs_NK, gl.SliceLayout(0, _RESULTS))
    columns_W = block * _W + gl.arange(0, _W, layout=gl.SliceLayout(1, _RESULTS))
    gl.store(
        results_ptr + pairs_N.to(gl.int64)[None, :] * SIZE_E + columns_W[:, None],
        gl.convert_layout(sums_WN.to(gl.bfloat16), _RESULTS),
        mask=(pairs_N >= 0)[None, :],
    )
    warps_barrier()
    # Whoever counts the last leaves counts as the next launch expects them.
    if gl.atomic_add(progress_ptr + expert, 1, sem="relaxed") == FIRST + SIZE_E // _W - 1:
        gl.atomic_xchg(progress_ptr + expert, 0, sem="relaxed")
    return count


@gluon.jit
def _announced(items_S, full_S, count, STAGES: gl.constexpr):
    """The item that the step `count` begins."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    place = count % STAGES
    mbarrier.wait(full_S.index(place), count // STAGES & 1)
    return gl.max(items_S.index(place).load(layout), axis=0)


@gluon.jit
def _multiply(
    experts_ptr, weights_ptr, middle_ptr, results_ptr, out_ptr, progress_ptr, num_rows, x, middle,
    weight, items_S, x_full, full_S, free_S, K: gl.constexpr, P: gl.constexpr, L: gl.constexpr,
    X: gl.constexpr, SIZE_E: gl.constexpr, SIZE_I: gl.constexpr, N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """This program's items."""
    FIRST: gl.constexpr = 2 * SIZE_I // _W
    SECOND: gl.constexpr = SIZE_E // _W
    K2: gl.constexpr = triton.next_power_of_2(K)
    pairs: gl.constexpr = gl.BlockedLayout([1, K2], [32, 1], [4, 1], [1, 0])
    turns_X, num_chosen = _turns(experts_ptr, num_rows * K, P, X, 4)
    num_first = num_chosen * FIRST
    own_N = gl.arange(0, N, layout=gl.SliceLayout(1, pairs))
    choices_K = gl.arange(0, K2, layout=gl.SliceLayout(0, pairs))
    pairs_NK = own_N[:, None] * K + choices_K[None, :]
    inside_NK = (own_N < num_rows)[:, None] & (choices_K < K)[None, :]
    chosen_NK = gl.load(experts_ptr + pairs_NK, mask=inside_NK, other=-1).to(gl.int32)
    mbarrier.wait(x_full, 0)
    count = 0
    item = _announced(items_S, full_S, count, STAGES)
    while item >= 0:
        if item < num_first:
            expert = _expert_of(item // FIRST, turns_X, X)
            count = _first_product(
                item, expert, chosen_NK, pairs_NK, middle_ptr, progress_ptr, x, count, weight,
                full_S, free_S, SIZE_E, SIZE_I, N, STAGES,
            )  # fmt: skip
        else:
            expert = _expert_of((item - num_first) // SECOND, turns_X, X)
            block = (item - num_first) % SECOND
            count = _second_product(
                block, expert, chosen_NK, pairs_NK, middle_ptr, results_ptr, progress_ptr, middle,
                count, weight, full_S, free_S, SIZE_E, SIZE_I, N, STAGES,
            )  # fmt: skip
            counted_ptr = progress_ptr + L + block
            if gl.atomic_add(counted_ptr, 1, sem="acq_rel") == num_chosen - 1:
                gl.atomic_xchg(counted_ptr, 0, sem="relaxed")
                _sum_columns(
                    block, experts_ptr, weights_ptr, results_ptr, out_ptr, num_rows, K, SIZE_E, N
                )
        item = _announced(items_S, full_S, count, STAGES)
    if num_chosen == 0:
        for block in range(gl.program_id(0), SECOND, gl.num_programs(0)):
            _sum_columns(
                block, experts_ptr, weights_ptr, results_ptr, out_ptr, num_rows, K, SIZE_E, N
            )


@gluon.jit(do_not_specialize=["num_rows"])
def stream_experts_kernel(
    x_blocks,
    gate_up_blocks,
    down_blocks,
    experts_ptr,
    weights_ptr,
    middle_ptr,
    results_ptr,
    out_ptr,
    progress_ptr,
    num_rows,
    K: gl.constexpr,
    P: gl.constexpr,
    L: gl.constexpr,
    X: gl.constexpr,
    SIZE_E: gl.constexpr,
    SIZE_I: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """Of at most N rows, each with K experts or -1 for none. `progress` counts the results of each
    expert, those of each 64 columns, and the items that were drawn: zeros, and zeros again at the
    end."""
    weight = gl.allocate_shared_memory(
        gl.bfloat16, [STAGES * _COPIES, _W // 16, 2, 8, _D], _WEIGHT_SHARED
    )
    x = gl.allocate_shared_memory(gl.bfloat16, [SIZE_E // _D, N, _D], _ROWS_SHARED)
    middle = gl.allocate_shared_memory(gl.bfloat16, [SIZE_I // _D, N, _D], _ROWS_SHARED)
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    items_S = gl.allocate_shared_memory(gl.int32, [STAGES, 1], line)
    x_full = gl.allocate_shared_memory(gl.int64, [1], layout)
    full_S = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    free_S = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    mbarrier.init(x_full, count=1)
    for place in gl.static_range(STAGES):
        mbarrier.init(full_S.index(place), count=1)
        mbarrier.init(free_S.index(place), count=1)
    fence_async_shared()
    warps_barrier()
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    experts_ptr, weights_ptr, middle_ptr, results_ptr, out_ptr, progress_ptr,
                    num_rows, x, middle, weight, items_S, x_full, full_S, free_S, K, P, L, X,
                    SIZE_E, SIZE_I, N, STAGES,
                ),
            ),
            (
                _copy_weights,
                (
                    x_blocks, gate_up_blocks, down_blocks, experts_ptr, progress_ptr, num_rows * K,
                    x, weight, items_S, x_full, full_S, free_S, P, L, X, SIZE_E, SIZE_I, N, STAGES,
                ),
            ),
        ],
        worker_num_warps=[1],
        worker_num_regs=[160],
    )  # fmt: skip


def num_stages(size_E: int, size_I: int, places: int) -> int:
    """Steps of weights that fit beside the rows and an expert's middle rows."""
    return (_SHARED_BYTES - 2 * places * (size_E + size_I)) // _STEP_BYTES


def takes(gate_up_L2IE: Tensor, down_LEI: Tensor) -> bool:
    """Whether the kernel computes such experts, for at most `PLACES[-1]` rows."""
    size_E, size_I = down_LEI.shape[1:]
    step = INPUTS * COPIES
    return (
        gate_up_L2IE.dtype is down_LEI.dtype is torch.bfloat16
        and size_E % step == size_I % step == 0
        and num_stages(size_E, size_I, PLACES[-1]) >= _LEAST_STAGES
    )


class StreamedExperts:
    """Experts that `takes` says the kernel computes."""

    def __init__(self, gate_up_L2IE: Tensor, down_LEI: Tensor) -> None:
        num_experts, size_E, size_I = down_LEI.shape
        self._sizes = {"L": num_experts, "SIZE_E": size_E, "SIZE_I": size_I}
        device = down_LEI.device
        self._programs = torch.cuda.get_device_properties(device).multi_processor_count
        counts = num_experts + size_E // WEIGHT_ROWS + 1
        self._progress = torch.zeros(counts, dtype=torch.int32, device=device)
        block = [WEIGHT_ROWS // 16, 2, 8, INPUTS]
        # 8 rows of the gate and the 8 that they multiply end in the same thread's registers.
        self._gate_up = TensorDescriptor(
            gate_up_L2IE,
            [(2 * num_experts - 1) * size_I // 8, 2, 8, size_E],
            [8 * size_E, size_I * size_E, size_E, 1],
            block,
            WEIGHT_SHARED,
        )
        self._down = TensorDescriptor(
            down_LEI,
            [num_experts * size_E // 16, 2, 8, size_I],
            [16 * size_I, 8 * size_I, size_I, 1],
            block,
            WEIGHT_SHARED,
        )

    def __call__(self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """(T, SIZE_E): the weighted sum of each row's experts; those of -1 count nothing."""
        num_rows, size_E = x_TE.shape
        top_k, sizes = experts_TK.shape[1], self._sizes
        places = next(places for places in PLACES if num_rows <= places)
        out_TE = torch.empty_like(x_TE, memory_format=torch.contiguous_format)
        stream_experts_kernel[(self._programs,)](
            TensorDescriptor.from_tensor(x_TE, [places, INPUTS], ROWS_SHARED),
            self._gate_up,
            self._down,
            experts_TK.contiguous(),
            weights_TK.contiguous(),
            x_TE.new_empty((num_rows * top_k, sizes["SIZE_I"])),
            x_TE.new_empty((num_rows * top_k, size_E)),
            out_TE,
            self._progress,
            num_rows,
            K=top_k,
            P=triton.next_power_of_2(places * top_k),
            X=max(128, triton.next_power_of_2(sizes["L"])),
            N=places,
            STAGES=num_stages(size_E, sizes["SIZE_I"], places),
            **sizes,
            num_warps=4,
            **options(x_TE.device),
        )
        return out_TE
