"""Launches the Gluon kernel of prompts, where `fits` says that it can run.

Imported only where a Hopper GPU is: Gluon kernels run in no interpreter. Shape legend: see
core.interfaces.attention.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from core.interfaces.attention import AttentionSpec, LayerKV, NewKV, SequenceBatch
from plugins.attention._triton_heads.prompt_gluon_kernels import (
    HALF_ROWS,
    HEAD_DIM,
    ROWS,
    SHARED,
    TOKENS,
    prompt_kernel,
)
from plugins.attention._triton_heads.prompt_kernels import blocks_kernel

_LEAST_PAGE = 8  # tokens: a swizzled tile of shared memory repeats after as many rows
_LEAST_BLOCKS = 4  # of each multiprocessor; with fewer, Triton's small tiles are as fast


def fits(spec: AttentionSpec) -> bool:
    """Whether the kernel takes such heads, on a Hopper GPU."""
    return spec.dtype is torch.bfloat16 and spec.head_dim == HEAD_DIM


@dataclass(frozen=True, slots=True)
class PromptBlocks:
    """The blocks of rows of a batch, in the order in which they are taken."""

    blocks_BX: Tensor  # int32: see plugins.attention._triton_heads.prompt_gluon_kernels
    page_table_SM: Tensor
    page_size: int  # 0: nothing is cached before the new rows, which are read where they lie


class GluonPrompts:
    """Attention of many new rows."""

    def __init__(self, spec: AttentionSpec, scale_log2: float, num_multiprocessors: int) -> None:
        self._spec, self._scale_log2 = spec, scale_log2
        self._multiprocessors = num_multiprocessors
        self._takes_pages = spec.page_size % _LEAST_PAGE == 0 == TOKENS % spec.page_size

    def takes(self, batch: SequenceBatch) -> bool:
        """Whether every multiprocessor gets enough: of many short prompts, which fill no block,
        Triton's kernels are as fast. Where something is cached pages must fill tiles."""
        num_blocks = sum(rows // ROWS for rows in batch.query_lens) * self._spec.num_heads
        enough = num_blocks >= _LEAST_BLOCKS * self._multiprocessors
        return enough and (self._takes_pages or not self._may_have_prefix(batch))

    def plan(self, batch: SequenceBatch) -> PromptBlocks:
        """On the device; nothing waits for it."""
        num_sequences, num_rows = len(batch.query_lens), sum(batch.query_lens)
        prefix = self._may_have_prefix(batch)
        num_blocks = num_rows // ROWS + (2 if prefix else 1) * num_sequences + 1
        blocks_BX = torch.empty((num_blocks, 5), dtype=torch.int32, device=self._spec.device)
        blocks_kernel[(num_blocks,)](
            batch.query_starts_S1,
            batch.context_lens_S,
            blocks_BX,
            num_sequences,
            num_blocks,
            num_rows,
            PREFIX=prefix,
            BLOCK_M=ROWS,
        )
        page_size = self._spec.page_size if prefix else 0
        return PromptBlocks(blocks_BX, batch.page_table_SM, page_size)

    def _may_have_prefix(self, batch: SequenceBatch) -> bool:
        """Lengths of a step that is being captured are bounds, and don't say what is cached."""
        return batch.query_lens != batch.context_lens or _is_captured(self._spec.device)

    def attend(
        self, plan: PromptBlocks, kv: LayerKV, q_THD: Tensor, new: NewKV, out_THD: Tensor
    ) -> None:
        """Launch the kernel."""
        spec, num_blocks = self._spec, plan.blocks_BX.shape[0]
        programs = min(self._multiprocessors, num_blocks * spec.num_heads)
        if plan.page_size:
            k_blocks, v_blocks = _pages(kv.k_NPGD), _pages(kv.v_NPGD)
        else:
            k_blocks, v_blocks = _blocks(new.k_TGD, TOKENS), _blocks(new.v_TGD, TOKENS)
        prompt_kernel[(programs,)](
            _blocks(q_THD, HALF_ROWS),
            k_blocks,
            v_blocks,
            out_THD,
            plan.blocks_BX,
            plan.page_table_SM,
            num_blocks,
            q_THD.shape[0],
            plan.page_table_SM.stride(0),
            SCALE_LOG2=self._scale_log2,
            H=spec.num_heads,
            G=spec.num_kv_heads,
            PAGE_SIZE=plan.page_size,
            num_warps=4,
        )


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _pages(x_NPGD: Tensor) -> TensorDescriptor:
    """Half of the columns of a page in one head."""
    num_pages, page_size, num_heads, head_dim = x_NPGD.shape
    columns = num_heads * head_dim
    shape, block = [num_pages * page_size, columns], [page_size, head_dim // 2]
    return TensorDescriptor(x_NPGD, shape, [columns, 1], block, SHARED)


def _blocks(x_TFD: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` rows and one head; rows may lie apart, heads are contiguous."""
    num_rows, num_heads, head_dim = x_TFD.shape
    assert x_TFD.stride()[1:] == (head_dim, 1)
    shape, strides = [num_rows, num_heads * head_dim], [x_TFD.stride(0), 1]
    return TensorDescriptor(x_TFD, shape, strides, [rows, head_dim], SHARED)
