"""What a captured step does beside the model: stage its rows, choose and store tokens.

All input that changes from step to step is one packed int32 tensor; everything else is on the
device already. `TorchStaging` is the oracle, core.devices.cuda.triton_stage what runs on GPUs.
Knows nothing of models, plans or capturing.

Packed for decodes: number of real rows, number of new page-table entries, then FIELDS lists of S
values each: slot and position of every row; slot, column and page of every new entry. What follows
the real rows and the new entries is undefined.

Packed for prompts: number of real rows, number of real sequences, the first row of each sequence
(S + 1 values, that of padding being the number of real rows), then 3 lists of S values, 0 for
padding: slot, context with the new rows, and the position of the token to store (-1: none).

Shape legend: T rows (padding included), S sequences (padding included; of decodes each has one
row), L most tokens of a slot, M most pages of a slot, Z slots, P tokens in a page, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

HEADER, FIELDS = 2, 5


def packed_length(num_rows: int) -> int:
    """Numbers in the packed input of so many decodes."""
    return HEADER + FIELDS * num_rows


def packed_prompts_length(num_sequences: int) -> int:
    """Numbers in the packed input of so many sequences with prompts."""
    return HEADER + 1 + 4 * num_sequences


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

    @property
    def places(self) -> "TokenPlaces":
        """Of the tokens that follow the rows."""
        return TokenPlaces(self.num_real, self.field(0), self.field(1), 1)


@dataclass(frozen=True, slots=True)
class PromptRows:
    """The buffers of a captured step of T rows of S sequences, some with several rows. Staging
    writes all but `packed`; padding as in DecodeRows."""

    packed: Tensor  # int32 (3 + 4 S,)
    input_ids_T: Tensor  # int64
    positions_T: Tensor  # int64
    kv_slots_T: Tensor  # int64
    last_S: Tensor  # int64: each sequence's last row; some row for padding
    page_table_SM: Tensor  # int32; columns that a sequence doesn't use are left as they are

    @property
    def num_sequences(self) -> int:
        """S"""
        return self.last_S.shape[0]

    @property
    def num_real(self) -> Tensor:
        """int32 (1,)"""
        return self.packed[:1]

    @property
    def num_real_sequences(self) -> Tensor:
        """int32 (1,)"""
        return self.packed[1:2]

    @property
    def starts_S1(self) -> Tensor:
        """int32: first row of each sequence"""
        return self.packed[HEADER : HEADER + self.num_sequences + 1]

    def field(self, index: int) -> Tensor:
        """One of the packed lists behind `starts_S1`."""
        size = self.num_sequences
        first = HEADER + 1 + (index + 1) * size
        return self.packed[first : first + size]

    @property
    def places(self) -> "TokenPlaces":
        """Of the tokens that are chosen."""
        return TokenPlaces(self.num_real_sequences, self.field(0), self.field(2), 0)


@dataclass(frozen=True, slots=True)
class TokenPlaces:
    """Where chosen tokens go: the first `count` are stored, those with a negative position not."""

    count: Tensor  # int32 (1,)
    slots_S: Tensor  # int32
    positions_S: Tensor  # int32
    offset: int  # added to positions


class Staging(Protocol):
    """Operations that can be captured: none waits for the device."""

    def stage(self, rows: DecodeRows, tokens_ZL: Tensor, pages_ZM: Tensor, page_size: int) -> None:
        """Write the new page-table entries into `pages_ZM`, then the rows' buffers."""
        ...

    def best_parts(self, logits_SL: Tensor, first_id: int, num_tokens: int) -> Tensor:
        """int32 (S, X, 2): for each of X parts of every row its largest logit, as bits of a
        float32, and the first id that has it. Column 0 is the token `first_id`; those from
        `num_tokens` on are none. NaN counts as the least. X depends on L alone."""
        ...

    def best_of_parts(self, parts_NSX2: Tensor) -> Tensor:
        """The first of each row's largest logits, int64 (S,), of the parts of N ranks, whose ids
        rise from rank to rank."""
        ...

    def stage_prompts(
        self, rows: PromptRows, tokens_ZL: Tensor, pages_ZM: Tensor, page_size: int
    ) -> None:
        """Write the rows' buffers."""
        ...

    def store(self, ids_S: Tensor, places: TokenPlaces, tokens_ZL: Tensor) -> None:
        """Write tokens where the next step reads them."""
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

    def best_parts(self, logits_SL: Tensor, first_id: int, num_tokens: int) -> Tensor:
        """One part, by torch's max."""
        known_SL = logits_SL.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        known_SL[:, num_tokens:] = -torch.inf
        best_S, ids_S = known_SL.max(dim=-1)
        bits_S = best_S.contiguous().view(torch.int32)
        return torch.stack((bits_S, (ids_S + first_id).int()), dim=-1).unsqueeze(1)

    def best_of_parts(self, parts_NSX2: Tensor) -> Tensor:
        """By torch's max."""
        best, ids = parts_NSX2.transpose(0, 1).flatten(1, 2).unbind(-1)
        places_S1 = best.contiguous().view(torch.float32).argmax(dim=1, keepdim=True)
        return ids.gather(1, places_S1).squeeze(1).long()

    def stage_prompts(
        self, rows: PromptRows, tokens_ZL: Tensor, pages_ZM: Tensor, page_size: int
    ) -> None:
        """One sequence after the other."""
        num_real, num_sequences = rows.packed[:HEADER].tolist()
        rows.input_ids_T.zero_()
        rows.positions_T.zero_()
        rows.kv_slots_T.fill_(-1)
        starts, slots, contexts = (
            part.tolist() for part in (rows.starts_S1, rows.field(0), rows.field(1))
        )
        rows.last_S.fill_(max(num_real - 1, 0))
        for index in range(num_sequences):
            first, stop, slot = starts[index], starts[index + 1], slots[index]
            used = -(-contexts[index] // page_size)
            positions = torch.arange(contexts[index] - (stop - first), contexts[index])
            positions = positions.to(tokens_ZL.device)
            rows.input_ids_T[first:stop] = tokens_ZL[slot, positions].long()
            rows.positions_T[first:stop] = positions
            pages = pages_ZM[slot, positions // page_size].long()
            rows.kv_slots_T[first:stop] = pages * page_size + positions % page_size
            rows.last_S[index] = stop - 1
            rows.page_table_SM[index, :used] = pages_ZM[slot, :used]

    def store(self, ids_S: Tensor, places: TokenPlaces, tokens_ZL: Tensor) -> None:
        """By indexing."""
        count = int(places.count)
        slots_R, positions_R = (
            places.slots_S[:count].long(),
            places.positions_S[:count].long() + places.offset,
        )
        known = positions_R >= 0
        ids_R = ids_S[:count].to(torch.int32)
        tokens_ZL[slots_R[known], positions_R[known]] = ids_R[known]
