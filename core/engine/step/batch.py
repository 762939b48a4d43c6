"""Turns a ScheduledStep into the tensors one eager step needs. Knows nothing of models or sampling.

Shape legend: S sequences (rows of the scheduled step), T tokens computed in it, R rows of it that
sample, L most tokens of a slot, M most pages of a slot, P tokens in a page.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from core.interfaces.attention import SequenceBatch
from core.interfaces.messages import ScheduledStep, SlotInit

TORCH_DTYPES = {
    np.dtype(np.int32).char: torch.int32,
    np.dtype(np.int64).char: torch.int64,
    np.dtype(np.float32).char: torch.float32,
    np.dtype(np.float64).char: torch.float64,
}
Ints = npt.NDArray[np.int64]


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

    def update(self, scheduled: ScheduledStep) -> None:
        """Take over new slots and page-table entries, before the step that needs them."""
        self.enter(scheduled)
        if scheduled.table_slots:
            entries = np.array(
                [scheduled.table_slots, scheduled.table_columns, scheduled.table_pages],
                dtype=np.int64,
            )
            slots, columns, pages = to_device(entries, self.device)
            self.pages_SM[slots, columns] = pages.to(torch.int32)

    def enter(self, scheduled: ScheduledStep) -> None:
        """Take over new slots alone."""
        for init in scheduled.inits:
            self._init_slot(init)

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


@dataclass(slots=True)
class SamplingRows:
    """The rows of a step that choose a token."""

    slots: Ints  # on the host (R,)
    positions: Ints  # of the tokens that are chosen, on the host (R,)
    last_R: Tensor  # int64 on the device: index of each row's last token
    num_chosen: Tensor  # int32 (1,) on the device: R
    slots_R: Tensor  # int64 on the device
    positions_R: Tensor  # int64 on the device


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy a numpy array to the device without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def send(device: torch.device, *arrays: npt.NDArray[Any]) -> list[Tensor]:
    """Arrays of any length, copied to the device at once; each starts at a multiple of 8 bytes."""
    ends = np.cumsum([-(-array.nbytes // 8) for array in arrays]).tolist()
    places = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    packed = np.zeros(ends[-1], dtype=np.int64)
    for array, place in zip(arrays, places, strict=True):
        packed[place].view(array.dtype)[: len(array)] = array
    on_device = to_device(packed, device)
    return [
        on_device[place].view(TORCH_DTYPES[array.dtype.char])[: len(array)]
        for array, place in zip(arrays, places, strict=True)
    ]


def stage(scheduled: ScheduledStep, state: SlotState, num_rows: int) -> tuple[Batch, SamplingRows]:
    """Stage a step, padded to `num_rows`: `state.update(scheduled)` must have been called."""
    device, page_size = state.device, state.page_size
    slots_S, starts_S, lengths_S = np.array(
        [scheduled.slots, scheduled.starts, scheduled.lengths], dtype=np.int64
    )
    contexts_S = starts_S + lengths_S
    row_ends_S = np.cumsum(lengths_S)
    total = int(lengths_S.sum())
    offsets_T = np.arange(total) - np.repeat(row_ends_S - lengths_S, lengths_S)
    sampling = np.array(scheduled.samples, dtype=bool)
    split = scheduled.num_decodes
    parts = [part for part in (slice(0, split), slice(split, None)) if len(slots_S[part])]
    token_slots_T, positions_T, last_R, slots_R, next_R, num_real, num_chosen, *sequences = send(
        device,
        np.repeat(slots_S, lengths_S),
        np.repeat(starts_S, lengths_S) + offsets_T,
        row_ends_S[sampling] - 1,
        slots_S[sampling],
        contexts_S[sampling],
        np.array([total], dtype=np.int32),
        np.array([sampling.sum()], dtype=np.int32),
        *(array for part in parts for array in _sequences(lengths_S[part], contexts_S[part])),
        *(slots_S[part].astype(np.int32) for part in parts),
    )
    pages_T = state.pages_SM[token_slots_T, positions_T // page_size].long()
    padding = (0, num_rows - total)
    batches = []
    for index, part in enumerate(parts):
        longest = int(contexts_S[part].max())
        slot_ids = sequences[2 * len(parts) + index]
        batches.append(
            SequenceBatch(
                query_lens=lengths_S[part].tolist(),
                context_lens=contexts_S[part].tolist(),
                query_starts_S1=sequences[2 * index],
                context_lens_S=sequences[2 * index + 1],
                page_table_SM=state.pages_SM[:, : -(-longest // page_size)].index_select(
                    0, slot_ids
                ),
            )
        )
    batch = Batch(
        input_ids_T=F.pad(state.tokens_SL[token_slots_T, positions_T].long(), padding),
        positions_T=F.pad(positions_T, padding),
        kv_slots_T=pages_T * page_size + positions_T % page_size,
        num_real=num_real,
        num_decodes=split,
        decode=batches[0] if split else None,
        prefill=batches[-1] if split < len(slots_S) else None,
    )
    chosen = slots_S[sampling], contexts_S[sampling]
    return batch, SamplingRows(*chosen, last_R, num_chosen, slots_R, next_R)


def _sequences(lengths: Ints, contexts: Ints) -> tuple[npt.NDArray[np.int32], ...]:
    """Cumulative query lengths and contexts of one phase."""
    starts = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=starts[1:])
    return starts, contexts.astype(np.int32)
