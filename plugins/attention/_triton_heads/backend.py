"""Launches the Triton kernels of paged attention: which kernel, tile sizes, and workspaces.

A step whose sequences all have one new row takes the decode kernel; one with long prompts the
prompt kernel, which reads new rows where they were projected, or the one for Hopper; any other the
paged prefill kernel.
Grids follow from bounds on the host alone; lengths are read on the device, so that a step
can be captured as a CUDA graph, and eager steps run the same code. On CPU tensors the kernels run
in Triton's interpreter (TRITON_INTERPRET=1), for tests.
Shape legend: see core.interfaces.attention; P programs of a launch.
"""

import importlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from core.interfaces.attention import AttentionSpec, LayerKV, NewKV, SequenceBatch
from core.plugin.hookspecs import NoOptions
from plugins.attention._triton_heads.decode import DecodeChoice, DecodePlan, PagedDecode
from plugins.attention._triton_heads.device import TritonDevice, describe
from plugins.attention._triton_heads.kernels import prefill_kernel
from plugins.attention._triton_heads.prompt_kernels import prompt_kernel

if TYPE_CHECKING:
    from plugins.attention._triton_heads.prompt_gluon import GluonPrompts, PromptBlocks


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile sizes of one kernel: the most rows, tokens, and how it is compiled."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread


@dataclass(frozen=True, slots=True)
class _PrefillPlan:
    batch: SequenceBatch
    block_rows: int
    num_blocks: int
    prompt_tiles: Tiles | None  # None: the prompt kernel would idle, or can't
    prompt_blocks: "PromptBlocks | None"  # of the kernel for Hopper, where it serves


def build(options: NoOptions, spec: AttentionSpec) -> "TritonBackend":
    """The factory named by the registration."""
    return TritonBackend(spec)


class TritonBackend:
    """Both phases, any page size and head dimension."""

    capturable = True

    def __init__(
        self,
        spec: AttentionSpec,
        decode: DecodeChoice | None = None,
        prompt_tiles: Tiles | None = None,
    ) -> None:
        """Choices other than those measured are for measuring."""
        self._spec = spec
        self._group = spec.num_heads // spec.num_kv_heads
        device = describe(spec.device)
        # The tensor cores take no float32 without losing bits, and the interpreter's dot no bf16.
        self._wide = device.interpreted or spec.dtype is torch.float32
        self._block_D = max(16, triton.next_power_of_2(spec.head_dim))
        self._least_rows = max(16, triton.next_power_of_2(self._group))
        self._scale_log2 = spec.scale * math.log2(math.e)
        self._decode = PagedDecode(spec, device, decode)
        self._prefill_tiles = _prefill_tiles(self._block_D, self._wide, device)
        small_tiles, large_tiles = _prompt_tiles(device)
        self._small_prompt_tiles = prompt_tiles or small_tiles
        self._large_prompt_tiles = prompt_tiles or large_tiles
        self._many_programs = 8 * device.num_multiprocessors
        # Tensor descriptors need a power of two, and tiles of float32 don't fit.
        narrow = spec.dtype.itemsize == 2 or device.interpreted
        self._takes_prompts = narrow and spec.head_dim in (16, 32, 64, 128)
        self._gluon = _gluon_prompts(spec, self._scale_log2, device) if not prompt_tiles else None

    def plan(self, batch: SequenceBatch) -> _PrefillPlan | DecodePlan:
        """Grids from bounds; decode's schedule is made on the device. Nothing waits for it."""
        longest_rows = max(batch.query_lens)
        if longest_rows == 1:
            return self._decode.plan(batch)
        wanted = triton.next_power_of_2(longest_rows * self._group)
        block_rows = max(self._least_rows, min(wanted, self._prefill_tiles.rows))
        block_tokens = block_rows // self._group
        # One more than the sequences can need, for rows of padding.
        num_blocks = sum(batch.query_lens) // block_tokens + len(batch.query_lens) + 1
        blocks = None
        if self._gluon is not None and self._gluon.takes(batch):
            blocks = self._gluon.plan(batch)
        return _PrefillPlan(batch, block_rows, num_blocks, self._tiles_of_prompts(batch), blocks)

    def _tiles_of_prompts(self, batch: SequenceBatch) -> Tiles | None:
        """Large tiles where there are enough of them for every multiprocessor."""
        if not self._takes_prompts:
            return None
        large = self._large_prompt_tiles
        programs = sum(batch.query_lens) // large.rows * self._spec.num_heads
        tiles = large if programs >= self._many_programs else self._small_prompt_tiles
        return tiles if 2 * max(batch.query_lens) > tiles.rows else None

    def forward(
        self, plan: object, kv: LayerKV, q_THD: Tensor, out_THD: Tensor, new: NewKV | None = None
    ) -> None:
        """Launch the kernels of the plan; q needs contiguous heads."""
        assert q_THD.stride()[1:] == (self._spec.head_dim, 1)
        assert out_THD.is_contiguous()
        assert kv.k_NPGD.is_contiguous()
        assert kv.v_NPGD.is_contiguous()
        if isinstance(plan, _PrefillPlan):
            if new is not None and plan.prompt_blocks is not None:
                assert self._gluon is not None
                self._gluon.attend(plan.prompt_blocks, kv, q_THD, new, out_THD)
            elif new is not None and plan.prompt_tiles is not None:
                self._prompt(plan.batch, plan.prompt_tiles, kv, q_THD, out_THD, new)
            else:
                self._prefill(plan, kv, q_THD, out_THD)
        else:
            assert isinstance(plan, DecodePlan)
            self._decode.attend(plan, kv, q_THD, out_THD)

    def _prompt(
        self,
        batch: SequenceBatch,
        tiles: Tiles,
        kv: LayerKV,
        q_THD: Tensor,
        out_THD: Tensor,
        new: NewKV,
    ) -> None:
        spec = self._spec
        num_blocks = sum(batch.query_lens) // tiles.rows + len(batch.query_lens) + 1
        prompt_kernel[(spec.num_heads, num_blocks)](
            _rows_of_heads(q_THD, tiles.rows),
            _rows_of_heads(new.k_TGD, tiles.tokens),
            _rows_of_heads(new.v_TGD, tiles.tokens),
            kv.k_NPGD,
            kv.v_NPGD,
            out_THD,
            batch.query_starts_S1,
            batch.context_lens_S,
            batch.page_table_SM,
            len(batch.query_lens),
            num_blocks,
            q_THD.shape[0],
            batch.page_table_SM.stride(0),
            SCALE_LOG2=self._scale_log2,
            PREFIX=True,
            WIDE=self._wide,
            H=spec.num_heads,
            G=spec.num_kv_heads,
            PAGE_SIZE=spec.page_size,
            HEAD_DIM=spec.head_dim,
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.tokens,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            maxnreg=tiles.max_registers,
        )

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
            q_THD.shape[0],
            q_THD.stride(0),
            batch.page_table_SM.stride(0),
            SCALE_LOG2=self._scale_log2,
            WIDE=self._wide,
            GROUP=self._group,
            G=spec.num_kv_heads,
            PAGE_SIZE=spec.page_size,
            HEAD_DIM=spec.head_dim,
            BLOCK_M=plan.block_rows,
            BLOCK_N=tiles.tokens,
            BLOCK_D=self._block_D,
            num_warps=tiles.num_warps if plan.block_rows >= 64 else 4,
            num_stages=tiles.num_stages,
        )


def _gluon_prompts(
    spec: AttentionSpec, scale_log2: float, device: TritonDevice
) -> "GluonPrompts | None":
    """The kernel for Hopper where the device and the heads are its own."""
    if spec.device.type != "cuda" or torch.cuda.get_device_capability(spec.device)[0] != 9:
        return None
    gluon = importlib.import_module("plugins.attention._triton_heads.prompt_gluon")
    if not gluon.fits(spec):
        return None
    prompts: GluonPrompts = gluon.GluonPrompts(spec, scale_log2, device.num_multiprocessors)
    return prompts


def _rows_of_heads(x_TFD: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` rows and one head; rows may lie apart, heads are contiguous."""
    num_rows, num_heads, head_dim = x_TFD.shape
    assert x_TFD.stride()[1:] == (head_dim, 1)
    return TensorDescriptor(
        x_TFD, [num_rows, num_heads * head_dim], [x_TFD.stride(0), 1], [rows, head_dim]
    )


# Tile sizes of prefill are the fastest of a sweep on an H100 over the shapes of SmolLM2 (D 64) and
# Llama 3.1 8B (D 128); larger D and float32 are not tuned.


def _prefill_tiles(block_D: int, wide: bool, device: TritonDevice) -> Tiles:
    """float32 products run without tensor cores, from registers: small tiles."""
    if wide:
        return Tiles(rows=32, tokens=32, num_warps=4, num_stages=1)
    if block_D <= 64:
        rows, tokens, num_warps = 64, 128, 4
    elif block_D <= 128:
        rows, tokens, num_warps = 128, 128, 8
    else:
        rows, tokens, num_warps = 64, 32, 8
    return Tiles(rows, tokens, num_warps, _num_stages(rows, tokens, block_D, device))


def _prompt_tiles(device: TritonDevice) -> tuple[Tiles, Tiles]:
    """For few programs and for many: two of the large ones fit a multiprocessor, if each thread
    has at most 128 registers."""
    if device.interpreted:
        return Tiles(16, 16, 4, 1), Tiles(32, 16, 4, 1)
    return Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 2, max_registers=128)


def _num_stages(rows: int, tokens: int, block_D: int, device: TritonDevice) -> int:
    """For tiles of k and v beside q, in 16 bits."""
    return device.num_stages(2 * rows * block_D, 2 * 2 * tokens * block_D)
