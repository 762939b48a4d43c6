"""Paged decode on a GPU: tile sizes by the number of sequences, schedule, launches.

The schedule is made by the device from the lengths it finds there, and grids follow from bounds: a
step can be captured as a CUDA graph, and eager steps run the same code. What is launched for how
many sequences is data (core/gpu_tools/tuned/attention_decode.json, measured by
benchmarks.gpu_attention). Shape legend: see core.interfaces.attention.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from core.gpu_tools import tuning
from core.gpu_tools.dependent_launch import options
from core.interfaces.attention import AttentionSpec, LayerKV, SequenceBatch
from plugins.attention._triton_heads.decode_kernels import decode_kernel
from plugins.attention._triton_heads.decode_schedule import SCHEDULE_COLUMNS, schedule_kernel
from plugins.attention._triton_heads.device import TritonDevice

_ANY_NUMBER = 1 << 30
_LEAST_ROWS = 16  # of a tile of query heads: the least that tensor cores take


@dataclass(frozen=True, slots=True)
class DecodeChoice:
    """How decode is launched for up to `max_rows` sequences."""

    max_rows: int
    tokens: int  # of a tile
    num_warps: int
    num_stages: int
    max_registers: int | None  # of a thread
    programs: int  # of a multiprocessor
    levels: int  # of splits: see plugins.attention._triton_heads.decode_schedule


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """What every program does for a batch."""

    batch: SequenceBatch
    choice: DecodeChoice
    schedule_RX: Tensor  # int32: see plugins.attention._triton_heads.decode_schedule


class PagedDecode:
    """Attention of one new row a sequence, of any page size and head dimension."""

    def __init__(
        self, spec: AttentionSpec, device: TritonDevice, choice: DecodeChoice | None = None
    ) -> None:
        """`choice`: instead of those measured, for measuring."""
        self._spec = spec
        self._group = spec.num_heads // spec.num_kv_heads
        # The tensor cores take no float32 without losing bits, and the interpreter's dot no bf16.
        self._wide = device.interpreted or spec.dtype is torch.float32
        self._block_D = max(16, triton.next_power_of_2(spec.head_dim))
        self._rows = max(_LEAST_ROWS, triton.next_power_of_2(self._group))
        self._scale_log2 = spec.scale * math.log2(math.e)
        self._launch = options(spec.device)
        self._multiprocessors = device.num_multiprocessors
        self._choices = [choice] if choice is not None else list(self._measured(device))
        most_splits = max(self._num_splits(each) for each in self._choices)
        # Shared by all layers and steps, which run one after the other.
        num_values = most_splits * 2 * self._group * (spec.head_dim + 1)
        self._workspace = torch.empty(num_values, dtype=torch.float32, device=spec.device)
        self._counts = torch.zeros(most_splits + 1, dtype=torch.int32, device=spec.device)

    def _measured(self, device: TritonDevice) -> Iterator[DecodeChoice]:
        """By rising `max_rows`; what was measured for most sequences serves more of them."""
        found = tuning.choices(
            "attention_decode",
            self._spec.device,
            head_dim=self._spec.head_dim,
            group=self._group,
            value_bytes=4 if self._wide else 2,
        )
        for row in found:
            yield DecodeChoice(
                max_rows=_ANY_NUMBER if row is found[-1] else row["max_rows"],
                tokens=row["tokens"],
                num_warps=row["num_warps"],
                num_stages=row["num_stages"],
                max_registers=row["max_registers"],
                programs=row["programs"],
                levels=row["levels"],
            )
        if not found:
            yield usual_choice(self._block_D, self._rows, self._wide, device)

    def _num_programs(self, choice: DecodeChoice) -> int:
        return choice.programs * self._multiprocessors

    def _num_splits(self, choice: DecodeChoice) -> int:
        return self._num_programs(choice) * choice.levels

    def plan(self, batch: SequenceBatch) -> DecodePlan:
        """The schedule, made on the device; nothing waits for it."""
        num_sequences = len(batch.query_lens)
        choice = next(each for each in self._choices if num_sequences <= each.max_rows)
        num_splits = self._num_splits(choice)
        shape = (num_splits, SCHEDULE_COLUMNS.value)
        schedule_RX = torch.empty(shape, dtype=torch.int32, device=self._spec.device)
        schedule_kernel[(num_splits,)](
            batch.context_lens_S,
            schedule_RX,
            num_sequences,
            P=self._num_programs(choice),
            LEVELS=choice.levels,
            G=self._spec.num_kv_heads,
            BLOCK_N=choice.tokens,
            WHOLE=False,  # pieces of a few heads are small
            num_warps=4,
        )
        return DecodePlan(batch, choice, schedule_RX)

    def attend(self, plan: DecodePlan, kv: LayerKV, q_THD: Tensor, out_THD: Tensor) -> None:
        """Launch the kernel; q needs contiguous heads."""
        spec, batch, choice = self._spec, plan.batch, plan.choice
        decode_kernel[(self._num_programs(choice),)](
            q_THD,
            kv.k_NPGD,
            kv.v_NPGD,
            out_THD,
            self._workspace,
            plan.schedule_RX,
            self._counts,
            batch.context_lens_S,
            batch.page_table_SM,
            len(batch.query_lens),
            q_THD.stride(0),
            batch.page_table_SM.stride(0),
            SCALE_LOG2=self._scale_log2,
            WIDE=self._wide,
            GROUP=self._group,
            G=spec.num_kv_heads,
            PAGE_SIZE=spec.page_size,
            HEAD_DIM=spec.head_dim,
            BLOCK_M=self._rows,
            BLOCK_R=triton.next_power_of_2(self._group),
            BLOCK_N=choice.tokens,
            BLOCK_D=self._block_D,
            LEVELS=choice.levels,
            # One program of a multiprocessor has registers for more, and few units many pieces.
            TOGETHER=16 if choice.programs == 1 else 8,
            num_warps=choice.num_warps,
            num_stages=choice.num_stages,
            maxnreg=choice.max_registers,
            **self._launch,
        )


def usual_choice(block_D: int, rows: int, wide: bool, device: TritonDevice) -> DecodeChoice:
    """Where nothing was measured. One tile of rows is enough; tokens are what is loaded at once."""
    tokens = 32 if wide else 128 if block_D <= 64 else 64 if block_D <= 128 else 32
    # For tiles of k and v beside q, in 16 bits.
    num_stages = 1 if wide else device.num_stages(2 * rows * block_D, 2 * 2 * tokens * block_D)
    return DecodeChoice(
        max_rows=_ANY_NUMBER,
        tokens=tokens,
        num_warps=4,
        num_stages=num_stages,
        max_registers=None,
        programs=2,
        levels=4,
    )
