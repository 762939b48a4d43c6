"""Staging of captured steps as Triton kernels: see core.ops.stage.

Knows nothing of models or plans. Shape legend: as there; X parts of a row of logits.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.gpu_tools.dependent_launch import (
    let_successor_start,
    options,
    wait_for_predecessor,
)
from core.ops.stage import HEADER, DecodeRows, PromptRows, TokenPlaces

_BLOCK_COLUMNS = 256  # page-table entries copied at a time
_BLOCK_ROWS = 128
_PART_V = 8192  # logits of one program, a multiple of
_BLOCK_V = 2048  # those it compares at once
_HEADER = tl.constexpr(HEADER)


@triton.jit
def enter_pages_kernel(packed_ptr, pages_ptr, size, pages_stride, BLOCK: tl.constexpr):
    """Write the new page-table entries."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < tl.load(packed_ptr + 1)
    list_ptr = packed_ptr + _HEADER + entries
    slots = tl.load(list_ptr + 2 * size, mask=inside, other=0).to(tl.int64)
    columns = tl.load(list_ptr + 3 * size, mask=inside, other=0)
    pages = tl.load(list_ptr + 4 * size, mask=inside, other=0)
    tl.store(pages_ptr + slots * pages_stride + columns, pages, mask=inside)


@triton.jit
def stage_kernel(
    packed_ptr,
    tokens_ptr,
    pages_ptr,
    ids_ptr,
    positions_ptr,
    kv_slots_ptr,
    contexts_ptr,
    table_ptr,
    tokens_stride,
    pages_stride,
    table_stride,
    size,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """All buffers of one row."""
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    row = tl.program_id(0)
    real = row < tl.load(packed_ptr)
    slot = tl.load(packed_ptr + _HEADER + row, mask=real, other=0).to(tl.int64)
    position = tl.load(packed_ptr + _HEADER + size + row, mask=real, other=0)
    token = tl.load(tokens_ptr + slot * tokens_stride + position, mask=real, other=0)
    column = position // PAGE_SIZE
    page = tl.load(pages_ptr + slot * pages_stride + column, mask=real, other=0).to(tl.int64)
    tl.store(ids_ptr + row, token.to(tl.int64))
    tl.store(positions_ptr + row, position.to(tl.int64))
    tl.store(kv_slots_ptr + row, tl.where(real, page * PAGE_SIZE + position % PAGE_SIZE, -1))
    tl.store(contexts_ptr + row, tl.where(real, position + 1, 0))
    used = tl.where(real, column + 1, 0)
    from_ptr = pages_ptr + slot * pages_stride
    to_ptr = table_ptr + row.to(tl.int64) * table_stride
    for first in range(0, used, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < used
        tl.store(to_ptr + columns, tl.load(from_ptr + columns, mask=inside), mask=inside)


@triton.jit
def best_of_part_kernel(
    logits_ptr,
    parts_ptr,
    stride,
    first_id,
    V: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The largest of PART logits of a row, and its first id; of nothing but NaN, the first."""
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first_column = part * PART
    best_B = tl.full((BLOCK,), -float("inf"), tl.float32)
    places_B = first_column + tl.arange(0, BLOCK)
    for step in tl.static_range(0, PART, BLOCK):
        columns_B = first_column + step + tl.arange(0, BLOCK)
        logits_ptrs = logits_ptr + row * stride + columns_B
        logits_B = tl.load(logits_ptrs, mask=columns_B < V, other=-float("inf"))
        better_B = logits_B > best_B  # never NaN, and of equals never a later one
        best_B = tl.where(better_B, logits_B, best_B)
        places_B = tl.where(better_B, columns_B, places_B)
    best = tl.max(best_B, axis=0)
    out_ptr = parts_ptr + 2 * (row * tl.num_programs(1) + part)
    tl.store(out_ptr, best.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 1, first_id + tl.min(tl.where(best_B == best, places_B, V), axis=0))


@triton.jit
def best_part_kernel(
    parts_ptr,
    out_ptr,
    rank_stride,
    NUM_RANKS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_X: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The first of a row's best parts."""
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    row = tl.program_id(0)
    ranks, parts = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_X)[None, :]
    inside = (ranks < NUM_RANKS) & (parts < NUM_PARTS)
    part_ptrs = parts_ptr + ranks * rank_stride + 2 * (row * NUM_PARTS + parts)
    best = tl.load(part_ptrs, mask=inside, other=0).to(tl.float32, bitcast=True)
    best = tl.where(inside, best, -float("inf"))
    ids = tl.load(part_ptrs + 1, mask=inside, other=0x7FFFFFFF)
    largest = tl.max(tl.max(best, axis=1), axis=0)
    ids = tl.where(best == largest, ids, 0x7FFFFFFF)
    tl.store(out_ptr + row, tl.min(tl.min(ids, axis=1), axis=0).to(tl.int64))


@triton.jit
def stage_prompt_rows_kernel(
    packed_ptr,
    tokens_ptr,
    pages_ptr,
    ids_ptr,
    positions_ptr,
    kv_slots_ptr,
    tokens_stride,
    pages_stride,
    num_rows,
    S: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Ids, positions and KV slots of BLOCK rows."""
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    real = rows < tl.load(packed_ptr)
    ends_ptr = packed_ptr + _HEADER + 1
    columns_S = tl.arange(0, BLOCK_S)
    ends_S = tl.load(ends_ptr + columns_S, mask=columns_S < S, other=2147483647)
    sequences = tl.sum((ends_S[None, :] <= rows[:, None]).to(tl.int32), axis=1)
    ends = tl.load(ends_ptr + sequences, mask=real, other=0)
    slots = tl.load(ends_ptr + S + sequences, mask=real, other=0).to(tl.int64)
    contexts = tl.load(ends_ptr + 2 * S + sequences, mask=real, other=0)
    positions = tl.where(real, contexts - (ends - rows), 0)
    tokens = tl.load(tokens_ptr + slots * tokens_stride + positions, mask=real, other=0)
    page_ptr = pages_ptr + slots * pages_stride + positions // PAGE_SIZE
    pages = tl.load(page_ptr, mask=real, other=0).to(tl.int64)
    kv_slots = tl.where(real, pages * PAGE_SIZE + positions % PAGE_SIZE, -1)
    tl.store(ids_ptr + rows, tokens.to(tl.int64), mask=inside)
    tl.store(positions_ptr + rows, positions.to(tl.int64), mask=inside)
    tl.store(kv_slots_ptr + rows, kv_slots, mask=inside)


@triton.jit
def stage_sequences_kernel(
    packed_ptr,
    pages_ptr,
    last_ptr,
    table_ptr,
    pages_stride,
    table_stride,
    S: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The last row and the page table of one sequence."""
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    sequence = tl.program_id(0)
    ends_ptr = packed_ptr + _HEADER + 1
    last = tl.load(ends_ptr + sequence).to(tl.int64) - 1
    tl.store(last_ptr + sequence, tl.where(last < 0, 0, last))
    slot = tl.load(ends_ptr + S + sequence).to(tl.int64)
    used = tl.cdiv(tl.load(ends_ptr + 2 * S + sequence), PAGE_SIZE)
    from_ptr = pages_ptr + slot * pages_stride
    to_ptr = table_ptr + sequence.to(tl.int64) * table_stride
    for first in range(0, used, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < used
        tl.store(to_ptr + columns, tl.load(from_ptr + columns, mask=inside), mask=inside)


@triton.jit
def store_kernel(
    ids_ptr,
    count_ptr,
    slots_ptr,
    positions_ptr,
    tokens_ptr,
    tokens_stride,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Tokens of BLOCK rows, at their places."""
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = rows < tl.load(count_ptr)
    slots = tl.load(slots_ptr + rows, mask=real, other=0).to(tl.int64)
    positions = tl.load(positions_ptr + rows, mask=real, other=-1)
    stored = real & (positions >= 0)
    ids = tl.load(ids_ptr + rows, mask=stored, other=0)
    token_ptr = tokens_ptr + slots * tokens_stride + positions + OFFSET
    tl.store(token_ptr, ids.to(tl.int32), mask=stored)


class TritonStaging:
    """core.ops.stage.Staging on a GPU (or in Triton's interpreter)."""

    def stage(self, rows: DecodeRows, tokens_ZL: Tensor, pages_ZM: Tensor, page_size: int) -> None:
        """Two launches."""
        size = rows.input_ids_S.shape[0]
        enter_pages_kernel[(triton.cdiv(size, _BLOCK_ROWS),)](
            rows.packed, pages_ZM, size, pages_ZM.stride(0), BLOCK=_BLOCK_ROWS, num_warps=1
        )
        stage_kernel[(size,)](
            rows.packed,
            tokens_ZL,
            pages_ZM,
            rows.input_ids_S,
            rows.positions_S,
            rows.kv_slots_S,
            rows.context_lens_S,
            rows.page_table_SM,
            tokens_ZL.stride(0),
            pages_ZM.stride(0),
            rows.page_table_SM.stride(0),
            size,
            PAGE_SIZE=page_size,
            BLOCK=_BLOCK_COLUMNS,
            num_warps=2,
            **options(pages_ZM.device),
        )

    def best_parts(self, logits_SL: Tensor, first_id: int, num_tokens: int) -> Tensor:
        """Parts of _PART_V columns, in one launch."""
        num_rows, num_columns = logits_SL.shape
        num_parts = triton.cdiv(num_columns, _PART_V)
        device = logits_SL.device
        assert logits_SL.stride(1) == 1
        parts_SX2 = torch.empty((num_rows, num_parts, 2), dtype=torch.int32, device=device)
        if num_rows:
            best_of_part_kernel[(num_rows, num_parts)](
                logits_SL,
                parts_SX2,
                logits_SL.stride(0),
                first_id,
                V=num_tokens,
                PART=_PART_V,
                BLOCK=_BLOCK_V,
                num_warps=4,
                **options(device),
            )
        return parts_SX2

    def best_of_parts(self, parts_NSX2: Tensor) -> Tensor:
        """One launch."""
        num_ranks, num_rows, num_parts, _ = parts_NSX2.shape
        device = parts_NSX2.device
        best_S = torch.empty(num_rows, dtype=torch.int64, device=device)
        if num_rows:
            parts_NSX2 = parts_NSX2.contiguous()
            best_part_kernel[(num_rows,)](
                parts_NSX2,
                best_S,
                parts_NSX2.stride(0),
                NUM_RANKS=num_ranks,
                NUM_PARTS=num_parts,
                BLOCK_N=triton.next_power_of_2(num_ranks),
                BLOCK_X=triton.next_power_of_2(num_parts),
                num_warps=1,
                **options(device),
            )
        return best_S

    def stage_prompts(
        self, rows: PromptRows, tokens_ZL: Tensor, pages_ZM: Tensor, page_size: int
    ) -> None:
        """Two launches: what belongs to rows, and what to sequences."""
        num_rows, size = rows.input_ids_T.shape[0], rows.num_sequences
        launch = options(pages_ZM.device)
        stage_prompt_rows_kernel[(triton.cdiv(num_rows, _BLOCK_ROWS),)](
            rows.packed,
            tokens_ZL,
            pages_ZM,
            rows.input_ids_T,
            rows.positions_T,
            rows.kv_slots_T,
            tokens_ZL.stride(0),
            pages_ZM.stride(0),
            num_rows,
            S=size,
            BLOCK_S=triton.next_power_of_2(size),
            PAGE_SIZE=page_size,
            BLOCK=_BLOCK_ROWS,
            num_warps=4,
            **launch,
        )
        stage_sequences_kernel[(size,)](
            rows.packed,
            pages_ZM,
            rows.last_S,
            rows.page_table_SM,
            pages_ZM.stride(0),
            rows.page_table_SM.stride(0),
            S=size,
            PAGE_SIZE=page_size,
            BLOCK=_BLOCK_COLUMNS,
            num_warps=2,
            **launch,
        )

    def store(self, ids_S: Tensor, places: TokenPlaces, tokens_ZL: Tensor) -> None:
        """One launch."""
        store_kernel[(triton.cdiv(places.slots_S.shape[0], _BLOCK_ROWS),)](
            ids_S,
            places.count,
            places.slots_S,
            places.positions_S,
            tokens_ZL,
            tokens_ZL.stride(0),
            OFFSET=places.offset,
            BLOCK=_BLOCK_ROWS,
            num_warps=1,
            **options(tokens_ZL.device),
        )
