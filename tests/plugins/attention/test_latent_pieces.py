"""How contexts are cut for either form of latent attention, and where tokens lie in the cache."""

import random

import pytest
import torch

from core.interfaces.attention import SequenceBatch
from plugins.attention._triton_latent.pieces import (
    Piece,
    pieces_by_group,
    row_blocks,
    token_slots,
)


def spans(groups: list[list[Piece]]) -> list[list[tuple[int, int, int]]]:
    return [[(p.sequence, p.first_token, p.num_tokens) for p in group] for group in groups]


def test_short_sequences_share_a_group() -> None:
    groups = pieces_by_group([3, 1, 2], [3, 4, 2], 10)
    assert spans(groups) == [[(0, 0, 3), (1, 0, 4), (2, 0, 2)]]
    assert [piece.offset for piece in groups[0]] == [0, 3, 7]
    assert all(piece.is_whole for piece in groups[0])


def test_a_sequence_that_fits_a_group_is_not_cut() -> None:
    assert spans(pieces_by_group([1, 1], [7, 6], 10)) == [[(0, 0, 7)], [(1, 0, 6)]]


def test_a_long_sequence_is_cut_and_its_rest_shares_a_group() -> None:
    groups = pieces_by_group([4, 1], [23, 5], 10)
    assert spans(groups) == [[(0, 0, 10)], [(0, 10, 10)], [(0, 20, 3), (1, 0, 5)]]
    rows = [(p.first_row, p.num_rows, p.first_position, p.is_last) for g in groups for p in g]
    # Row 0 stands at position 19: the last of the second piece, before the third.
    assert rows == [(0, 4, 19, False), (0, 4, 19, False), (1, 3, 20, True), (4, 1, 4, True)]


@pytest.mark.parametrize("seed", range(20))
def test_every_row_meets_every_token_it_sees_once(seed: int) -> None:
    source = random.Random(seed)
    query_lens = [source.randint(1, 30) for _ in range(source.randint(1, 8))]
    context_lens = [rows + source.choice((0, source.randint(1, 60))) for rows in query_lens]
    most = source.choice((1, 5, 16, 200))
    met: list[list[int]] = [[] for _ in range(sum(query_lens))]
    for group in pieces_by_group(query_lens, context_lens, most):
        assert sum(piece.num_tokens for piece in group) <= most
        taken = 0
        for piece in group:
            assert piece.offset == taken
            taken += piece.num_tokens
            for row in range(piece.num_rows):
                position = piece.first_position + row
                met[piece.first_row + row] += range(piece.first_token, min(position + 1, piece.end))
    positions = [
        context - rows + row
        for rows, context in zip(query_lens, context_lens, strict=True)
        for row in range(rows)
    ]
    assert met == [list(range(position + 1)) for position in positions]


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_slots_follow_the_page_table(page_size: int) -> None:
    context_lens = [20, 7, 33]
    table_SM = torch.randperm(3 * 40, generator=torch.Generator().manual_seed(0)).view(3, 40).int()
    lens = torch.tensor(context_lens, dtype=torch.int32)
    batch = SequenceBatch([2, 7, 1], context_lens, torch.tensor([0, 2, 9, 10]), lens, table_SM)
    for group in pieces_by_group(batch.query_lens, context_lens, 12):
        expected = [
            int(table_SM[piece.sequence, token // page_size]) * page_size + token % page_size
            for piece in group
            for token in range(piece.first_token, piece.end)
        ]
        assert token_slots(batch, group, page_size).tolist() == expected


def test_blocks_hold_each_row_of_a_piece_once_and_start_with_the_longest() -> None:
    (pieces,) = pieces_by_group([20, 3], [25, 3], 100)
    assert row_blocks(pieces, 8) == [
        (20, 3, 0, 25, 0, 3),
        (16, 4, 21, 0, 0, 25),
        (8, 8, 13, 0, 0, 25),
        (0, 8, 5, 0, 0, 25),
    ]
