"""Launches the Gluon kernel of prompts without a cached prefix, where `fits` says that it can run.

Imported only where a Hopper GPU is: Gluon kernels run in no interpreter. Shape legend: see
core.interfaces.attention.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from core.interfaces.attention import AttentionSpec, NewKV, SequenceBatch
from plugins.attention._prompt_gluon_kernels import (
    HALF_ROWS,
    HEAD_DIM,
    ROWS,
    SHARED,
    TOKENS,
    prompt_kernel,
)
from plugins.attention._triton_prompt_kernels import blocks_kernel

_LEAST_BLOCKS = 4  # of each multiprocessor; with fewer, Triton's small tiles are as fast


def fits(spec: AttentionSpec) -> bool:
    """Whether the kernel takes such heads, on a Hopper GPU."""
    return spec.dtype is torch.bfloat16 and spec.head_dim == HEAD_DIM


@dataclass(frozen=True, slots=True)
class PromptBlocks:
    """The blocks of rows of a batch, in the order in which they are taken."""

    blocks_BX: Tensor  # int32: see plugins.attention._prompt_gluon_kernels


class GluonPrompts:
    """Attention of new rows that come after nothing."""

    def __init__(self, spec: AttentionSpec, scale_log2: float, num_multiprocessors: int) -> None:
        self._spec, self._scale_log2 = spec, scale_log2
        self._multiprocessors = num_multiprocessors

    def takes(self, batch: SequenceBatch) -> bool:
        """Whether nothing is cached before the new rows, and every multiprocessor gets enough.

        Sequences must end where tiles do: values of the rows behind are multiplied by 0, which a
        NaN of another request survives. Lengths of a step that is being captured are bounds, which
        don't say what is cached."""
        num_blocks = sum(batch.query_lens) // ROWS * self._spec.num_heads
        return (
            num_blocks >= _LEAST_BLOCKS * self._multiprocessors
            and batch.query_lens == batch.context_lens
            and all(length % TOKENS == 0 for length in batch.query_lens)
            and not torch.cuda.is_current_stream_capturing()
        )

    def plan(self, batch: SequenceBatch) -> PromptBlocks:
        """On the device; nothing waits for it."""
        num_sequences, num_rows = len(batch.query_lens), sum(batch.query_lens)
        num_blocks = num_rows // ROWS + num_sequences + 1
        blocks_BX = torch.empty((num_blocks, 4), dtype=torch.int32, device=self._spec.device)
        blocks_kernel[(num_blocks,)](
            batch.query_starts_S1, blocks_BX, num_sequences, num_blocks, num_rows, BLOCK_M=ROWS
        )
        return PromptBlocks(blocks_BX)

    def attend(self, plan: PromptBlocks, q_THD: Tensor, new: NewKV, out_THD: Tensor) -> None:
        """Launch the kernel."""
        spec, num_blocks = self._spec, plan.blocks_BX.shape[0]
        programs = min(self._multiprocessors, num_blocks * spec.num_heads)
        prompt_kernel[(programs,)](
            _blocks(q_THD, HALF_ROWS),
            _blocks(new.k_TGD, TOKENS),
            _blocks(new.v_TGD, TOKENS),
            out_THD,
            plan.blocks_BX,
            num_blocks,
            SCALE_LOG2=self._scale_log2,
            H=spec.num_heads,
            G=spec.num_kv_heads,
            num_warps=4,
        )


def _blocks(x_TFD: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` rows and one head; rows may lie apart, heads are contiguous."""
    num_rows, num_heads, head_dim = x_TFD.shape
    assert x_TFD.stride()[1:] == (head_dim, 1)
    shape, strides = [num_rows, num_heads * head_dim], [x_TFD.stride(0), 1]
    return TensorDescriptor(x_TFD, shape, strides, [rows, head_dim], SHARED)
