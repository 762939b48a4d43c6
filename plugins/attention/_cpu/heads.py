"""Paged attention on a CPU: gather each sequence's tokens, then torch's fused attention.

Sequences with one new row are batched, in buckets of similar length; a step's gather indices and
masks are made once, in `plan`, so that a layer costs four or five torch calls a bucket. Sequences
with more rows go one at a time. Only tokens of a sequence are ever read, never the rest of its
last page: what another request left there can't leak, were it even NaN.

Shape legend: see core.interfaces.attention; B sequences of a bucket, C cached tokens, Q rows of
one sequence or one block of them, R query heads of one KV head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from core.interfaces.attention import AttentionSpec, LayerKV, NewKV, SequenceBatch
from core.plugin.hookspecs import NoOptions

# A bucket gathers at most this much of k (and as much of v), unless one sequence alone has more:
# what two cores' caches hold. 16 sequences of 1,024 tokens take a fifth less time so.
_GATHER_BYTES = 2 * 1024 * 1024
# A bucket takes shorter sequences until their padding comes to so much of k: about what the calls
# of another bucket cost (60 us a layer, with code and cache cold).
_PADDING_BYTES = 256 * 1024
# Rows of a chunk with a cached prefix that share one call: larger blocks compute more scores that
# the mask throws away (2,048 rows: 18 ms in one block, 10.4 ms in blocks of 256).
_ROWS_PER_BLOCK = 256


@dataclass(frozen=True, slots=True)
class _DecodeBucket:
    """Sequences of one new row each, padded to the longest."""

    rows_B: Tensor | None  # int64; None: every row of the step, in order
    slots: Tensor | slice  # int64 token slots, B * C; padding repeats the sequence's first token
    mask_B11C: Tensor | None  # added to the scores; None: no padding


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One sequence with several new rows."""

    start: int  # its first row in the step
    num_rows: int
    num_cached: int  # tokens including these rows
    slots_C: Tensor | slice  # int64 token slots


@dataclass(frozen=True, slots=True)
class _Plan:
    buckets: list[_DecodeBucket]
    chunks: list[_Chunk]
    mask_QX: Tensor | None  # see CpuBackend._chunk_mask; None: no chunk has a prefix
    mask_diagonal: int  # the column of mask_QX on which row 0 stands


def build(options: NoOptions, spec: AttentionSpec) -> "CpuBackend":
    """The factory named by the registration."""
    return CpuBackend(spec)


class CpuBackend:
    """Both phases; a step may even mix them."""

    capturable = False

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        token_bytes = spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize
        self._gather_tokens = _GATHER_BYTES // token_bytes
        self._padding_tokens = _PADDING_BYTES // token_bytes
        self._page_offsets_P = torch.arange(spec.page_size, device=spec.device)

    def plan(self, batch: SequenceBatch) -> _Plan:
        """Buckets of single rows, and the other sequences one by one."""
        starts = list(accumulate(batch.query_lens, initial=0))
        single = [index for index, rows in enumerate(batch.query_lens) if rows == 1]
        several = [index for index, rows in enumerate(batch.query_lens) if rows > 1]
        buckets = [
            self._bucket(batch, members, starts)
            for members in group_by_length(
                single, batch.context_lens, self._gather_tokens, self._padding_tokens
            )
        ]
        chunks = [
            _Chunk(
                starts[index],
                batch.query_lens[index],
                batch.context_lens[index],
                _run(
                    self._slots(batch.page_table_SM[index : index + 1], batch.context_lens[index])[
                        0
                    ]
                ),
            )
            for index in several
        ]
        longest_prefix = max((chunk.num_cached - chunk.num_rows for chunk in chunks), default=0)
        if longest_prefix == 0:
            return _Plan(buckets, chunks, None, 0)
        longest = max(chunk.num_cached for chunk in chunks)
        return _Plan(buckets, chunks, self._chunk_mask(longest), longest)

    def forward(
        self, plan: object, kv: LayerKV, q_THD: Tensor, out_THD: Tensor, new: NewKV | None = None
    ) -> None:
        """Attend the buckets of single rows, then each longer chunk."""
        assert isinstance(plan, _Plan)
        k_slots = kv.k_NPGD.view(-1, self._width)
        v_slots = k_slots if kv.v_NPGD is kv.k_NPGD else kv.v_NPGD.view(-1, self._width)
        for bucket in plan.buckets:
            self._attend_bucket(bucket, k_slots, v_slots, q_THD, out_THD)
        for chunk in plan.chunks:
            self._attend_chunk(plan, chunk, k_slots, v_slots, q_THD, out_THD)

    @property
    def _width(self) -> int:
        return self._spec.num_kv_heads * self._spec.head_dim

    def _slots(self, page_table_BM: Tensor, num_tokens: int) -> Tensor:
        """Token slots (B, num_tokens) of the first tokens of each row of the table."""
        page_size = self._spec.page_size
        pages_BM = page_table_BM[:, : -(-num_tokens // page_size)].long()
        slots_BMP = pages_BM.unsqueeze(-1) * page_size + self._page_offsets_P
        return slots_BMP.flatten(1)[:, :num_tokens]

    def _bucket(self, batch: SequenceBatch, members: list[int], starts: list[int]) -> _DecodeBucket:
        device = self._spec.device
        rows = [starts[index] for index in members]
        all_rows = rows == list(range(starts[-1]))
        lengths = [batch.context_lens[index] for index in members]
        longest = max(lengths)
        indices_B = torch.tensor(members, device=device)
        slots_BC = self._slots(batch.page_table_SM.index_select(0, indices_B), longest)
        mask_B11C = None
        if min(lengths) != longest:
            padding_BC = torch.arange(longest, device=device) >= torch.tensor(
                lengths, device=device
            ).unsqueeze(1)
            slots_BC = torch.where(padding_BC, slots_BC[:, :1], slots_BC)
            mask_BC = torch.zeros(padding_BC.shape, dtype=self._spec.dtype, device=device)
            mask_B11C = mask_BC.masked_fill_(padding_BC, -torch.inf)[:, None, None]
        rows_B = None if all_rows else torch.tensor(rows, device=device)
        slots = _run(slots_BC[0]) if len(members) == 1 else slots_BC.flatten()
        return _DecodeBucket(rows_B, slots, mask_B11C)

    def _chunk_mask(self, num_columns: int) -> Tensor:
        """A mask (Q, num_columns + Q) of which every block with a prefix takes a part.

        Row i sees columns up to `num_columns + i`. A block of q rows after n tokens takes its
        first q rows, and of the columns the n before `num_columns` and the q after it.
        """
        spec = self._spec
        shape = (_ROWS_PER_BLOCK, num_columns + _ROWS_PER_BLOCK)
        mask_QX = torch.full(shape, -torch.inf, dtype=spec.dtype, device=spec.device)
        return mask_QX.triu_(num_columns + 1)

    def _attend_bucket(
        self,
        bucket: _DecodeBucket,
        k_slots: Tensor,
        v_slots: Tensor,
        q_THD: Tensor,
        out_THD: Tensor,
    ) -> None:
        """The R query heads of a KV head are the rows of one attention; k is never repeated."""
        rows_B = bucket.rows_B
        spec = self._spec
        q_BHD = q_THD if rows_B is None else q_THD.index_select(0, rows_B)
        q_shape = (q_BHD.shape[0], spec.num_kv_heads, -1, spec.head_dim)
        kv_shape = (q_BHD.shape[0], -1, spec.num_kv_heads, spec.head_dim)
        k_BGCD, v_BGCD = _gather(k_slots, v_slots, bucket.slots, kv_shape)
        out_BGRD = F.scaled_dot_product_attention(
            q_BHD.view(q_shape),
            k_BGCD,
            v_BGCD,
            attn_mask=bucket.mask_B11C,
            scale=spec.scale,
        )
        if rows_B is None:
            out_THD.view(q_shape).copy_(out_BGRD)
        else:
            out_THD.index_copy_(0, rows_B, out_BGRD.flatten(1, 2))

    def _attend_chunk(
        self,
        plan: _Plan,
        chunk: _Chunk,
        k_slots: Tensor,
        v_slots: Tensor,
        q_THD: Tensor,
        out_THD: Tensor,
    ) -> None:
        spec = self._spec
        kv_shape = (1, chunk.num_cached, spec.num_kv_heads, spec.head_dim)
        k_1GCD, v_1GCD = _gather(k_slots, v_slots, chunk.slots_C, kv_shape)
        for first, last, mask_QC in _blocks(plan, chunk):
            rows = slice(chunk.start + first, chunk.start + last)
            seen = chunk.num_cached - chunk.num_rows + last
            out_1HQD = F.scaled_dot_product_attention(
                q_THD[rows].transpose(0, 1).unsqueeze(0),
                k_1GCD[:, :, :seen],
                v_1GCD[:, :, :seen],
                attn_mask=mask_QC,
                is_causal=mask_QC is None,
                scale=spec.scale,
                enable_gqa=True,
            )
            out_THD[rows] = out_1HQD[0].transpose(0, 1)


def _run(slots_C: Tensor) -> Tensor | slice:
    """Slots that follow one another as a slice, which needs no copy of the tokens."""
    first, num_slots = int(slots_C[0]), slots_C.shape[0]
    run_C = torch.arange(first, first + num_slots, device=slots_C.device)
    return slice(first, first + num_slots) if torch.equal(slots_C, run_C) else slots_C


def _gather(
    k_slots: Tensor, v_slots: Tensor, slots: Tensor | slice, shape: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor]:
    """Keys and values of some tokens, heads before tokens; one copy where they are the same, none
    where they lie one after the other."""
    if isinstance(slots, slice):
        return (
            k_slots[slots].view(shape).transpose(1, 2),
            v_slots[slots].view(shape).transpose(1, 2),
        )
    k_BGCD = k_slots.index_select(0, slots).view(shape).transpose(1, 2)
    if v_slots is k_slots:
        return k_BGCD, k_BGCD
    return k_BGCD, v_slots.index_select(0, slots).view(shape).transpose(1, 2)


def _blocks(plan: _Plan, chunk: _Chunk) -> Iterator[tuple[int, int, Tensor | None]]:
    """First row, row past the last, and mask of each call; None stands for plain causal."""
    prefix = chunk.num_cached - chunk.num_rows
    if prefix == 0:
        yield 0, chunk.num_rows, None
        return
    assert plan.mask_QX is not None
    for first in range(0, chunk.num_rows, _ROWS_PER_BLOCK):
        last = min(first + _ROWS_PER_BLOCK, chunk.num_rows)
        columns = slice(plan.mask_diagonal - prefix - first, plan.mask_diagonal + last - first)
        yield first, last, plan.mask_QX[: last - first, columns]


def group_by_length(
    members: list[int], lengths: list[int], most_tokens: int, most_padding: int
) -> Iterator[list[int]]:
    """Split sequences into buckets padded to their longest: most tokens in all, and of padding.

    A bucket holds one sequence however long it is. Every bucket is in ascending order of
    sequence, so that a single one needs no row indices.
    """
    bucket: list[int] = []
    longest = padding = 0
    for index in sorted(members, key=lambda index: -lengths[index]):
        padding += longest - lengths[index]
        if bucket and (padding > most_padding or (len(bucket) + 1) * longest > most_tokens):
            yield sorted(bucket)
            bucket = []
        if not bucket:
            longest, padding = lengths[index], 0
        bucket.append(index)
    if bucket:
        yield sorted(bucket)
