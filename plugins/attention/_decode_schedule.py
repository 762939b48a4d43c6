"""The schedule of paged decode on a GPU: who attends which tiles, made on the device.

The work of a step is a line of tiles: sequence after sequence, in each KV head after KV head, in
each the tiles of the context; one head of one sequence is a *unit*. Every program takes an equal
stretch of the line, so that all end at once whatever the lengths are (where these are equal, a
stretch may be rounded up to whole units, and some programs are left without). What it covers of a
unit is a *piece*: a whole unit's result goes to `out`, others' to the workspace, where a program
has place 0 for the unit that it goes on with and place 1 for the one it begins. Lengths are read on
the device alone. Knows nothing of what is done with a tile.

Shape legend: P programs, S sequences, N tokens of a tile, G KV heads.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

SCHEDULE_COLUMNS = tl.constexpr(8)  # see `schedule_kernel`


@triton.jit
def _find(context_lens_ptr, num_sequences, place, G: tl.constexpr, BLOCK_N: tl.constexpr):
    """(the sequence in which tile `place` of the line stands, tiles of one head before it)."""
    BLOCK_S: tl.constexpr = 256
    sequence = 0
    num_before = 0
    num_tiles = 0
    for first in range(0, num_sequences, BLOCK_S):
        sequences_S = first + tl.arange(0, BLOCK_S)
        inside_S = sequences_S < num_sequences
        tiles_S = tl.cdiv(tl.load(context_lens_ptr + sequences_S, mask=inside_S, other=0), BLOCK_N)
        passed_S = inside_S & ((num_tiles + tl.cumsum(tiles_S, axis=0)) * G <= place)
        sequence += tl.sum(passed_S.to(tl.int32), axis=0)
        num_before += tl.sum(tl.where(passed_S, tiles_S, 0), axis=0)
        num_tiles += tl.sum(tiles_S, axis=0)
    return sequence, num_before


@triton.jit
def _count_tiles(context_lens_ptr, num_sequences, BLOCK_N: tl.constexpr):
    BLOCK_S: tl.constexpr = 256
    num_tiles = 0
    for first in range(0, num_sequences, BLOCK_S):
        sequences_S = first + tl.arange(0, BLOCK_S)
        lens_S = tl.load(context_lens_ptr + sequences_S, mask=sequences_S < num_sequences, other=0)
        num_tiles += tl.sum(tl.cdiv(lens_S, BLOCK_N), axis=0)
    return num_tiles


@triton.jit
def _share(
    context_lens_ptr, num_sequences, P: tl.constexpr, G: tl.constexpr, BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """(tiles of each program, tiles of the line). WHOLE lets programs end where units do, if all
    sequences are equally long and it takes at most a sixteenth more: there are no pieces then."""
    BLOCK_S: tl.constexpr = 256
    num_tiles = 0
    num_real = 0
    longest = 1
    for first in range(0, num_sequences, BLOCK_S):
        sequences_S = first + tl.arange(0, BLOCK_S)
        lens_S = tl.load(context_lens_ptr + sequences_S, mask=sequences_S < num_sequences, other=0)
        tiles_S = tl.cdiv(lens_S, BLOCK_N)
        num_tiles += tl.sum(tiles_S, axis=0)
        num_real += tl.sum((lens_S > 0).to(tl.int32), axis=0)
        longest = tl.maximum(longest, tl.max(tiles_S, axis=0))
    share = tl.maximum(tl.cdiv(num_tiles * G, P), 1)
    if WHOLE:
        whole = tl.cdiv(share, longest) * longest
        if (num_real * longest == num_tiles) & (whole * 16 <= share * 17):
            share = whole
    return share, num_tiles * G


@triton.jit(
    do_not_specialize=["num_sequences"], do_not_specialize_on_alignment=["context_lens_ptr"]
)
def schedule_kernel(
    context_lens_ptr,
    schedule_ptr,
    num_sequences,
    P: tl.constexpr,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One row of a step's schedule: of the P programs, then of units (where there are fewer).

    Columns of a program: sequence, KV head and tile where it begins; its number of tiles. Of
    programs and units: sequence and KV head of a unit, the number of its pieces (0: not in pieces,
    or begun by another program), and the program that begins it."""
    row = tl.program_id(0)
    schedule_ptr += row * SCHEDULE_COLUMNS
    share, num_tiles = _share(context_lens_ptr, num_sequences, P, G, BLOCK_N, WHOLE)
    if row < P:
        begin = row * share
        end = tl.minimum(begin + share, num_tiles)
        tl.store(schedule_ptr + 3, tl.maximum(end - begin, 0))
        tl.store(schedule_ptr + 6, 0)
        if begin < end:
            sequence, num_before = _find(context_lens_ptr, num_sequences, begin, G, BLOCK_N)
            length = tl.cdiv(tl.load(context_lens_ptr + sequence), BLOCK_N)
            tl.store(schedule_ptr, sequence)
            tl.store(schedule_ptr + 1, (begin - num_before * G) // length)
            tl.store(schedule_ptr + 2, (begin - num_before * G) % length)
            sequence, num_before = _find(context_lens_ptr, num_sequences, end - 1, G, BLOCK_N)
            length = tl.cdiv(tl.load(context_lens_ptr + sequence), BLOCK_N)
            kv_head = (end - 1 - num_before * G) // length
            unit_begin = num_before * G + kv_head * length
            if unit_begin >= begin:
                _store_unit(schedule_ptr, sequence, kv_head, unit_begin, length, share)
    else:
        sequence = (row - P) // G
        kv_head = (row - P) % G
        length = tl.cdiv(tl.load(context_lens_ptr + sequence), BLOCK_N)
        unit_begin = _count_tiles(context_lens_ptr, sequence, BLOCK_N) * G + kv_head * length
        _store_unit(schedule_ptr, sequence, kv_head, unit_begin, length, share)


@triton.jit
def _store_unit(schedule_ptr, sequence, kv_head, unit_begin, length, share):
    first = unit_begin // share
    num_pieces = (unit_begin + length - 1) // share - first + 1
    tl.store(schedule_ptr + 4, sequence)
    tl.store(schedule_ptr + 5, kv_head)
    tl.store(schedule_ptr + 6, tl.where((length > 0) & (num_pieces > 1), num_pieces, 0))
    tl.store(schedule_ptr + 7, first)
