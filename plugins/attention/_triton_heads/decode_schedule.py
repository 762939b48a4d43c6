"""The schedule of paged decode on a GPU: who attends which tiles, made on the device.

The work of a step is a line of tiles: sequence after sequence, in each KV head after KV head, in
each the tiles of the context; one head of one sequence is a *unit*. The line is cut into splits
of equal length, one for each program, so that all end at once whatever the lengths are (where these
are equal, a split may be rounded up to whole units, and some programs are left without).

Programs are not equally fast: the first of a multiprocessor gets more of the memory's time. With
several *levels* a program's equal part is three quarters of it; the rest of the line is cut into
ever shorter splits, P of them in each level, which programs take as they end. Where the cuts are
doesn't depend on who takes what: the same input gives the same bits. Equally long sequences are not
cut further, as their programs end close together.

What a split covers of a unit is a *piece*: a whole unit's result goes to `out`, others' to the
workspace, where a split has place 0 for the unit that it goes on with and place 1 for the one it
begins. Lengths are read on the device alone. Knows nothing of what is done with a tile.

Shape legend: P programs, S sequences, N tokens of a tile, G KV heads.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

SCHEDULE_COLUMNS = tl.constexpr(12)  # see `schedule_kernel`
_LEAST_TILES = tl.constexpr(8)  # of a program, below which all are in the first level


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
    """(tiles for each program, those of them that are for later levels, tiles of the line,
    sequences without tokens). WHOLE lets programs end where units do, if all sequences are equally
    long and it takes at most a sixteenth more: there are no pieces then."""
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
    equal = num_real * longest == num_tiles
    share = tl.maximum(tl.cdiv(num_tiles * G, P), 1)
    if WHOLE:
        whole = tl.cdiv(share, longest) * longest
        if equal & (whole * 16 <= share * 17):
            share = whole
    later = tl.where(equal | (share < _LEAST_TILES), 0, share // 4)
    return share, later, num_tiles * G, num_sequences - num_real


@triton.jit
def _level(share, later, level: tl.constexpr, LEVELS: tl.constexpr):
    """Tiles of a level's splits: what isn't for later, then half of what is left each time, then
    the rest."""
    if LEVELS == 1:
        size = share
    elif level == 0:
        size = share - later
    elif level < LEVELS - 1:
        size = (later >> (level - 1)) - (later >> level)
    else:
        size = later >> (level - 1)
    return size


@triton.jit
def _bounds(split, share, later, P: tl.constexpr, LEVELS: tl.constexpr):
    """(first tile, number of tiles) of a split, as far as the line goes."""
    begin = 0
    size = 0
    level_begin = 0
    for level in tl.static_range(LEVELS):
        level_size = _level(share, later, level, LEVELS)
        inside = split // P == level
        begin = tl.where(inside, level_begin + split % P * level_size, begin)
        size = tl.where(inside, level_size, size)
        level_begin += P * level_size
    return begin, size


@triton.jit
def _split_of(place, share, later, P: tl.constexpr, LEVELS: tl.constexpr):
    """The split that a tile of the line belongs to."""
    split = 0
    level_begin = 0
    for level in tl.static_range(LEVELS):
        size = _level(share, later, level, LEVELS)
        index = level * P + (place - level_begin) // tl.maximum(size, 1)
        inside = (place >= level_begin) & (place < level_begin + P * size)
        split = tl.where(inside, index, split)
        level_begin += P * size
    return split


@triton.jit(
    do_not_specialize=["num_sequences"], do_not_specialize_on_alignment=["context_lens_ptr"]
)
def schedule_kernel(
    context_lens_ptr,
    schedule_ptr,
    num_sequences,
    P: tl.constexpr,
    LEVELS: tl.constexpr,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One row of a step's schedule: of the P * LEVELS splits, then of units (where these are
    wanted).

    Columns 0 to 3 of a split: sequence, KV head and tile where it begins; its number of tiles.
    4 to 7, of the unit that a split ends in, if it begins it, or of a unit: sequence and KV head,
    the number of its pieces (0: not in pieces, or begun by another split), and the split that
    begins it. 8 and 9 of a split: pieces and first split of the unit that it goes on with. 10:
    sequences without tokens. 11: splits with tiles beyond the first level."""
    NUM_STRETCHES: tl.constexpr = P * LEVELS
    row = tl.program_id(0)
    schedule_ptr += row * SCHEDULE_COLUMNS
    share, later, num_tiles, num_empty = _share(
        context_lens_ptr, num_sequences, P, G, BLOCK_N, WHOLE
    )
    if row < NUM_STRETCHES:
        begin, size = _bounds(row, share, later, P, LEVELS)
        end = tl.minimum(begin + size, num_tiles)
        tl.store(schedule_ptr + 3, tl.maximum(end - begin, 0))
        tl.store(schedule_ptr + 6, 0)
        tl.store(schedule_ptr + 10, num_empty)
        last = _split_of(tl.maximum(num_tiles - 1, 0), share, later, P, LEVELS)
        tl.store(schedule_ptr + 11, tl.maximum(last - P + 1, 0))
        if begin < end:
            sequence, num_before = _find(context_lens_ptr, num_sequences, begin, G, BLOCK_N)
            length = tl.cdiv(tl.load(context_lens_ptr + sequence), BLOCK_N)
            tl.store(schedule_ptr, sequence)
            tl.store(schedule_ptr + 1, (begin - num_before * G) // length)
            tile = (begin - num_before * G) % length
            tl.store(schedule_ptr + 2, tile)
            first, num_pieces = _pieces_of(begin - tile, length, share, later, P, LEVELS)
            tl.store(schedule_ptr + 8, num_pieces)
            tl.store(schedule_ptr + 9, first)
            sequence, num_before = _find(context_lens_ptr, num_sequences, end - 1, G, BLOCK_N)
            length = tl.cdiv(tl.load(context_lens_ptr + sequence), BLOCK_N)
            kv_head = (end - 1 - num_before * G) // length
            unit_begin = num_before * G + kv_head * length
            if unit_begin >= begin:
                _store_unit(
                    schedule_ptr, sequence, kv_head, unit_begin, length, share, later, P, LEVELS
                )
    else:
        sequence = (row - NUM_STRETCHES) // G
        kv_head = (row - NUM_STRETCHES) % G
        length = tl.cdiv(tl.load(context_lens_ptr + sequence), BLOCK_N)
        unit_begin = _count_tiles(context_lens_ptr, sequence, BLOCK_N) * G + kv_head * length
        _store_unit(schedule_ptr, sequence, kv_head, unit_begin, length, share, later, P, LEVELS)


@triton.jit
def _pieces_of(unit_begin, length, share, later, P: tl.constexpr, LEVELS: tl.constexpr):
    """(the split that begins a unit, those that have a part in it)."""
    first = _split_of(unit_begin, share, later, P, LEVELS)
    return first, _split_of(unit_begin + length - 1, share, later, P, LEVELS) - first + 1


@triton.jit
def _store_unit(
    schedule_ptr, sequence, kv_head, unit_begin, length, share, later, P: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    first, num_pieces = _pieces_of(unit_begin, length, share, later, P, LEVELS)
    tl.store(schedule_ptr + 4, sequence)
    tl.store(schedule_ptr + 5, kv_head)
    tl.store(schedule_ptr + 6, tl.where((length > 0) & (num_pieces > 1), num_pieces, 0))
    tl.store(schedule_ptr + 7, first)
