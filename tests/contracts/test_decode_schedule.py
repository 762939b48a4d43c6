"""The schedule of paged decode gives every tile to one program, and cuts no more than it has to.

Compared with the line of tiles written out. In Triton's interpreter where there is no GPU.
"""

import random
from collections.abc import Iterator

import pytest
import torch

from plugins.attention._triton_heads.decode_schedule import SCHEDULE_COLUMNS, schedule_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILE = 16


def schedule(
    lens: list[int], programs: int, heads: int, *, whole: bool = False, levels: int = 1
) -> list[list[int]]:
    """Rows of the splits, then of units where these are fewer."""
    units, splits = len(lens) * heads, programs * levels
    num_rows = splits + (units if units < splits else 0)
    schedule_RX = torch.full((num_rows, SCHEDULE_COLUMNS.value), -9, dtype=torch.int32)
    schedule_RX = schedule_RX.to(DEVICE)
    schedule_kernel[(num_rows,)](
        torch.tensor(lens, dtype=torch.int32, device=DEVICE),
        schedule_RX,
        len(lens),
        P=programs,
        LEVELS=levels,
        G=heads,
        BLOCK_N=TILE,
        WHOLE=whole,
        num_warps=4,
    )
    rows: list[list[int]] = schedule_RX.tolist()
    return rows


def cases() -> Iterator[tuple[list[int], int, int]]:
    source = random.Random(5)
    for index in range(24):
        count = source.randint(1, 40)
        equal = source.choice((1, 160, 200))
        lens = [
            [source.randint(0, 300) for _ in range(count)],
            [source.choice((0, equal)) for _ in range(count)],
            [equal] * count,
        ][index % 3]
        yield lens, source.choice((1, 3, 7, 16)), source.choice((1, 1, 2))
    yield [0, 0], 4, 1
    yield [5] * 300, 7, 1


@pytest.mark.each_choice
@pytest.mark.parametrize(("whole", "levels"), [(False, 1), (True, 1), (False, 2), (False, 5)])
@pytest.mark.parametrize(("lens", "programs", "heads"), list(cases()))
def test_every_tile_is_in_one_split(
    lens: list[int], programs: int, heads: int, whole: bool, levels: int
) -> None:
    line = [
        (sequence, head, tile)
        for sequence, length in enumerate(lens)
        for head in range(heads)
        for tile in range(-(-length // TILE))
    ]
    rows = schedule(lens, programs, heads, whole=whole, levels=levels)
    at = 0
    splits: list[set[tuple[int, int]]] = []  # units that each has a part in
    for sequence, head, tile, count, *_ in rows[: programs * levels]:
        if count:
            assert line[at] == (sequence, head, tile)
        splits.append({unit[:2] for unit in line[at : at + count]})
        at += count
    assert at == len(line)
    for sequence, head, pieces, first in (row[4:8] for row in rows):
        if pieces:
            parts = [i for i, units in enumerate(splits) if (sequence, head) in units]
            assert parts == list(range(first, first + pieces))
    for row in rows[: programs * levels]:
        assert row[10] == lens.count(0)
        assert row[11] == sum(map(bool, splits[programs:]))
        if row[2]:  # goes on with a unit that another one begins
            parts = [i for i, units in enumerate(splits) if (row[0], row[1]) in units]
            assert parts == list(range(row[9], row[9] + row[8]))


def test_levels_leave_ever_shorter_splits() -> None:
    rows = schedule([64 * TILE] * 7 + [40 * TILE, 24 * TILE], 4, 1, levels=5)
    assert [row[3] for row in rows[:20]] == [n for n in (96, 16, 8, 4, 4) for _ in range(4)]
    few = schedule([6 * TILE, 8 * TILE] * 2, 4, 1, levels=5)
    assert [row[3] for row in few[:20]] == [7] * 4 + [0] * 16
    equal = schedule([64 * TILE, 0] * 8, 4, 1, levels=5)
    assert [row[3] for row in equal[:20]] == [128] * 4 + [0] * 16


@pytest.mark.parametrize(
    ("lens", "programs", "shares"),
    [
        ([61] * 31, 4, [32, 32, 32, 28]),  # 4 tiles each; without: 31 for each program
        ([61, 0, 61, 61, 0, *[61] * 28], 4, [32, 32, 32, 28]),  # padding between them
        ([61] * 5, 4, [5, 5, 5, 5]),  # whole ones would take 8
        ([65] + [61] * 30, 4, [32, 32, 32, 29]),  # one is a tile longer
    ],
)
def test_equally_long_sequences_are_not_cut_where_that_costs_little(
    lens: list[int], programs: int, shares: list[int]
) -> None:
    rows = schedule(lens, programs, 1, whole=True)
    assert [row[3] for row in rows] == shares
    pieces = [row[6] for row in rows]
    assert (not any(pieces)) == (shares == [32, 32, 32, 28])
