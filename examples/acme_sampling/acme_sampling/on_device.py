"""Masks tokens on the device that has the logits.

Shape legend: X columns of the logits that are here, L tokens of a slot, W windows of `size` tokens.
"""

import torch
from torch import Tensor

from acme_sampling.params import NgramParams
from core.interfaces.sampling import ProcessedRows


class NgramMask:
    """A rank's; keeps the size that each slot's request asked for."""

    def __init__(self) -> None:
        self._size: dict[int, int] = {}

    def init_slot(self, slot: int, num_prompt: int, params: NgramParams) -> None:
        """See LogitsProcessor."""
        self._size[slot] = params.size

    def apply(self, logits_PX: Tensor, rows: ProcessedRows) -> None:
        """Row by row; every operation is queued, none waits for the device."""
        for row, (slot, known) in enumerate(
            zip(rows.slots_P.tolist(), rows.positions_P.tolist(), strict=True)
        ):
            banned_X = self._banned(rows.tokens_SL[slot, :known], self._size[slot], rows)
            logits_PX[row].masked_fill_(banned_X, -torch.inf)

    def _banned(self, tokens_L: Tensor, size: int, rows: ProcessedRows) -> Tensor:
        """Which columns would repeat the `size` tokens that end with them; bool (X,)."""
        # A column more, for windows that don't match and for the tokens of other ranks.
        banned_X = tokens_L.new_zeros(rows.num_tokens + 1, dtype=torch.bool)
        if len(tokens_L) >= size:
            windows_WN = tokens_L.unfold(0, size, 1)
            last_N = tokens_L[len(tokens_L) - size + 1 :]
            matches_W = (windows_WN[:, :-1] == last_N).all(dim=1)
            column_W = windows_WN[:, -1].long() - rows.first_id
            here_W = matches_W & (column_W >= 0) & (column_W < rows.num_tokens)
            banned_X.index_fill_(0, torch.where(here_W, column_W, rows.num_tokens), True)
        return banned_X[:-1]
