"""The Triton kernel that chooses experts. Launched by core.devices.cuda.experts.triton_moe alone.

Shape legend: X logical experts in G groups of S, K experts of a row, F all places of the groups.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from core.gpu_tools.dependent_launch import let_successor_start, wait_for_predecessor


@triton.jit
def _scores(logits_GS, experts_GS, row, SCORING: tl.constexpr):
    """What a row thinks of every expert; see core.interfaces.routing."""
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
    return scores_GS


@triton.jit
def _in_chosen_groups(
    worth_GS,
    NUM_CHOSEN: tl.constexpr,
    GROUP_TOP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """-inf for experts outside of the best groups."""
    least = float("-inf")
    groups_G = tl.arange(0, BLOCK_G)
    places_S = tl.arange(0, BLOCK_S)
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
    return tl.where(chosen_G[:, None], worth_GS, least)


@triton.jit
def _best_places(worth_F, NUM_PLACES: tl.constexpr, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where the TOP_K largest stand, the largest first; of equals the first. Neither NaN nor -0."""
    places_F = tl.arange(0, NUM_PLACES)
    choices_K = tl.arange(0, BLOCK_K)
    places_K = tl.zeros((BLOCK_K,), tl.int32)
    # As integers of the same order, of which a warp finds the largest in one instruction.
    keys_F = worth_F.to(tl.int32, bitcast=True)
    keys_F = keys_F ^ (keys_F >> 31 & 0x7FFFFFFF)
    for choice in tl.static_range(TOP_K):
        place = tl.min(tl.where(keys_F == tl.max(keys_F, axis=0), places_F, NUM_PLACES), axis=0)
        places_K = tl.where(choices_K == choice, place, places_K)
        keys_F = tl.where(places_F == place, -2147483648, keys_F)
    return places_K


@triton.jit
def _store_physical(
    weights_ptr,
    ids_ptr,
    physical_ptr,
    num_copies_ptr,
    counts_ptr,
    num_real_ptr,
    weights_K,
    logical_K,
    row,
    first_row,
    first_copy,
    MOST_COPIES: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Where the experts of a row stand; it is counted, unless it is padding."""
    choices_K = tl.arange(0, BLOCK_K)
    inside_K = choices_K < TOP_K
    rows_K = tl.zeros((BLOCK_K,), tl.int64) + row + first_row
    real_K = inside_K & (rows_K < tl.load(num_real_ptr))
    places_K = logical_K * MOST_COPIES
    if MOST_COPIES > 1:
        copies_K = tl.load(num_copies_ptr + logical_K, mask=inside_K, other=1)
        places_K += (row + first_copy) % copies_K
    physical_K = tl.load(physical_ptr + places_K, mask=inside_K, other=0)
    tl.store(weights_ptr + choices_K, tl.where(real_K, weights_K, 0.0), mask=inside_K)
    tl.store(ids_ptr + choices_K, tl.where(real_K, physical_K, -1), mask=inside_K)
    tl.atomic_add(counts_ptr + logical_K, 1, mask=real_K, sem="relaxed")


@triton.jit(do_not_specialize=["first_row", "first_copy"])
def choose_experts_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    physical_ptr,
    num_copies_ptr,
    counts_ptr,
    num_real_ptr,
    logits_stride,
    scale,
    first_row,
    first_copy,
    MOST_COPIES: tl.constexpr,
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
    DEPENDENT: tl.constexpr,
):
    """One row. Of equals the first is chosen. NaN is worth less than any number, so that ids are
    valid and differ whatever the logits. With MOST_COPIES ids are those of where experts stand."""
    NUM_PLACES: tl.constexpr = BLOCK_G * BLOCK_S
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    groups_G = tl.arange(0, BLOCK_G)
    places_S = tl.arange(0, BLOCK_S)
    experts_GS = groups_G[:, None] * GROUP_SIZE + places_S[None, :]
    inside_GS = (groups_G[:, None] < NUM_GROUPS) & (places_S[None, :] < GROUP_SIZE)
    least = float("-inf")
    logits_GS = tl.load(logits_ptr + row * logits_stride + experts_GS, mask=inside_GS, other=least)
    scores_GS = _scores(logits_GS, experts_GS, row, SCORING)
    worth_GS = scores_GS
    if HAS_BIAS:
        worth_GS += tl.load(bias_ptr + experts_GS, mask=inside_GS, other=0.0)
    worth_GS = tl.where(worth_GS == worth_GS, worth_GS, -3.0e38)
    worth_GS = tl.where(inside_GS, worth_GS, least)
    if NUM_GROUPS > 1:
        worth_GS = _in_chosen_groups(worth_GS, NUM_CHOSEN, GROUP_TOP, BLOCK_G, BLOCK_S)
    worth_F = tl.reshape(worth_GS, (NUM_PLACES,))
    scores_F = tl.reshape(scores_GS, (NUM_PLACES,))
    choices_K = tl.arange(0, BLOCK_K)
    places_K = _best_places(worth_F, NUM_PLACES, TOP_K, BLOCK_K)
    weights_K = tl.where(choices_K < TOP_K, tl.gather(scores_F, places_K, axis=0), 0.0)
    ids_K = places_K // BLOCK_S * GROUP_SIZE + places_K % BLOCK_S
    if NORMALISE:
        weights_K = weights_K / (tl.sum(weights_K, axis=0) + 1e-20)
    weights_ptr += row * TOP_K
    ids_ptr += row * TOP_K
    if MOST_COPIES > 0:
        _store_physical(
            weights_ptr,
            ids_ptr,
            physical_ptr,
            num_copies_ptr,
            counts_ptr,
            num_real_ptr,
            weights_K * scale,
            ids_K.to(tl.int64),
            row,
            first_row,
            first_copy,
            MOST_COPIES,
            TOP_K,
            BLOCK_K,
        )
    else:
        tl.store(weights_ptr + choices_K, weights_K * scale, mask=choices_K < TOP_K)
        tl.store(ids_ptr + choices_K, ids_K.to(tl.int64), mask=choices_K < TOP_K)
