"""Launches the Triton kernels of latent attention: tiles, splits of contexts, what is expanded.

Grids come from host numbers alone: the device is not waited for. On CPU tensors the kernels run in
Triton's interpreter (TRITON_INTERPRET=1), for tests. Shape legend: see
core.interfaces.latent_attention; M rows and N tokens of a tile, K splits of contexts.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from core.hookspecs import NoOptions
from core.interfaces.attention import SequenceBatch
from core.interfaces.latent_attention import Expand, LatentAttentionSpec
from plugins.attention._latent_pieces import (
    pieces_by_group,
    row_blocks,
    split_rows,
    token_slots,
    upload,
)
from plugins.attention._latent_triton_kernels import (
    absorbed_kernel,
    expanded_kernel,
    sum_splits_kernel,
)
from plugins.attention._triton_device import TritonDevice, describe

# Keys and values of a group take at most this much, unless one token has more.
_EXPANDED_BYTES = 256 * 1024 * 1024
# A split shorter than this costs more to sum up than it saves.
_LEAST_SPLIT_TOKENS = 256
_INTERPRETED_LEAST_SPLIT_TOKENS = 32
_MOST_SPLITS = 128  # of one row; a power of two
_PROGRAMS_PER_MULTIPROCESSOR = 2  # of absorbed attention: what shared memory has room for
_SUM_BLOCK = 64  # dimensions that one program sums over splits


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tile sizes of one kernel, and how it is compiled."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class _Absorbed:
    """Splits of every row's context, and what they come to."""

    splits_K5: Tensor  # int32, see absorbed_kernel
    sums_3: Tensor  # int32 (rows that have several splits, 3), see sum_splits_kernel
    partial_KHC: Tensor  # float32; shared by all layers, which run one after the other
    log_sums_KH: Tensor  # float32


@dataclass(frozen=True, slots=True)
class _Group:
    """Tokens that are expanded together, and the blocks of rows that see them."""

    slots_X: Tensor  # int64
    blocks_6: Tensor  # int32 (blocks, 6), see expanded_kernel


@dataclass(frozen=True, slots=True)
class _Expanded:
    groups: list[_Group]
    block_rows: int
    state_THV: Tensor | None  # float32; None: every row sees one piece only
    log_sums_TH: Tensor | None  # float32


def build(options: NoOptions, spec: LatentAttentionSpec) -> "TritonLatentBackend":
    """The factory named by the registration."""
    return TritonLatentBackend(spec)


class TritonLatentBackend:
    """Both forms, both phases, any page size and dimensions."""

    capturable = False

    def __init__(self, spec: LatentAttentionSpec) -> None:
        self.spec = spec
        device = describe(spec.device)
        # The tensor cores take no float32 without losing bits, and the interpreter's dot no bf16.
        self._wide = device.interpreted or spec.dtype is torch.float32
        self._scale_log2 = spec.scale * math.log2(math.e)
        self._cached_dim = spec.latent_dim + spec.rope_dim
        self.absorbed_tiles = _absorbed_tiles(spec, self._wide, device)
        self.expanded_tiles = _expanded_tiles(spec, self._wide, device)
        self.head_blocks = triton.cdiv(spec.num_heads, self.absorbed_tiles.rows)
        self.num_programs = _PROGRAMS_PER_MULTIPROCESSOR * device.num_multiprocessors
        self.least_split = _LEAST_SPLIT_TOKENS
        if device.interpreted:
            self.least_split = _INTERPRETED_LEAST_SPLIT_TOKENS
        token_values = spec.num_heads * (spec.nope_dim + spec.rope_dim + spec.value_dim)
        self.group_tokens = max(1, _EXPANDED_BYTES // (token_values * spec.dtype.itemsize))

    def plan(self, batch: SequenceBatch) -> "_Plan":
        """Nothing yet: a phase needs only one of the two forms."""
        return _Plan(self, batch)

    def absorbed(self, plan: object, cache_BPZ: Tensor, q_THZ: Tensor, out_THC: Tensor) -> None:
        """Every split of every row at once, then the sums; q, out and the cache need contiguous
        vectors."""
        assert isinstance(plan, _Plan)
        assert q_THZ.stride(2) == out_THC.stride(2) == cache_BPZ.stride(2) == 1
        spec, tiles, splits = self.spec, self.absorbed_tiles, plan.absorbed
        absorbed_kernel[(splits.splits_K5.shape[0] * self.head_blocks,)](
            q_THZ,
            cache_BPZ,
            out_THC,
            splits.partial_KHC,
            splits.log_sums_KH,
            splits.splits_K5,
            plan.batch.page_table_SM,
            q_THZ.stride(0),
            q_THZ.stride(1),
            out_THC.stride(0),
            out_THC.stride(1),
            cache_BPZ.stride(0),
            cache_BPZ.stride(1),
            plan.batch.page_table_SM.stride(0),
            self._scale_log2,
            WIDE=self._wide,
            PAGE_SIZE=spec.page_size,
            NUM_HEADS=spec.num_heads,
            LATENT_DIM=spec.latent_dim,
            ROPE_DIM=spec.rope_dim,
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.tokens,
            BLOCK_C=_block(spec.latent_dim),
            BLOCK_R=_block(spec.rope_dim),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        if splits.sums_3.shape[0] == 0:
            return
        block_C = min(_SUM_BLOCK, _block(spec.latent_dim))
        grid = (splits.sums_3.shape[0] * spec.num_heads, triton.cdiv(spec.latent_dim, block_C))
        sum_splits_kernel[grid](
            splits.partial_KHC,
            splits.log_sums_KH,
            out_THC,
            splits.sums_3,
            out_THC.stride(0),
            out_THC.stride(1),
            NUM_HEADS=spec.num_heads,
            LATENT_DIM=spec.latent_dim,
            BLOCK_K=_MOST_SPLITS,
            BLOCK_C=block_C,
            num_warps=4,
        )

    def expanded(
        self, plan: object, cache_BPZ: Tensor, q_THD: Tensor, expand: Expand, out_THV: Tensor
    ) -> None:
        """Expand each group once, and attend the rows that see it."""
        assert isinstance(plan, _Plan)
        assert q_THD.stride(2) == out_THV.stride(2) == 1
        slots_YZ = cache_BPZ.view(-1, self._cached_dim)
        for group in plan.expanded.groups:
            k_XHD, v_XHV = expand(slots_YZ.index_select(0, group.slots_X))
            assert k_XHD.stride(2) == v_XHV.stride(2) == 1
            self._attend_group(plan.expanded, group, q_THD, k_XHD, v_XHV, out_THV)

    def _attend_group(
        self,
        plan: _Expanded,
        group: _Group,
        q_THD: Tensor,
        k_XHD: Tensor,
        v_XHV: Tensor,
        out_THV: Tensor,
    ) -> None:
        spec, tiles = self.spec, self.expanded_tiles
        expanded_kernel[(group.blocks_6.shape[0], spec.num_heads)](
            q_THD,
            k_XHD,
            v_XHV,
            out_THV,
            out_THV if plan.state_THV is None else plan.state_THV,
            out_THV if plan.log_sums_TH is None else plan.log_sums_TH,
            group.blocks_6,
            q_THD.stride(0),
            q_THD.stride(1),
            k_XHD.stride(0),
            k_XHD.stride(1),
            v_XHV.stride(0),
            v_XHV.stride(1),
            out_THV.stride(0),
            out_THV.stride(1),
            self._scale_log2,
            STATE=plan.state_THV is not None,
            WIDE=self._wide,
            NOPE_DIM=spec.nope_dim,
            ROPE_DIM=spec.rope_dim,
            VALUE_DIM=spec.value_dim,
            BLOCK_M=plan.block_rows,
            BLOCK_T=tiles.tokens,
            BLOCK_N=_block(spec.nope_dim),
            BLOCK_R=_block(spec.rope_dim),
            BLOCK_V=_block(spec.value_dim),
            num_warps=tiles.num_warps if plan.block_rows >= 64 else 4,
            num_stages=tiles.num_stages,
        )


class _Plan:
    """Either form, made when the first layer asks for it."""

    def __init__(self, backend: TritonLatentBackend, batch: SequenceBatch) -> None:
        self._backend, self.batch = backend, batch

    @cached_property
    def absorbed(self) -> _Absorbed:
        """As many splits as fill the device, by the tokens that each row really sees."""
        backend, batch, spec = self._backend, self.batch, self._backend.spec
        rows = [
            (sequence, num_cached - num_rows + row + 1)
            for sequence, (num_rows, num_cached) in enumerate(
                zip(batch.query_lens, batch.context_lens, strict=True)
            )
            for row in range(num_rows)
        ]
        wanted = max(1, backend.num_programs // backend.head_blocks)
        split_tokens = max(
            backend.least_split,
            triton.cdiv(sum(tokens for _, tokens in rows), wanted),
            triton.cdiv(max(tokens for _, tokens in rows), _MOST_SPLITS),
        )
        block_tokens = backend.absorbed_tiles.tokens
        splits, sums = split_rows(rows, triton.cdiv(split_tokens, block_tokens) * block_tokens)
        packed = upload([[n for item in (*splits, *sums) for n in item]], torch.int32, spec.device)
        num_slots = sum(count for _, _, count in sums)
        shape = (num_slots, spec.num_heads)
        splits_5, sums_3 = packed[0].split_with_sizes((5 * len(splits), 3 * len(sums)))
        return _Absorbed(
            splits_5.view(-1, 5),
            sums_3.view(-1, 3),
            torch.empty((*shape, spec.latent_dim), dtype=torch.float32, device=spec.device),
            torch.empty(shape, dtype=torch.float32, device=spec.device),
        )

    @cached_property
    def expanded(self) -> _Expanded:
        """What is expanded together, and the blocks of rows that see it."""
        backend, batch, spec = self._backend, self.batch, self._backend.spec
        longest = triton.next_power_of_2(max(batch.query_lens))
        block_rows = min(backend.expanded_tiles.rows, max(16, longest))
        groups = pieces_by_group(batch.query_lens, batch.context_lens, backend.group_tokens)
        state_THV = log_sums_TH = None
        if not all(piece.is_whole for pieces in groups for piece in pieces):
            shape = (sum(batch.query_lens), spec.num_heads)
            log_sums_TH = torch.empty(shape, dtype=torch.float32, device=spec.device)
            state_THV = log_sums_TH.new_empty((*shape, spec.value_dim))
        return _Expanded(
            [
                _Group(
                    token_slots(batch, pieces, spec.page_size),
                    upload(row_blocks(pieces, block_rows), torch.int32, spec.device),
                )
                for pieces in groups
            ],
            block_rows,
            state_THV,
            log_sums_TH,
        )


def _block(dim: int) -> int:
    """The tile of a dimension: a power of two that tl.dot takes."""
    return max(16, int(triton.next_power_of_2(dim)))


# Tile sizes are the fastest of a sweep on an H100 over 16 and 128 heads of DeepSeek-V3's sizes,
# contexts of 4,096 to 131,072 tokens; float32 is not tuned.


def _absorbed_tiles(spec: LatentAttentionSpec, wide: bool, device: TritonDevice) -> _Tiles:
    """float32 products run without tensor cores, from registers: small tiles."""
    if wide:
        return _Tiles(rows=16, tokens=16, num_warps=4, num_stages=1)
    rows = min(64, _block(spec.num_heads))
    tokens = 128 if rows == 16 else 64
    vector_bytes = 2 * (_block(spec.latent_dim) + _block(spec.rope_dim))
    while tokens > 16 and (rows + tokens) * vector_bytes + 2 * rows * tokens > device.shared_bytes:
        tokens //= 2
    return _Tiles(rows, tokens, num_warps=4 if rows == 16 else 8, num_stages=2)


def _expanded_tiles(spec: LatentAttentionSpec, wide: bool, device: TritonDevice) -> _Tiles:
    """The same for expanded attention."""
    if wide:
        return _Tiles(rows=32, tokens=32, num_warps=4, num_stages=1)
    rows, tokens = 128, 64
    key_bytes = 2 * (_block(spec.nope_dim) + _block(spec.rope_dim))
    tile_bytes = tokens * (key_bytes + 2 * _block(spec.value_dim))
    return _Tiles(rows, tokens, 8, device.num_stages(rows * key_bytes, tile_bytes))
