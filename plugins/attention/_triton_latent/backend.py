"""Latent attention on a GPU, in both forms; the expanded one is launched here.

Expanded attention is cut up on the host: what is expanded together, and the blocks of rows that see
it. On CPU tensors the kernels run in Triton's interpreter (TRITON_INTERPRET=1), for tests. Shape
legend: see core.interfaces.latent_attention.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from core.interfaces.attention import SequenceBatch
from core.interfaces.latent_attention import Expand, LatentAttentionSpec
from core.plugin.hookspecs import NoOptions
from plugins.attention._triton_heads.device import TritonDevice, describe
from plugins.attention._triton_latent.absorbed import Absorbed, AbsorbedAttention
from plugins.attention._triton_latent.kernels import expanded_kernel
from plugins.attention._triton_latent.pieces import pieces_by_group, row_blocks, token_slots, upload
from plugins.attention._triton_latent.portable import block_of

# Non-rotary keys and values of a group take at most this much, unless one token has more.
_EXPANDED_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile sizes of the expanded form, and how its kernel is compiled."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


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

    def __init__(self, spec: LatentAttentionSpec) -> None:
        self.spec = spec
        device = describe(spec.device)
        # The tensor cores take no float32 without losing bits, and the interpreter's dot no bf16.
        self._wide = device.interpreted or spec.dtype is torch.float32
        self._scale_log2 = spec.scale * math.log2(math.e)
        self._cached_dim = spec.latent_dim + spec.rope_dim
        self.absorbed_attention = AbsorbedAttention(spec)
        self.expanded_tiles = _expanded_tiles(spec, self._wide, device)
        token_values = spec.num_heads * (spec.nope_dim + spec.value_dim)
        self.group_tokens = max(1, _EXPANDED_BYTES // (token_values * spec.dtype.itemsize))

    def plan(self, batch: SequenceBatch) -> "_Plan":
        """Nothing yet: a phase needs only one of the two forms."""
        return _Plan(self, batch)

    def absorbed(
        self, plan: object, cache_BPZ: Tensor, q_THC: Tensor, q_THR: Tensor, out_THC: Tensor
    ) -> None:
        """As the plan's schedule says."""
        assert isinstance(plan, _Plan)
        self.absorbed_attention.attend(plan.absorbed, cache_BPZ, q_THC, q_THR, out_THC)

    def expanded(
        self, plan: object, cache_BPZ: Tensor, q_THD: Tensor, expand: Expand, out_THV: Tensor
    ) -> None:
        """Expand each group once, and attend the rows that see it."""
        assert isinstance(plan, _Plan)
        assert q_THD.stride(2) == out_THV.stride(2) == 1
        slots_YZ = cache_BPZ.view(-1, self._cached_dim)
        for group in plan.expanded.groups:
            cached_XZ = slots_YZ.index_select(0, group.slots_X)
            k_XHN, v_XHV = expand(cached_XZ)
            assert k_XHN.stride(2) == v_XHV.stride(2) == 1
            k_XR = cached_XZ[:, self.spec.latent_dim :]
            self._attend_group(plan.expanded, group, q_THD, k_XHN, k_XR, v_XHV, out_THV)

    def _attend_group(
        self,
        plan: _Expanded,
        group: _Group,
        q_THD: Tensor,
        k_XHN: Tensor,
        k_XR: Tensor,
        v_XHV: Tensor,
        out_THV: Tensor,
    ) -> None:
        spec, tiles = self.spec, self.expanded_tiles
        expanded_kernel[(group.blocks_6.shape[0], spec.num_heads)](
            q_THD,
            k_XHN,
            k_XR,
            v_XHV,
            out_THV,
            out_THV if plan.state_THV is None else plan.state_THV,
            out_THV if plan.log_sums_TH is None else plan.log_sums_TH,
            group.blocks_6,
            q_THD.stride(0),
            q_THD.stride(1),
            k_XHN.stride(0),
            k_XHN.stride(1),
            k_XR.stride(0),
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
            BLOCK_N=block_of(spec.nope_dim),
            BLOCK_R=block_of(spec.rope_dim),
            BLOCK_V=block_of(spec.value_dim),
            num_warps=tiles.num_warps if plan.block_rows >= 64 else 4,
            num_stages=tiles.num_stages,
        )


class _Plan:
    """Either form, made when the first layer asks for it."""

    def __init__(self, backend: TritonLatentBackend, batch: SequenceBatch) -> None:
        self._backend, self.batch = backend, batch

    @cached_property
    def absorbed(self) -> Absorbed:
        """Sequences of one row, and their schedule."""
        return self._backend.absorbed_attention.plan(self.batch)

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


# The fastest of a sweep on an H100 over 16 and 128 heads of DeepSeek-V3's sizes, contexts of 4,096
# to 131,072 tokens; float32 is not tuned.


def _expanded_tiles(spec: LatentAttentionSpec, wide: bool, device: TritonDevice) -> Tiles:
    """float32 products run without tensor cores, from registers: small tiles."""
    if wide:
        return Tiles(rows=32, tokens=32, num_warps=4, num_stages=1)
    rows, tokens = 128, 64
    key_bytes = 2 * (block_of(spec.nope_dim) + block_of(spec.rope_dim))
    tile_bytes = tokens * (key_bytes + 2 * block_of(spec.value_dim))
    return Tiles(rows, tokens, 8, device.num_stages(rows * key_bytes, tile_bytes))
