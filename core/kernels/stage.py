"""What a captured decode step does beside the model: stage its rows, choose and store tokens.

All input that changes from step to step is one packed int32 tensor, `DecodeRows.packed`; everything
else is on the device already. `TorchStaging` is the oracle, core.kernels.triton_stage what runs on
GPUs. Knows nothing of models, plans or capturing.

Packed: number of real rows, number of new page-table entries, then FIELDS lists of S values each:
slot and position of every row; slot, column and page of every new entry. What follows the real rows
and the new entries is undefined.

Shape legend: S rows (of one token each, padding included), L most tokens of a slot, M most pages of
a slot, Z slots, P tokens in a page, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

HEADER, FIELDS = 2, 5


def packed_length(num_rows: int) -> int:
    """Numbers in the packed input of so many rows."""
    return HEADER + FIELDS * num_rows


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The buffers of a captured step of S rows, all on the device. Staging writes all but `packed`;
    padding rows have token 0, position 0, no slot (-1), and a context of 0 tokens."""

    packed: Tensor  # int32 (2 + 5 S,)
    input_ids_S: Tensor  # int64
    positions_S: Tensor  # int64
    kv_slots_S: Tensor  # int64: page * P + offset
    context_lens_S: Tensor  # int32
    page_table_SM: Tensor  # int32; columns that a row doesn't use are left as they are

    @property
    def num_real(self) -> Tensor:
        """int32 (1,)"""
        return self.packed[:1]

    def field(self, index: int) -> Tensor:
        """One of the packed lists."""
        size = self.input_ids_S.shape[0]
        return self.packed[HEADER + index * size : HEADER + (index + 1) * size]


class Staging(Protocol):
    """Operations that can be captured: none waits for the device."""

    def stage(self, rows: DecodeRows, tokens_ZL: Tensor, pages_ZM: Tensor, page_size: int) -> None:
        """Write the new page-table entries into `pages_ZM`, then the rows' buffers."""
        ...

    def best(self, logits_SV: Tensor) -> Tensor:
        """The first of each row's largest logits, int64 (S,). Takes NaN for the least."""
        ...

    def store(self, ids_S: Tensor, rows: DecodeRows, tokens_ZL: Tensor) -> None:
        """Write real rows' tokens at the position after the row's."""
        ...


class TorchStaging:
    """In plain torch; waits for the device."""

    def stage(self, rows: DecodeRows, tokens_ZL: Tensor, pages_ZM: Tensor, page_size: int) -> None:
        """One field after the other."""
        num_real, num_entries = rows.packed[:HEADER].tolist()
        slots, columns, pages = (rows.field(field)[:num_entries].long() for field in (2, 3, 4))
        pages_ZM[slots, columns] = pages.to(torch.int32)
        slots_R, positions_R = (rows.field(field)[:num_real].long() for field in (0, 1))
        for buffer_S, padding in (
            (rows.input_ids_S, 0),
            (rows.positions_S, 0),
            (rows.kv_slots_S, -1),
            (rows.context_lens_S, 0),
        ):
            buffer_S[num_real:] = padding
        rows.input_ids_S[:num_real] = tokens_ZL[slots_R, positions_R].long()
        rows.positions_S[:num_real] = positions_R
        pages_R = pages_ZM[slots_R, positions_R // page_size].long()
        rows.kv_slots_S[:num_real] = pages_R * page_size + positions_R % page_size
        rows.context_lens_S[:num_real] = (positions_R + 1).to(torch.int32)
        for row, (slot, position) in enumerate(
            zip(slots_R.tolist(), positions_R.tolist(), strict=True)
        ):
            used = position // page_size + 1
            rows.page_table_SM[row, :used] = pages_ZM[slot, :used]

    def best(self, logits_SV: Tensor) -> Tensor:
        """By torch's argmax."""
        return logits_SV.nan_to_num(-torch.inf, torch.inf, -torch.inf).argmax(dim=-1)

    def store(self, ids_S: Tensor, rows: DecodeRows, tokens_ZL: Tensor) -> None:
        """By indexing."""
        num_real = int(rows.packed[0])
        slots_R, positions_R = (rows.field(field)[:num_real].long() for field in (0, 1))
        tokens_ZL[slots_R, positions_R + 1] = ids_S[:num_real].to(torch.int32)
