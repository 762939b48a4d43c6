"""Collectives over memory that the ranks of an axis can write into: one kernel for all of them, and
one for a sum with the norm behind it.

Each rank pushes its values into a slot that it has on every peer, says so in a flag there, waits
for the peers' flags, and reads its own slots, which are near. Programs with the same number on all
ranks do this for the same chunks, and for no others, so that a program waits for one program a
peer. No wait can block a program that is waited for: those before it come in one order everywhere.

Flags count launches and never go back, so that nothing has to be reset; a captured graph can be
replayed. Slots are two of each: what a peer may still be reading of one launch is written again two
launches later, and between them lies a flag of that peer, which it raised after it had read.

For GPUs; on CPU tensors it runs in Triton's interpreter (TRITON_INTERPRET=1), for tests: a process
a rank, over shared memory. Knows nothing of process groups.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from core.gpu_tools.dependent_launch import let_successor_start, wait_for_predecessor
from core.gpu_tools.peer_flags import await_flags, raise_flags


@triton.jit
def _slot(buffer_ptr, like_ptr, epoch, source, slot_bytes, NUM_RANKS: tl.constexpr):
    """Where the values of rank `source` lie in one rank's buffer, as a pointer like another."""
    index = ((epoch & 1) * NUM_RANKS + source).to(tl.int64)
    pointer = (buffer_ptr + index * slot_bytes).to(like_ptr.dtype)
    return tl.multiple_of(pointer, 16)


@triton.jit(do_not_specialize=["slot_bytes", "flags_at"])
def exchange_kernel(
    x_ptr,
    out_ptr,
    buffers_ptr,  # int64 (NUM_RANKS,): where each rank's buffer is, as this rank sees it
    epochs_ptr,  # int32 (programs,): launches so far, of this rank
    num_values,  # of one part
    slot_bytes,
    flags_at,
    RANK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    CUT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Every rank sends the whole of x to each peer, or with CUT the peer's part of it. The result
    is the sum of what came (in float32 and rank order: equal everywhere), or part after part."""
    wait_for_predecessor(DEPENDENT)
    program = tl.program_id(0)
    epoch = tl.load(epochs_ptr + program) + 1
    num_chunks = tl.cdiv(num_values, BLOCK)
    part_size = tl.zeros((), tl.int64) + num_values
    own_part_ptr = x_ptr + (RANK * part_size if CUT else 0)
    for chunk in range(program, num_chunks, tl.num_programs(0)):
        values = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = values < num_values
        for distance in tl.static_range(1, NUM_RANKS):
            part_ptr = x_ptr + ((RANK + distance) % NUM_RANKS * part_size if CUT else 0)
            slot_ptr = _slot(
                tl.load(buffers_ptr + (RANK + distance) % NUM_RANKS),
                x_ptr,
                epoch,
                RANK,
                slot_bytes,
                NUM_RANKS,
            )
            tl.store(slot_ptr + values, tl.load(part_ptr + values, mask=inside), mask=inside)
    if program < num_chunks:
        raise_flags(buffers_ptr, flags_at, program, epoch, RANK, NUM_RANKS)
        await_flags(buffers_ptr, flags_at, program, epoch, RANK, NUM_RANKS)
    let_successor_start(DEPENDENT)
    own = tl.load(buffers_ptr + RANK)
    for chunk in range(program, num_chunks, tl.num_programs(0)):
        values = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = values < num_values
        if SUM:
            total = tl.zeros((BLOCK,), tl.float32)
            for source in tl.static_range(NUM_RANKS):
                if source == RANK:
                    part = tl.load(own_part_ptr + values, mask=inside, other=0.0)
                else:
                    slot_ptr = _slot(own, x_ptr, epoch, source, slot_bytes, NUM_RANKS)
                    part = tl.load(slot_ptr + values, mask=inside, other=0.0, cache_modifier=".cg")
                total += part.to(tl.float32)
            tl.store(out_ptr + values, total.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            for source in tl.static_range(NUM_RANKS):
                if source == RANK:
                    part = tl.load(own_part_ptr + values, mask=inside)
                else:
                    slot_ptr = _slot(own, x_ptr, epoch, source, slot_bytes, NUM_RANKS)
                    part = tl.load(slot_ptr + values, mask=inside, cache_modifier=".cg")
                tl.store(out_ptr + source * part_size + values, part, mask=inside)
    tl.store(epochs_ptr + program, epoch)


@triton.jit(do_not_specialize=["num_rows", "slot_bytes", "flags_at"])
def sum_add_norm_kernel(
    x_ptr,  # (num_rows, SIZE), contiguous
    residual_ptr,  # the same shape
    weight_ptr,  # (SIZE,)
    out_ptr,  # as x
    buffers_ptr,
    epochs_ptr,
    num_rows,
    slot_bytes,
    flags_at,
    RANK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    SIZE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The RMS norm of (sum over ranks of x) + residual, which is stored in residual first.

    Every rank sends all of x to each peer and computes every row: nothing has to travel back. The
    sum is rounded to x's type before it is added, the new residual to its own before it is
    normalised, as an all-reduce and core.devices.cuda's norm do."""
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_predecessor(DEPENDENT)
    program = tl.program_id(0)
    epoch = tl.load(epochs_ptr + program) + 1
    for row in range(program, num_rows, tl.num_programs(0)):
        places = row * SIZE + columns
        brought = tl.load(x_ptr + places, mask=inside)
        for distance in tl.static_range(1, NUM_RANKS):
            slot_ptr = _slot(
                tl.load(buffers_ptr + (RANK + distance) % NUM_RANKS),
                x_ptr,
                epoch,
                RANK,
                slot_bytes,
                NUM_RANKS,
            )
            tl.store(slot_ptr + places, brought, mask=inside)
    if program < num_rows:
        raise_flags(buffers_ptr, flags_at, program, epoch, RANK, NUM_RANKS)
        await_flags(buffers_ptr, flags_at, program, epoch, RANK, NUM_RANKS)
    let_successor_start(DEPENDENT)
    own = tl.load(buffers_ptr + RANK)
    for row in range(program, num_rows, tl.num_programs(0)):
        places = row * SIZE + columns
        total = tl.zeros((BLOCK,), tl.float32)
        for source in tl.static_range(NUM_RANKS):
            if source == RANK:
                part = tl.load(x_ptr + places, mask=inside, other=0.0)
            else:
                slot_ptr = _slot(own, x_ptr, epoch, source, slot_bytes, NUM_RANKS)
                part = tl.load(slot_ptr + places, mask=inside, other=0.0, cache_modifier=".cg")
            total += part.to(tl.float32)
        total = total.to(x_ptr.dtype.element_ty).to(tl.float32)
        total += tl.load(residual_ptr + places, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + places, rounded, mask=inside)
        total = rounded.to(tl.float32)
        scale = tl.rsqrt(tl.sum(total * total, axis=0) / SIZE + EPS)
        normal = total * scale * weight
        tl.store(out_ptr + places, normal.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(epochs_ptr + program, epoch)
