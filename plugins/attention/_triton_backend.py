"""Launches the Triton kernels of paged attention: which kernel, tile sizes, and splits.

A step whose sequences all have one new row takes the decode kernel, every other one the prefill
kernel. On CPU tensors the kernels run in Triton's interpreter (TRITON_INTERPRET=1), for tests.
Shape legend: see core.interfaces.attention; X splits of a context.
"""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from core.hookspecs import NoOptions
from core.interfaces.attention import AttentionSpec, LayerKV, SequenceBatch
from plugins.attention._triton_device import TritonDevice, describe
from plugins.attention._triton_kernels import decode_kernel, prefill_kernel, reduce_kernel

# A split shorter than this costs more to sum up than it saves.
_LEAST_SPLIT_TOKENS = 256
_MOST_SPLITS = 64  # a power of two
_PROGRAMS_PER_MULTIPROCESSOR = 4  # that fill a GPU
_INTERPRETED_LEAST_SPLIT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tile sizes of one kernel: the most rows, tokens, and how it is compiled."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class _PrefillPlan:
    batch: SequenceBatch
    block_rows: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class _DecodePlan:
    batch: SequenceBatch
    num_splits: int
    partial_SHXD: Tensor  # float32; shared by all layers, which run one after the other
    log_sums_SHX: Tensor  # float32


def build(options: NoOptions, spec: AttentionSpec) -> "TritonBackend":
    """The factory named by the registration."""
    return TritonBackend(spec)


class TritonBackend:
    """Both phases, any page size and head dimension."""

    capturable = False

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._group = spec.num_heads // spec.num_kv_heads
        device = describe(spec.device)
        # The tensor cores take no float32 without losing bits, and the interpreter's dot no bf16.
        self._wide = device.interpreted or spec.dtype is torch.float32
        self._block_D = max(16, triton.next_power_of_2(spec.head_dim))
        self._least_rows = max(16, triton.next_power_of_2(self._group))
        self._scale_log2 = spec.scale * math.log2(math.e)
        self._num_programs = _PROGRAMS_PER_MULTIPROCESSOR * device.num_multiprocessors
        self._least_split = _LEAST_SPLIT_TOKENS
        if device.interpreted:
            self._least_split = _INTERPRETED_LEAST_SPLIT_TOKENS
        self._prefill_tiles = _prefill_tiles(self._block_D, self._wide, device)
        self._decode_tiles = _decode_tiles(self._block_D, self._wide, self._least_rows, device)

    def plan(self, batch: SequenceBatch) -> _PrefillPlan | _DecodePlan:
        """Grid and splits, from host numbers alone: the device is not waited for."""
        longest_rows = max(batch.query_lens)
        if longest_rows == 1:
            return self._plan_decode(batch)
        wanted = triton.next_power_of_2(longest_rows * self._group)
        block_rows = max(self._least_rows, min(wanted, self._prefill_tiles.rows))
        block_tokens = block_rows // self._group
        num_blocks = sum(batch.query_lens) // block_tokens + len(batch.query_lens)
        return _PrefillPlan(batch, block_rows, num_blocks)

    def _plan_decode(self, batch: SequenceBatch) -> _DecodePlan:
        spec = self._spec
        num_sequences = len(batch.query_lens)
        wanted = self._num_programs // (num_sequences * spec.num_kv_heads)
        useful = triton.cdiv(max(batch.context_lens), self._least_split)
        num_splits = max(1, min(wanted, useful, _MOST_SPLITS))
        shape = (num_sequences, spec.num_heads, num_splits) if num_splits > 1 else (0, 0, 0)
        log_sums_SHX = torch.empty(shape, dtype=torch.float32, device=spec.device)
        partial_SHXD = torch.empty((*shape, spec.head_dim), dtype=torch.float32, device=spec.device)
        return _DecodePlan(batch, num_splits, partial_SHXD, log_sums_SHX)

    def forward(self, plan: object, kv: LayerKV, q_THD: Tensor, out_THD: Tensor) -> None:
        """Launch the kernels of the plan; q, out and the cache need contiguous heads."""
        assert q_THD.stride(2) == out_THD.stride(2) == kv.k_NPGD.stride(3) == 1
        assert kv.k_NPGD.stride() == kv.v_NPGD.stride()
        if isinstance(plan, _PrefillPlan):
            self._prefill(plan, kv, q_THD, out_THD)
        else:
            assert isinstance(plan, _DecodePlan)
            self._decode(plan, kv, q_THD, out_THD)

    def _prefill(self, plan: _PrefillPlan, kv: LayerKV, q_THD: Tensor, out_THD: Tensor) -> None:
        spec, batch, tiles = self._spec, plan.batch, self._prefill_tiles
        prefill_kernel[(plan.num_blocks, spec.num_kv_heads)](
            q_THD,
            kv.k_NPGD,
            kv.v_NPGD,
            out_THD,
            batch.query_starts_S1,
            batch.context_lens_S,
            batch.page_table_SM,
            len(batch.query_lens),
            q_THD.stride(0),
            q_THD.stride(1),
            out_THD.stride(0),
            out_THD.stride(1),
            kv.k_NPGD.stride(0),
            kv.k_NPGD.stride(1),
            kv.k_NPGD.stride(2),
            batch.page_table_SM.stride(0),
            self._scale_log2,
            WIDE=self._wide,
            GROUP=self._group,
            PAGE_SIZE=spec.page_size,
            HEAD_DIM=spec.head_dim,
            BLOCK_M=plan.block_rows,
            BLOCK_N=tiles.tokens,
            BLOCK_D=self._block_D,
            num_warps=tiles.num_warps if plan.block_rows >= 64 else 4,
            num_stages=tiles.num_stages,
        )

    def _decode(self, plan: _DecodePlan, kv: LayerKV, q_THD: Tensor, out_THD: Tensor) -> None:
        spec, batch, tiles = self._spec, plan.batch, self._decode_tiles
        num_sequences = len(batch.query_lens)
        decode_kernel[(num_sequences, spec.num_kv_heads, plan.num_splits)](
            q_THD,
            kv.k_NPGD,
            kv.v_NPGD,
            out_THD,
            plan.partial_SHXD,
            plan.log_sums_SHX,
            batch.context_lens_S,
            batch.page_table_SM,
            q_THD.stride(0),
            q_THD.stride(1),
            out_THD.stride(0),
            out_THD.stride(1),
            kv.k_NPGD.stride(0),
            kv.k_NPGD.stride(1),
            kv.k_NPGD.stride(2),
            batch.page_table_SM.stride(0),
            self._scale_log2,
            plan.num_splits,
            SPLIT=plan.num_splits > 1,
            WIDE=self._wide,
            GROUP=self._group,
            PAGE_SIZE=spec.page_size,
            HEAD_DIM=spec.head_dim,
            BLOCK_M=self._least_rows,
            BLOCK_N=tiles.tokens,
            BLOCK_D=self._block_D,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        if plan.num_splits > 1:
            reduce_kernel[(num_sequences, spec.num_heads)](
                plan.partial_SHXD,
                plan.log_sums_SHX,
                out_THD,
                out_THD.stride(0),
                out_THD.stride(1),
                plan.num_splits,
                HEAD_DIM=spec.head_dim,
                BLOCK_X=_MOST_SPLITS,
                BLOCK_D=self._block_D,
                num_warps=4,
            )


# Tile sizes are the fastest of a sweep on an H100 over the shapes of SmolLM2 (D 64) and Llama 3.1
# 8B (D 128), contexts of 1,024 to 131,072 tokens; larger D and float32 are not tuned.


def _prefill_tiles(block_D: int, wide: bool, device: TritonDevice) -> _Tiles:
    """float32 products run without tensor cores, from registers: small tiles."""
    if wide:
        return _Tiles(rows=32, tokens=32, num_warps=4, num_stages=1)
    if block_D <= 64:
        rows, tokens, num_warps = 64, 128, 4
    elif block_D <= 128:
        rows, tokens, num_warps = 128, 128, 8
    else:
        rows, tokens, num_warps = 64, 32, 8
    return _Tiles(rows, tokens, num_warps, _num_stages(rows, tokens, block_D, device))


def _decode_tiles(block_D: int, wide: bool, rows: int, device: TritonDevice) -> _Tiles:
    """One tile of rows is enough; tokens are what is loaded at once."""
    if wide:
        return _Tiles(rows, tokens=32, num_warps=4, num_stages=1)
    tokens = 128 if block_D <= 64 else 64 if block_D <= 128 else 32
    return _Tiles(rows, tokens, 4, _num_stages(rows, tokens, block_D, device))


def _num_stages(rows: int, tokens: int, block_D: int, device: TritonDevice) -> int:
    """For tiles of k and v beside q, in 16 bits."""
    return device.num_stages(2 * rows * block_D, 2 * 2 * tokens * block_D)
