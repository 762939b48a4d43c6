"""Launches the Triton kernels of latent attention: tiles, splits of contexts, what is expanded.

Absorbed attention follows a schedule that the device makes from the lengths it finds there, and
grids that follow from bounds: a decode step can be captured as a CUDA graph, and eager steps run
the same code. Expanded attention is cut up on the host. On CPU tensors the kernels run in Triton's
interpreter (TRITON_INTERPRET=1), for tests. Shape legend: see core.interfaces.latent_attention; P
programs, M pages of a sequence.
"""

import importlib
import math
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from core.hookspecs import NoOptions
from core.interfaces.attention import SequenceBatch
from core.interfaces.latent_attention import Expand, LatentAttentionSpec
from core.kernels import tuning
from core.kernels.dependent_launch import options as launch_options
from plugins.attention._latent_decode_kernels import latent_decode_kernel
from plugins.attention._latent_pieces import pieces_by_group, row_blocks, token_slots, upload
from plugins.attention._latent_triton_kernels import expanded_kernel
from plugins.attention._triton_decode_kernels import (
    SCHEDULE_COLUMNS,
    reduce_kernel,
    schedule_kernel,
)
from plugins.attention._triton_device import TritonDevice, describe

# Keys and values of a group take at most this much, unless one token has more.
_EXPANDED_BYTES = 256 * 1024 * 1024
# Pieces of a head that are summed up at once, and heads of a program: few sequences, many pieces.
_MANY_PIECES, _FEW_PIECES = (16, 1), (2, 8)
_FEW_SEQUENCES = 16


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile sizes of one kernel, and how it is compiled."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int
    programs: int = 1  # of a multiprocessor at once; of absorbed attention


@dataclass(frozen=True, slots=True)
class _Absorbed:
    """One row a sequence, and what every program does for them."""

    batch: SequenceBatch
    schedule_RX: Tensor  # int32: see plugins.attention._triton_decode_kernels


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

    capturable = True  # the absorbed form, of one row a sequence

    def __init__(
        self,
        spec: LatentAttentionSpec,
        absorbed_tiles: Tiles | None = None,
        use_blocks: bool = True,
    ) -> None:
        """Tiles other than those measured are for measuring. `use_blocks`: whether tiles of the
        cache that lie in one page are copied as blocks of memory."""
        self.spec = spec
        device = describe(spec.device)
        # The tensor cores take no float32 without losing bits, and the interpreter's dot no bf16.
        self._wide = device.interpreted or spec.dtype is torch.float32
        self._scale_log2 = spec.scale * math.log2(math.e)
        self._launch = launch_options(spec.device)
        self._cached_dim = spec.latent_dim + spec.rope_dim
        self._gluon = _gluon(spec) if absorbed_tiles is None else None
        self.uses_gluon = self._gluon is not None
        tiles = absorbed_tiles or _absorbed_tiles(spec, self._wide, device)
        if self._gluon is not None:
            tiles = Tiles(self._gluon.HEADS, self._gluon.TOKENS, num_warps=8, num_stages=2)
        self.absorbed_tiles = tiles
        self.expanded_tiles = _expanded_tiles(spec, self._wide, device)
        self._use_blocks = use_blocks and _lie_in_blocks(spec, tiles.tokens)
        self._head_blocks = triton.cdiv(spec.num_heads, tiles.rows)
        programs = tiles.programs * device.num_multiprocessors
        self._num_programs = max(1, programs // self._head_blocks)
        # Shared by all layers and steps, which run one after the other.
        num_values = self._num_programs * 2 * spec.num_heads * (spec.latent_dim + 1)
        self._workspace = torch.empty(num_values, dtype=torch.float32, device=spec.device)
        token_values = spec.num_heads * (spec.nope_dim + spec.rope_dim + spec.value_dim)
        self.group_tokens = max(1, _EXPANDED_BYTES // (token_values * spec.dtype.itemsize))

    def plan(self, batch: SequenceBatch) -> "_Plan":
        """Nothing yet: a phase needs only one of the two forms."""
        return _Plan(self, batch)

    def schedule(self, batch: SequenceBatch) -> Tensor:
        """What every program does for sequences of one row, made on the device; then the sums of
        sequences, where they are fewer."""
        num_programs, num_sequences = self._num_programs, len(batch.query_lens)
        num_rows = num_programs + (num_sequences if num_sequences < num_programs else 0)
        shape = (num_rows, SCHEDULE_COLUMNS.value)
        schedule_RX = torch.empty(shape, dtype=torch.int32, device=self.spec.device)
        schedule_kernel[(num_rows,)](
            batch.context_lens_S,
            schedule_RX,
            num_sequences,
            P=num_programs,
            G=1,
            BLOCK_N=self.absorbed_tiles.tokens,
            WHOLE=True,  # pieces of all heads are large
            num_warps=4,
        )
        return schedule_RX

    def absorbed(
        self, plan: object, cache_BPZ: Tensor, q_THC: Tensor, q_THR: Tensor, out_THC: Tensor
    ) -> None:
        """Every program's stretch, then the sums of what several had a part in."""
        assert isinstance(plan, _Plan)
        assert q_THC.is_contiguous()
        assert q_THR.stride(2) == 1
        assert out_THC.is_contiguous()
        assert cache_BPZ.is_contiguous()
        spec = self.spec
        batch, schedule_RX = plan.absorbed.batch, plan.absorbed.schedule_RX
        if self._gluon is not None:
            self._gluon.attend(
                spec,
                batch,
                schedule_RX,
                self._workspace,
                self._num_programs,
                (q_THC, q_THR, cache_BPZ, out_THC),
                self._scale_log2,
                self._launch,
            )
        else:
            self._attend_portably(batch, schedule_RX, q_THC, q_THR, cache_BPZ, out_THC)
        self._add_pieces(batch, schedule_RX, out_THC)

    def _attend_portably(
        self,
        batch: SequenceBatch,
        schedule_RX: Tensor,
        q_THC: Tensor,
        q_THR: Tensor,
        cache_BPZ: Tensor,
        out_THC: Tensor,
    ) -> None:
        spec, tiles = self.spec, self.absorbed_tiles
        latent_blocks, rope_blocks = self._blocks(cache_BPZ)
        latent_decode_kernel[(self._num_programs * self._head_blocks,)](
            q_THC,
            q_THR,
            q_THR.stride(0),
            q_THR.stride(1),
            cache_BPZ,
            latent_blocks,
            rope_blocks,
            out_THC,
            self._workspace,
            schedule_RX,
            batch.context_lens_S,
            batch.page_table_SM,
            batch.page_table_SM.stride(0),
            SCALE_LOG2=self._scale_log2,
            WIDE=self._wide,
            BLOCKS=self._use_blocks,
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
            **self._launch,
        )

    def _add_pieces(self, batch: SequenceBatch, schedule_RX: Tensor, out_THC: Tensor) -> None:
        spec = self.spec
        num_programs, num_rows = self._num_programs, schedule_RX.shape[0]
        by_sequence = num_rows > num_programs
        num_sums = num_rows - num_programs if by_sequence else num_programs
        few = len(batch.query_lens) < _FEW_SEQUENCES
        pieces, heads = _MANY_PIECES if few else _FEW_PIECES
        reduce_kernel[(num_sums, triton.cdiv(spec.num_heads, heads))](
            out_THC,
            self._workspace,
            schedule_RX,
            batch.context_lens_S,
            len(batch.query_lens),
            P=num_programs,
            FIRST_ROW=num_programs if by_sequence else 0,
            GROUP=spec.num_heads,
            G=1,
            HEAD_DIM=spec.latent_dim,
            BLOCK_X=pieces,
            BLOCK_R=heads,
            BLOCK_D=_block(spec.latent_dim),
            num_warps=4,
            **self._launch,
        )

    def _blocks(self, cache_BPZ: Tensor) -> tuple[Any, Any]:
        """Descriptors of a tile of latents and of rotary parts."""
        if not self._use_blocks:
            return None, None
        spec, tokens = self.spec, self.absorbed_tiles.tokens
        slots_YZ = cache_BPZ.view(-1, self._cached_dim)
        return (
            TensorDescriptor.from_tensor(slots_YZ, [tokens, spec.latent_dim]),
            TensorDescriptor.from_tensor(slots_YZ, [tokens, spec.rope_dim]),
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
        """Sequences of one row, and their schedule."""
        batch = self.batch
        if max(batch.query_lens) > 1:
            batch = _one_row_each(batch)
        return _Absorbed(batch, self._backend.schedule(batch))

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


def _one_row_each(batch: SequenceBatch) -> SequenceBatch:
    """The same rows, each as the last one of a sequence of its own."""
    rows, starts_S1 = sum(batch.query_lens), batch.query_starts_S1
    sequence_T = torch.repeat_interleave(starts_S1.diff(), output_size=rows)
    row_T = torch.arange(rows, dtype=torch.int32, device=starts_S1.device)
    hidden_T = starts_S1[sequence_T + 1] - row_T - 1  # rows of its sequence that come after it
    lengths = zip(batch.query_lens, batch.context_lens, strict=True)
    return SequenceBatch(
        [1] * rows,
        [cached - new + row + 1 for new, cached in lengths for row in range(new)],
        torch.arange(rows + 1, dtype=torch.int32, device=starts_S1.device),
        batch.context_lens_S[sequence_T] - hidden_T,
        batch.page_table_SM[sequence_T],
    )


def _gluon(spec: LatentAttentionSpec) -> ModuleType | None:
    """The launch of the kernel for Hopper, where the device and the shapes are its own."""
    if spec.device.type != "cuda" or torch.cuda.get_device_capability(spec.device)[0] != 9:
        return None
    module = importlib.import_module("plugins.attention._latent_gluon")
    return module if module.fits(spec) else None


def _lie_in_blocks(spec: LatentAttentionSpec, tokens: int) -> bool:
    """Whether a tile of tokens lies in one page, and its dimensions are tiles without padding."""
    exact = all(_block(dim) == dim for dim in (spec.latent_dim, spec.rope_dim))
    return exact and spec.page_size % tokens == 0 and spec.latent_dim % spec.rope_dim == 0


def _block(dim: int) -> int:
    """The tile of a dimension: a power of two that tl.dot takes."""
    return max(16, int(triton.next_power_of_2(dim)))


# Tile sizes of expanded attention are the fastest of a sweep on an H100 over 16 and 128 heads of
# DeepSeek-V3's sizes, contexts of 4,096 to 131,072 tokens; float32 is not tuned. Those of absorbed
# attention are in core/kernels/tuned/latent_decode.json, and here where nothing was measured.


def _absorbed_tiles(spec: LatentAttentionSpec, wide: bool, device: TritonDevice) -> Tiles:
    """float32 products run without tensor cores, from registers: small tiles."""
    if wide:
        return Tiles(rows=16, tokens=16, num_warps=4, num_stages=1)
    sizes = {"num_heads": spec.num_heads, "latent_dim": spec.latent_dim}
    found = tuning.choices("latent_decode", spec.device, **sizes, page_size=spec.page_size)
    if found:
        best = found[0]
        return Tiles(*(best[key] for key in ("rows", "tokens", "num_warps", "num_stages")))
    rows = min(64, _block(spec.num_heads))
    tokens = 64
    vector_bytes = 2 * (_block(spec.latent_dim) + _block(spec.rope_dim))
    while tokens > 16 and (rows + 2 * tokens) * vector_bytes > device.shared_bytes - 4096:
        tokens //= 2
    return Tiles(rows, tokens, num_warps=8, num_stages=2)


def _expanded_tiles(spec: LatentAttentionSpec, wide: bool, device: TritonDevice) -> Tiles:
    """The same for expanded attention."""
    if wide:
        return Tiles(rows=32, tokens=32, num_warps=4, num_stages=1)
    rows, tokens = 128, 64
    key_bytes = 2 * (_block(spec.nope_dim) + _block(spec.rope_dim))
    tile_bytes = tokens * (key_bytes + 2 * _block(spec.value_dim))
    return Tiles(rows, tokens, 8, device.num_stages(rows * key_bytes, tile_bytes))
