"""Absorbed latent attention on a GPU: schedule, every program's split, the sums of pieces.

The schedule is made by the device from the lengths it finds there, and grids follow from bounds: a
decode step can be captured as a CUDA graph, and eager steps run the same code. On CPU tensors the
kernels run in Triton's interpreter (TRITON_INTERPRET=1), for tests. Knows nothing of how a split
is attended. Shape legend: see core.interfaces.latent_attention.
"""

import importlib
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from core.gpu_tools.dependent_launch import options
from core.interfaces.attention import SequenceBatch
from core.interfaces.latent_attention import LatentAttentionSpec
from plugins.attention._triton_heads.decode_schedule import SCHEDULE_COLUMNS, schedule_kernel
from plugins.attention._triton_heads.device import describe
from plugins.attention._triton_latent.portable import PortableKernel, block_of
from plugins.attention._triton_latent.splits import SplitKernel, Splits
from plugins.attention._triton_latent.sum_kernels import sum_kernel

# Pieces of a head that are summed up at once, and heads of a program: few sequences, many pieces.
_MANY_PIECES, _FEW_PIECES = (16, 1), (2, 8)
_FEW_SEQUENCES = 16


@dataclass(frozen=True, slots=True)
class Absorbed:
    """One row a sequence, and what every program does for them."""

    batch: SequenceBatch
    schedule_RX: Tensor  # int32: see plugins.attention._triton_heads.decode_schedule


class AbsorbedAttention:
    """The absorbed form of a rank's latent attention, of any number of rows a sequence."""

    def __init__(self, spec: LatentAttentionSpec) -> None:
        self._spec = spec
        self.kernel = _select(spec, spec.scale * math.log2(math.e))
        self._launch = options(spec.device)
        head_blocks = triton.cdiv(spec.num_heads, self.kernel.heads)
        self._num_programs = max(1, describe(spec.device).num_multiprocessors // head_blocks)
        # Shared by all layers and steps, which run one after the other.
        num_values = self._num_programs * 2 * spec.num_heads * (spec.latent_dim + 1)
        self._workspace = torch.empty(num_values, dtype=torch.float32, device=spec.device)

    def plan(self, batch: SequenceBatch) -> Absorbed:
        """Sequences of one row, and their schedule: what every program does, then the sums of
        sequences, where they are fewer."""
        if max(batch.query_lens) > 1:
            batch = _one_row_each(batch)
        num_programs, num_sequences = self._num_programs, len(batch.query_lens)
        num_rows = num_programs + (num_sequences if num_sequences < num_programs else 0)
        shape = (num_rows, SCHEDULE_COLUMNS.value)
        schedule_RX = torch.empty(shape, dtype=torch.int32, device=self._spec.device)
        schedule_kernel[(num_rows,)](
            batch.context_lens_S,
            schedule_RX,
            num_sequences,
            P=num_programs,
            LEVELS=1,
            G=1,
            BLOCK_N=self.kernel.tokens,
            WHOLE=True,  # pieces of all heads are large
            num_warps=4,
        )
        return Absorbed(batch, schedule_RX)

    def attend(
        self, plan: Absorbed, cache_BPZ: Tensor, q_THC: Tensor, q_THR: Tensor, out_THC: Tensor
    ) -> None:
        """Every program's split, then the sums of what several had a part in."""
        assert q_THC.is_contiguous()
        assert q_THR.stride(2) == 1
        assert out_THC.is_contiguous()
        assert cache_BPZ.is_contiguous()
        self.kernel.attend(
            Splits(
                plan.batch,
                plan.schedule_RX,
                self._workspace,
                self._num_programs,
                q_THC,
                q_THR,
                cache_BPZ,
                out_THC,
            )
        )
        self._add_pieces(plan, out_THC)

    def _add_pieces(self, plan: Absorbed, out_THC: Tensor) -> None:
        spec, num_sequences = self._spec, len(plan.batch.query_lens)
        num_programs, num_rows = self._num_programs, plan.schedule_RX.shape[0]
        by_sequence = num_rows > num_programs
        num_sums = num_rows - num_programs if by_sequence else num_programs
        pieces, heads = _MANY_PIECES if num_sequences < _FEW_SEQUENCES else _FEW_PIECES
        sum_kernel[(num_sums, triton.cdiv(spec.num_heads, heads))](
            out_THC,
            self._workspace,
            plan.schedule_RX,
            plan.batch.context_lens_S,
            num_sequences,
            NUM_STRETCHES=num_programs,
            FIRST_ROW=num_programs if by_sequence else 0,
            GROUP=spec.num_heads,
            G=1,
            HEAD_DIM=spec.latent_dim,
            BLOCK_X=pieces,
            BLOCK_R=heads,
            BLOCK_D=block_of(spec.latent_dim),
            num_warps=4,
            **self._launch,
        )


def _select(spec: LatentAttentionSpec, scale_log2: float) -> SplitKernel:
    """The kernel for Hopper where the device and the shapes are its own."""
    if spec.device.type == "cuda" and torch.cuda.get_device_capability(spec.device)[0] == 9:
        gluon = importlib.import_module("plugins.attention._triton_latent.gluon")
        if gluon.fits(spec):
            kernel: SplitKernel = gluon.GluonKernel(spec, scale_log2)
            return kernel
    return PortableKernel(spec, scale_log2)


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
