"""How programs of kernels on several GPUs tell each other that what they pushed is there.

Every rank has a flag for each program of each rank; they count launches and never go back, so that
nothing has to be reset, and a captured graph can be replayed. A program waits for the program of
the same number on every peer. Knows nothing of what is pushed.

For GPUs; on CPU tensors it runs in Triton's interpreter (TRITON_INTERPRET=1), for tests.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def raise_flags(buffers_ptr, flags_at, program, epoch, RANK: tl.constexpr, NUM_RANKS: tl.constexpr):
    """Tell every peer that what this program pushed is there. All of its threads have pushed."""
    tl.debug_barrier()
    for distance in tl.static_range(1, NUM_RANKS):
        peer = (RANK + distance) % NUM_RANKS
        flags = (tl.load(buffers_ptr + peer) + flags_at).to(tl.pointer_type(tl.int32))
        place = flags + RANK * tl.num_programs(0) + program
        tl.atomic_xchg(place, epoch, sem="release", scope="sys")


@triton.jit
def await_flags(buffers_ptr, flags_at, program, epoch, RANK: tl.constexpr, NUM_RANKS: tl.constexpr):
    """Until every peer has pushed. A peer may be a launch ahead; numbers wrap around."""
    flags = (tl.load(buffers_ptr + RANK) + flags_at).to(tl.pointer_type(tl.int32))
    for distance in tl.static_range(1, NUM_RANKS):
        peer = (RANK + distance) % NUM_RANKS
        place = flags + peer * tl.num_programs(0) + program
        seen = tl.atomic_add(place, 0, sem="acquire", scope="sys")
        while seen - epoch < 0:
            seen = tl.atomic_add(place, 0, sem="acquire", scope="sys")
    tl.debug_barrier()
