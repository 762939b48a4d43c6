"""Masks, on the device that has the logits, every token that is not allowed.

Shape legend: P rows, X columns of the logits that are here, A ids of one row, N ids of all.
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
        self._ids[slot] = self._sent(torch.tensor(params.ids, dtype=torch.int64))

    def apply(self, logits_PX: Tensor, rows: ProcessedRows) -> None:
        """See LogitsProcessor."""
        ids = [self._ids[slot] for slot in rows.slots_P.tolist()]
        counts = [len(each_A) for each_A in ids]
        row_N = self._sent(torch.arange(len(ids)).repeat_interleave(torch.tensor(counts)))
        column_N = torch.cat(ids) - rows.first_id
        elsewhere_N = (column_N < 0) | (column_N >= rows.num_tokens)
        column_N.masked_fill_(elsewhere_N, rows.num_tokens)
        # A column more, for the tokens of other ranks.
        width = rows.num_tokens + 1
        banned_PX = torch.ones((len(ids), width), dtype=torch.bool, device=self._device)
        banned_PX.view(-1).index_fill_(0, row_N * width + column_N, False)
        logits_PX.masked_fill_(banned_PX[:, :-1], -torch.inf)

    def _sent(self, host: Tensor) -> Tensor:
        """On the device, without waiting for it."""
        if self._device.type == "cuda":
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)
