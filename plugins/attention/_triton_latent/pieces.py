"""How contexts are cut for expanded attention: pieces, and groups that are expanded together.

Of a long context a part at a time is expanded, to bound memory. A group is what one call of
`expand` makes: pieces of one or more sequences, so that many short prompts cost one call, too.
Plain integers but for the last two functions. Shape legend: see core.interfaces.latent_attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.interfaces.attention import SequenceBatch


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring tokens of one sequence, and the new rows that see any of them."""

    sequence: int
    first_token: int  # its position in the sequence
    num_tokens: int
    offset: int  # of its first token in its group
    first_row: int  # in the step; the rows reach to the sequence's last
    num_rows: int
    first_position: int  # of the first row

    @property
    def end(self) -> int:
        """Position of the first token after the piece; rows before that see no later piece."""
        return self.first_token + self.num_tokens

    @property
    def is_last(self) -> bool:
        """Whether it ends with its sequence."""
        return self.first_position + self.num_rows == self.end

    @property
    def is_whole(self) -> bool:
        """Whether its rows see nothing but this piece."""
        return self.first_token == 0 and self.is_last


def pieces_by_group(
    query_lens: Sequence[int], context_lens: Sequence[int], most_tokens: int
) -> list[list[Piece]]:
    """Groups of at most `most_tokens` tokens, to be computed in this order.

    A sequence is cut only where it is longer than a group, and pieces are as few as can be.
    """
    groups: list[list[Piece]] = []
    room = start_row = 0
    for sequence, (num_new, num_tokens) in enumerate(zip(query_lens, context_lens, strict=True)):
        prefix = num_tokens - num_new
        for first in range(0, num_tokens, most_tokens):
            size = min(most_tokens, num_tokens - first)
            if size > room:
                groups.append([])
                room = most_tokens
            hidden = max(first - prefix, 0)  # rows that stand before the piece
            groups[-1].append(
                Piece(
                    sequence,
                    first,
                    size,
                    most_tokens - room,
                    start_row + hidden,
                    num_new - hidden,
                    prefix + hidden,
                )
            )
            room -= size
        start_row += num_new
    return groups


def row_blocks(
    pieces: Sequence[Piece], block_rows: int
) -> list[tuple[int, int, int, int, int, int]]:
    """Rows that see one piece, in blocks; those that see most tokens first.

    Blocks are (first row in the step, rows, position of the first, place of the piece's first token
    in its group, its position, tokens of the piece).
    """
    blocks = [
        (
            piece.first_row + first,
            min(block_rows, piece.num_rows - first),
            piece.first_position + first,
            piece.offset,
            piece.first_token,
            piece.num_tokens,
        )
        for piece in pieces
        for first in range(0, piece.num_rows, block_rows)
    ]
    return blocks[::-1]


def token_slots(batch: SequenceBatch, pieces: Sequence[Piece], page_size: int) -> Tensor:
    """Token slots (int64, on the device) of a group, in the order of its pieces.

    The device is not waited for.
    """
    device = batch.page_table_SM.device
    rows = [[piece.sequence, piece.first_token, piece.num_tokens, piece.offset] for piece in pieces]
    sequence_I, first_I, size_I, offset_I = upload(rows, torch.int64, device).unbind(1)
    num_tokens = pieces[-1].offset + pieces[-1].num_tokens
    piece_X = torch.repeat_interleave(size_I, output_size=num_tokens)
    token_X = torch.arange(num_tokens, device=device) + (first_I - offset_I)[piece_X]
    pages_X = batch.page_table_SM[sequence_I[piece_X], token_X // page_size]
    return pages_X.long() * page_size + token_X % page_size


def upload(rows: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of integers on the device, without waiting for it."""
    host = torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
