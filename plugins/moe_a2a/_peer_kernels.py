"""Two kernels that carry rows to experts, and their sums back, over memory that ranks share.

`send_rows_kernel`: a rank writes each of its rows, once, to every rank that has any of its experts,
at the place that the row has among all ranks' rows; with it the ids of its experts there (-1: not
there) and their weights, which go to every rank. So nobody has to count anything. Quantising is
fused with it. `send_sums_kernel`: every rank writes its experts' sum of a row to the row's rank,
which adds up the sums of the ranks in their order, in float32.

Work is cut into items, a piece of the columns of a row each. A program computes the items whose
number leaves its own as a remainder, and after that waits for the program of the same number on
every peer (core.gpu_tools.peer_flags), which has done those of the peer.

Why nothing is overwritten too early: who sends the rows of the next layer has come through
`send_sums_kernel` of this one, so that it saw flags which its peers raised when their experts had
read the rows of this layer; who sends sums of the next layer has come through its
`send_rows_kernel`, so that it saw flags which its peers raised when they had added up this layer's.

For GPUs; on CPU tensors they run in Triton's interpreter (TRITON_INTERPRET=1), for tests: a process
a rank, over shared memory. Knows nothing of process groups. Shape legend: see
plugins.moe_a2a._peer_layout; R ranks, L local experts.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from core.gpu_tools.dependent_launch import let_successor_start, wait_for_predecessor
from core.gpu_tools.fp8_tile import quantize_tile
from core.gpu_tools.peer_flags import await_flags, raise_flags

_VARYING = ["num_rows", "first_row", "most_rows"]


@triton.jit
def _part(buffers_ptr, rank, offset, dtype: tl.constexpr):
    """A part of one rank's buffer as a pointer."""
    pointer = (tl.load(buffers_ptr + rank) + offset).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16)


@triton.jit
def _ids_and_weights(experts_ptr, weights_ptr, row, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
    choices_K = tl.arange(0, BLOCK_K)
    inside_K = choices_K < TOP_K
    experts_K = tl.load(experts_ptr + row * TOP_K + choices_K, mask=inside_K, other=-1)
    weights_K = tl.load(weights_ptr + row * TOP_K + choices_K, mask=inside_K, other=0.0)
    return experts_K, weights_K


@triton.jit
def _here(experts_K, rank, num_local):
    """Which of a row's experts are on a rank."""
    first = rank * num_local
    return (experts_K >= first) & (experts_K < first + num_local)


@triton.jit
def _tell_span(
    buffers_ptr, spans_at, first_row, num_rows, RANK: tl.constexpr, NUM_RANKS: tl.constexpr
):
    """Where this rank's rows begin among all, and how many they are, on every rank."""
    for rank in tl.static_range(NUM_RANKS):
        span_ptr = _part(buffers_ptr, rank, spans_at, tl.int32) + 2 * RANK
        tl.store(span_ptr, first_row)
        tl.store(span_ptr + 1, num_rows)


@triton.jit(do_not_specialize=_VARYING)
def send_rows_kernel(
    x_ptr,
    experts_ptr,
    weights_ptr,
    buffers_ptr,  # int64 (R,): where each rank's buffer is, as this rank sees it
    epochs_ptr,  # int32 (programs,): launches so far, of this rank
    num_rows,  # of this rank
    first_row,  # of them, among all ranks' rows
    most_rows,  # of any rank
    num_local,
    spans_at,  # offsets of a buffer's parts, in bytes
    rows_at,
    scales_at,
    ids_at,
    weights_at,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    FP8: tl.constexpr,
    RANK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The rows of every rank that have experts here, at their places in this rank's buffer."""
    wait_for_predecessor(DEPENDENT)
    program = tl.program_id(0)
    epoch = tl.load(epochs_ptr + program) + 1
    PIECES: tl.constexpr = (SIZE + BLOCK_E - 1) // BLOCK_E
    BLOCKS: tl.constexpr = (SIZE + 127) // 128
    BLOCK_C: tl.constexpr = BLOCK_E // 128
    choices_K = tl.arange(0, BLOCK_K)
    inside_K = choices_K < TOP_K
    for item in range(program, num_rows * PIECES, tl.num_programs(0)):
        row = tl.zeros((), tl.int64) + item // PIECES
        piece = item % PIECES
        place = row + first_row
        experts_K, weights_K = _ids_and_weights(experts_ptr, weights_ptr, row, TOP_K, BLOCK_K)
        if FP8:
            blocks_C = piece * BLOCK_C + tl.arange(0, BLOCK_C)
            columns = blocks_C[:, None] * 128 + tl.arange(0, 128)[None, :]
            inside = columns < SIZE
            x = tl.load(x_ptr + row * SIZE + columns, mask=inside, other=0.0)
            values, scales_C = quantize_tile(x)
        else:
            columns = piece * BLOCK_E + tl.arange(0, BLOCK_E)
            inside = columns < SIZE
            values = tl.load(x_ptr + row * SIZE + columns, mask=inside, other=0.0)
        for distance in tl.static_range(0, NUM_RANKS):
            peer = (RANK + distance) % NUM_RANKS
            here_K = _here(experts_K, peer, num_local)
            if piece == 0:
                ids_ptr = _part(buffers_ptr, peer, ids_at, tl.int64) + place * TOP_K
                ids_K = tl.where(here_K, experts_K - peer * num_local, -1)
                tl.store(ids_ptr + choices_K, ids_K, mask=inside_K)
                to_ptr = _part(buffers_ptr, peer, weights_at, tl.float32) + place * TOP_K
                tl.store(to_ptr + choices_K, weights_K, mask=inside_K)
            if tl.sum(here_K.to(tl.int32), 0) > 0:
                rows_ptr = _part(buffers_ptr, peer, rows_at, values.dtype) + place * SIZE
                tl.store(rows_ptr + columns, values, mask=inside)
                if FP8:
                    scales_ptr = _part(buffers_ptr, peer, scales_at, tl.float32) + place * BLOCKS
                    tl.store(scales_ptr + blocks_C, scales_C, mask=blocks_C < BLOCKS)
    if program < most_rows * PIECES:
        if program == 0:
            _tell_span(buffers_ptr, spans_at, first_row, num_rows, RANK, NUM_RANKS)
        raise_flags(buffers_ptr, 0, program, epoch, RANK, NUM_RANKS)
        await_flags(buffers_ptr, 0, program, epoch, RANK, NUM_RANKS)
    let_successor_start(DEPENDENT)
    tl.store(epochs_ptr + program, epoch)


@triton.jit(do_not_specialize=[*_VARYING, "slot_rows"])
def send_sums_kernel(
    sums_ptr,  # (A, E): what this rank's experts make of all ranks' rows
    experts_ptr,  # of this rank's rows, physical ones
    out_ptr,
    buffers_ptr,
    epochs_ptr,
    num_rows,
    first_row,
    most_rows,
    num_local,
    slot_rows,  # rows of a rank that buffers hold
    spans_at,
    ids_at,
    sums_at,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    RANK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """(T, E): the sums over ranks of this rank's rows; what no expert made is not even read."""
    wait_for_predecessor(DEPENDENT)
    program = tl.program_id(0)
    epoch = tl.load(epochs_ptr + program) + 1
    PIECES: tl.constexpr = (SIZE + BLOCK_E - 1) // BLOCK_E
    choices_K = tl.arange(0, BLOCK_K)
    inside_K = choices_K < TOP_K
    ids_ptr = _part(buffers_ptr, RANK, ids_at, tl.int64)
    for distance in tl.static_range(1, NUM_RANKS):
        peer = (RANK + distance) % NUM_RANKS
        span_ptr = _part(buffers_ptr, RANK, spans_at, tl.int32) + 2 * peer
        first = tl.load(span_ptr, cache_modifier=".cg")
        count = tl.load(span_ptr + 1, cache_modifier=".cg")
        slot_ptr = _part(buffers_ptr, peer, sums_at, sums_ptr.dtype.element_ty)
        for item in range(program, count * PIECES, tl.num_programs(0)):
            row = tl.zeros((), tl.int64) + item // PIECES
            place = row + first
            ids_K = tl.load(ids_ptr + place * TOP_K + choices_K, mask=inside_K, other=-1)
            if tl.max(ids_K, 0) >= 0:
                columns_E = item % PIECES * BLOCK_E + tl.arange(0, BLOCK_E)
                inside_E = columns_E < SIZE
                sums_E = tl.load(sums_ptr + place * SIZE + columns_E, mask=inside_E)
                slot = RANK * slot_rows + row
                tl.store(slot_ptr + slot * SIZE + columns_E, sums_E, mask=inside_E)
    if program < most_rows * PIECES:
        raise_flags(buffers_ptr, 0, program, epoch, RANK, NUM_RANKS)
        await_flags(buffers_ptr, 0, program, epoch, RANK, NUM_RANKS)
    let_successor_start(DEPENDENT)
    own_ptr = _part(buffers_ptr, RANK, sums_at, sums_ptr.dtype.element_ty)
    for item in range(program, num_rows * PIECES, tl.num_programs(0)):
        row = tl.zeros((), tl.int64) + item // PIECES
        columns_E = item % PIECES * BLOCK_E + tl.arange(0, BLOCK_E)
        inside_E = columns_E < SIZE
        experts_K = tl.load(experts_ptr + row * TOP_K + choices_K, mask=inside_K, other=-1)
        total_E = tl.zeros((BLOCK_E,), tl.float32)
        for source in tl.static_range(NUM_RANKS):
            there = tl.sum(_here(experts_K, source, num_local).to(tl.int32), 0) > 0
            # What was not sent may be NaN, so that it must not even be multiplied by 0.
            mask_E = inside_E & there
            if source == RANK:
                part_ptr = sums_ptr + (row + first_row) * SIZE
                part_E = tl.load(part_ptr + columns_E, mask=mask_E, other=0.0)
            else:
                part_ptr = own_ptr + (source * slot_rows + row) * SIZE
                part_E = tl.load(part_ptr + columns_E, mask=mask_E, other=0.0, cache_modifier=".cg")
            total_E += part_E.to(tl.float32)
        out_E = total_E.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * SIZE + columns_E, out_E, mask=inside_E)
    tl.store(epochs_ptr + program, epoch)
