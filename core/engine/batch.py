"""Turns a StepPlan into the tensors one step needs. Knows nothing of models or sampling.

Shape legend: S sequences (rows of the plan), T tokens computed in the step, L most tokens of a
slot, M most pages of a slot, P tokens in a page.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.interfaces.attention import SequenceBatch
from core.interfaces.messages import SlotInit, StepPlan


class SlotState:
    """What the device remembers of each running request: its tokens and its page table.

    `tokens_SL` int32 (slots, max_model_len + 1): prompt and generated ids; a step writes the ids
    it samples, so the next step reads them without the host. `pages_SM` int32.
    """

    def __init__(
        self, *, num_slots: int, max_tokens: int, page_size: int, device: torch.device
    ) -> None:
        self.page_size = page_size
        self.device = device
        num_columns = -(-max_tokens // page_size)
        self.tokens_SL = torch.zeros((num_slots, max_tokens + 1), dtype=torch.int32, device=device)
        self.pages_SM = torch.zeros((num_slots, num_columns), dtype=torch.int32, device=device)

    def update(self, plan: StepPlan) -> None:
        """Take over new slots and page-table entries, before the step that needs them."""
        for init in plan.inits:
            self._init_slot(init)
        if plan.table_slots:
            entries = np.array(
                [plan.table_slots, plan.table_columns, plan.table_pages], dtype=np.int64
            )
            slots, columns, pages = to_device(entries, self.device)
            self.pages_SM[slots, columns] = pages.to(torch.int32)

    def _init_slot(self, init: SlotInit) -> None:
        ids = to_device(np.asarray(init.token_ids, dtype=np.int32), self.device)
        self.tokens_SL[init.slot, : len(init.token_ids)] = ids


@dataclass(slots=True)
class Batch:
    """One step, staged. `decode` and `prefill` are None where the step has no such rows.

    Ids and positions may be padded at the end, with zeros; the rest counts real tokens only.
    """

    input_ids_T: Tensor  # int64
    positions_T: Tensor  # int64
    kv_slots_T: Tensor  # int64: page * P + offset
    num_real: Tensor  # int32 (1,): T without the padding
    num_decodes: int
    decode: SequenceBatch | None
    prefill: SequenceBatch | None
    row_ends: np.ndarray  # int64 (S): index after each row's last token


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy a numpy array to the device without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def stage(plan: StepPlan, state: SlotState, num_rows: int) -> Batch:
    """Stage a step, padded to `num_rows`: `state.update(plan)` must have been called."""
    device, page_size = state.device, state.page_size
    slots_S, starts_S, lengths_S = np.array([plan.slots, plan.starts, plan.lengths], dtype=np.int64)
    row_ends = np.cumsum(lengths_S)
    total = int(lengths_S.sum())
    offsets_T = np.arange(total) - np.repeat(row_ends - lengths_S, lengths_S)
    per_token = np.stack(
        (np.repeat(slots_S, lengths_S), np.repeat(starts_S, lengths_S) + offsets_T)
    )
    token_slots_T, positions_T = to_device(per_token, device)
    pages_T = state.pages_SM[token_slots_T, positions_T // page_size].long()
    sequences = _Sequences(state, slots_S, starts_S + lengths_S, lengths_S)
    num_decodes, num_sequences = plan.num_decodes, len(plan.slots)
    padding = (0, num_rows - total)
    return Batch(
        input_ids_T=F.pad(state.tokens_SL[token_slots_T, positions_T].long(), padding),
        positions_T=F.pad(positions_T, padding),
        kv_slots_T=pages_T * page_size + positions_T % page_size,
        num_real=torch.full((1,), total, dtype=torch.int32, device=device),
        num_decodes=num_decodes,
        decode=sequences.part(0, num_decodes) if num_decodes else None,
        prefill=sequences.part(num_decodes, num_sequences) if num_decodes < num_sequences else None,
        row_ends=row_ends,
    )


class _Sequences:
    """The sequences of a step on the host; `part` makes the SequenceBatch of one phase."""

    def __init__(
        self, state: SlotState, slots: np.ndarray, contexts: np.ndarray, queries: np.ndarray
    ) -> None:
        self.state, self.slots, self.contexts, self.queries = state, slots, contexts, queries

    def part(self, first: int, stop: int) -> SequenceBatch:
        state = self.state
        slots, contexts, queries = (
            array[first:stop] for array in (self.slots, self.contexts, self.queries)
        )
        packed = np.zeros((3, stop - first + 1), dtype=np.int32)
        np.cumsum(queries, out=packed[0, 1:])
        packed[1, :-1] = contexts
        packed[2, :-1] = slots
        query_starts, context_lens, slot_ids = to_device(packed, state.device)
        num_columns = -(-int(contexts.max()) // state.page_size)
        return SequenceBatch(
            query_lens=queries.tolist(),
            context_lens=contexts.tolist(),
            query_starts_S1=query_starts,
            context_lens_S=context_lens[:-1],
            page_table_SM=state.pages_SM[:, :num_columns].index_select(0, slot_ids[:-1]),
        )
