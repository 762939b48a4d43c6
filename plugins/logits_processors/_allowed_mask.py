"""Masks, on the device that has the logits, every token that is not allowed.

Shape legend: X columns of the logits that are here.
"""

import torch
from torch import Tensor

from core.interfaces.sampling import ProcessedRows
from plugins.logits_processors._allowed_params import AllowedTokens


class AllowedMask:
    """A rank's; keeps the ids that each slot's request named."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ids: dict[int, Tensor] = {}  # int64, on the device

    def init_slot(self, slot: int, num_prompt: int, params: AllowedTokens) -> None:
        """See LogitsProcessor."""
        ids = torch.tensor(params.ids, dtype=torch.int64)
        if self._device.type == "cuda":
            ids = ids.pin_memory()
        self._ids[slot] = ids.to(self._device, non_blocking=True)

    def apply(self, logits_PX: Tensor, rows: ProcessedRows) -> None:
        """See LogitsProcessor."""
        for row, slot in enumerate(rows.slots_P.tolist()):
            column_N = self._ids[slot] - rows.first_id
            elsewhere_N = (column_N < 0) | (column_N >= rows.num_tokens)
            # A column more, for the tokens of other ranks.
            banned_X = torch.ones(rows.num_tokens + 1, dtype=torch.bool, device=self._device)
            banned_X.index_fill_(0, column_N.masked_fill_(elsewhere_N, rows.num_tokens), False)
            logits_PX[row].masked_fill_(banned_X[:-1], -torch.inf)
