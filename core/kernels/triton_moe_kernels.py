"""Triton kernels of mixtures of experts. Launched by core.kernels.triton_moe alone.

Experts' rows are cut into tiles on the device, which alone knows how many each has; a fixed number
of programs then takes tiles in turn, so that neither the host waits nor empty tiles cost a launch.
Shape legend: T rows, X logical experts in G groups of S, K experts of a row, L local experts, M
rows, N and D columns of one product's result and of its operands; a D in 128s is a scale's column.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def grouped_top_k_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    logits_stride,
    scale,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    GROUP_TOP: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    NORMALISE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row. Of equals the first is chosen. NaN is worth less than any number, so that ids are
    valid and differ whatever the logits."""
    row = tl.program_id(0).to(tl.int64)
    groups_G = tl.arange(0, BLOCK_G)
    places_S = tl.arange(0, BLOCK_S)
    experts_GS = groups_G[:, None] * GROUP_SIZE + places_S[None, :]
    inside_GS = (groups_G[:, None] < NUM_GROUPS) & (places_S[None, :] < GROUP_SIZE)
    least = float("-inf")
    logits_GS = tl.load(logits_ptr + row * logits_stride + experts_GS, mask=inside_GS, other=least)
    if SCORING == "uniform_random":
        mixed_GS = logits_GS.to(tl.uint32, bitcast=True) ^ (row.to(tl.uint32) * 0x85EBCA6B)
        mixed_GS = mixed_GS ^ (experts_GS.to(tl.uint32) * 0x9E3779B1)
        mixed_GS = (mixed_GS ^ (mixed_GS >> 16)) * 0x85EBCA6B
        mixed_GS = (mixed_GS ^ (mixed_GS >> 13)) * 0xC2B2AE35
        scores_GS = ((mixed_GS ^ (mixed_GS >> 16)) >> 8).to(tl.float32) * 5.9604644775390625e-08
    elif SCORING == "sigmoid":
        scores_GS = 1.0 / (1.0 + tl.exp(-logits_GS))
    else:
        raised_GS = tl.exp(logits_GS - tl.max(tl.max(logits_GS, axis=1), axis=0))
        scores_GS = raised_GS / tl.sum(tl.sum(raised_GS, axis=1), axis=0)
    worth_GS = scores_GS
    if HAS_BIAS:
        worth_GS += tl.load(bias_ptr + experts_GS, mask=inside_GS, other=0.0)
    worth_GS = tl.where(worth_GS == worth_GS, worth_GS, -3.0e38)
    worth_GS = tl.where(inside_GS, worth_GS, least)
    if NUM_GROUPS > 1:
        rest_GS = worth_GS
        group_worth_G = tl.zeros((BLOCK_G,), tl.float32)
        for _ in tl.static_range(GROUP_TOP):
            best_G, place_G = tl.max(rest_GS, axis=1, return_indices=True)
            group_worth_G += best_G
            rest_GS = tl.where(places_S[None, :] == place_G[:, None], least, rest_GS)
        chosen_G = groups_G < 0
        for _ in tl.static_range(NUM_CHOSEN):
            _best, group = tl.max(group_worth_G, axis=0, return_indices=True)
            chosen_G = chosen_G | (groups_G == group)
            group_worth_G = tl.where(groups_G == group, least, group_worth_G)
        worth_GS = tl.where(chosen_G[:, None], worth_GS, least)
    places_F = tl.arange(0, BLOCK_G * BLOCK_S)
    worth_F = tl.reshape(worth_GS, (BLOCK_G * BLOCK_S,))
    scores_F = tl.reshape(scores_GS, (BLOCK_G * BLOCK_S,))
    choices_K = tl.arange(0, BLOCK_K)
    weights_K = tl.zeros((BLOCK_K,), tl.float32)
    ids_K = tl.zeros((BLOCK_K,), tl.int32)
    for choice in tl.static_range(TOP_K):
        _best, place = tl.max(worth_F, axis=0, return_indices=True)
        weight = tl.sum(tl.where(places_F == place, scores_F, 0.0), axis=0)
        expert = place // BLOCK_S * GROUP_SIZE + place % BLOCK_S
        weights_K = tl.where(choices_K == choice, weight, weights_K)
        ids_K = tl.where(choices_K == choice, expert, ids_K)
        worth_F = tl.where(places_F == place, least, worth_F)
    if NORMALISE:
        weights_K = weights_K / (tl.sum(weights_K, axis=0) + 1e-20)
    tl.store(weights_ptr + row * TOP_K + choices_K, weights_K * scale, mask=choices_K < TOP_K)
    tl.store(ids_ptr + row * TOP_K + choices_K, ids_K.to(tl.int64), mask=choices_K < TOP_K)


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
):
    """Cut each expert's rows into tiles of BLOCK_M: `tiles` is their number (int32), then for each
    the expert, then its first row, then the end of its expert's rows (`max_tiles` each)."""
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
def _product(
    total_MN,
    x_MD,
    weight_ptrs_DN,
    weight_mask_DN,
    x_scale_M,
    weight_scale_ptr,
    FP8: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Add one step of a product to its total; with FP8 by the scales of rows and weight block."""
    if EVEN:
        weight_DN = tl.load(weight_ptrs_DN)
    else:
        weight_DN = tl.load(weight_ptrs_DN, mask=weight_mask_DN, other=0.0)
    if FP8:
        scale_M = x_scale_M * tl.load(weight_scale_ptr)
        total_MN += tl.dot(x_MD, weight_DN) * scale_M[:, None]
    elif WIDE:
        x_MD, weight_DN = x_MD.to(tl.float32), weight_DN.to(tl.float32)
        total_MN = tl.dot(x_MD, weight_DN, total_MN, input_precision="ieee")
    else:
        total_MN = tl.dot(x_MD, weight_DN, total_MN)
    return total_MN


@triton.jit(
    do_not_specialize=["max_tiles", "scale_expert_stride"],
    do_not_specialize_on_alignment=["tiles_ptr"],
)
def experts_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    out_ptr,
    out_scales_ptr,
    tiles_ptr,
    max_tiles,
    x_stride,
    scale_expert_stride,
    scale_row_stride,
    scale_column_stride,
    SIZE_D: tl.constexpr,
    SIZE_N: tl.constexpr,
    GATED: tl.constexpr,
    FP8: tl.constexpr,
    WIDE: tl.constexpr,
    OUT_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x @ W.T of each expert's rows; with GATED silu(x @ W[:N].T) * (x @ W[N:].T).

    With FP8 operands are fp8 with scales for each 128 columns (x) and 128 x 128 values (weight):
    BLOCK_D is 128 then, and BLOCK_N divides 128. With OUT_FP8 the result is stored like such an x:
    BLOCK_N is 128 then. With WIDE products are of float32 values, and exact.
    """
    EVEN: tl.constexpr = SIZE_D % BLOCK_D == 0
    ROWS: tl.constexpr = 2 * SIZE_N if GATED else SIZE_N
    NUM_COLUMNS: tl.constexpr = (SIZE_N + BLOCK_N - 1) // BLOCK_N
    SCALES_D: tl.constexpr = (SIZE_D + 127) // 128
    SCALES_N: tl.constexpr = (SIZE_N + 127) // 128
    work = tl.load(tiles_ptr) * NUM_COLUMNS
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        tile_ptr = tiles_ptr + 1 + item // NUM_COLUMNS
        expert = tl.load(tile_ptr).to(tl.int64)
        rows_M = tl.load(tile_ptr + max_tiles).to(tl.int64) + tl.arange(0, BLOCK_M)
        inside_M = rows_M < tl.load(tile_ptr + 2 * max_tiles)
        first_N = item % NUM_COLUMNS * BLOCK_N
        columns_N = first_N + tl.arange(0, BLOCK_N)
        columns_D = tl.arange(0, BLOCK_D)
        x_ptrs = x_ptr + rows_M[:, None] * x_stride + columns_D[None, :]
        # Columns past the end repeat others; their results are not stored.
        weight_ptrs = weight_ptr + expert * (ROWS * SIZE_D)
        weight_ptrs += (columns_N % SIZE_N)[None, :] * SIZE_D + columns_D[:, None]
        scale_ptrs = x_scales_ptr + expert * scale_expert_stride + rows_M * scale_row_stride
        block_ptr = weight_scales_ptr + expert * ((ROWS + 127) // 128 * SCALES_D)
        block_ptr += first_N // 128 * SCALES_D
        first_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        second_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(0, SIZE_D, BLOCK_D):
            inside_D = columns_D < SIZE_D - step
            x_mask = inside_M[:, None] if EVEN else inside_M[:, None] & inside_D[None, :]
            x_MD = tl.load(x_ptrs + step, mask=x_mask, other=0.0)
            x_scale_M = tl.zeros((BLOCK_M,), tl.float32)
            if FP8:
                places_M = scale_ptrs + step // 128 * scale_column_stride
                x_scale_M = tl.load(places_M, mask=inside_M, other=0.0)
            mask_DN = inside_D[:, None]
            block = block_ptr + step // 128
            first_MN = _product(
                first_MN, x_MD, weight_ptrs + step, mask_DN, x_scale_M, block, FP8, WIDE, EVEN
            )
            if GATED:
                second_MN = _product(
                    second_MN,
                    x_MD,
                    weight_ptrs + SIZE_N * SIZE_D + step,
                    mask_DN,
                    x_scale_M,
                    block + SIZE_N // 128 * SCALES_D,
                    FP8,
                    WIDE,
                    EVEN,
                )
        if GATED:
            first_MN = first_MN / (1.0 + tl.exp(-first_MN)) * second_MN
        if OUT_FP8:
            largest_M = tl.max(tl.where(columns_N[None, :] < SIZE_N, tl.abs(first_MN), 0.0), axis=1)
            out_scale_M = tl.where(largest_M > 0.0, largest_M / 448.0, 1.0)
            tl.store(out_scales_ptr + rows_M * SCALES_N + first_N // 128, out_scale_M, inside_M)
            first_MN = first_MN / out_scale_M[:, None]
        tl.store(
            out_ptr + rows_M[:, None] * SIZE_N + columns_N[None, :],
            first_MN.to(out_ptr.dtype.element_ty),
            mask=inside_M[:, None] & (columns_N[None, :] < SIZE_N),
        )
