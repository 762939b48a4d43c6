"""What a kernel of absorbed latent attention is given: the splits of a line of tiles.

Each program takes one split for one block of heads;
plugins.attention._triton_heads.decode_schedule explains line, splits and pieces. Only data and a
contract: knows no kernel. Shape legend: see core.interfaces.latent_attention; P programs of a block
of heads.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from core.interfaces.attention import SequenceBatch


@dataclass(frozen=True, slots=True)
class Splits:
    """One layer's work. `schedule_RX` says what each program does; `workspace` holds, float32, the
    normalised results of pieces (P, 2, H, C), then the log2 of their sums (P, 2, H)."""

    batch: SequenceBatch  # of one row each
    schedule_RX: Tensor
    workspace: Tensor
    num_programs: int  # P
    q_THC: Tensor
    q_THR: Tensor
    cache_BPZ: Tensor
    out_THC: Tensor


class SplitKernel(Protocol):
    """Absorbed attention of every split."""

    heads: int  # of a program
    tokens: int  # of a tile

    def attend(self, work: Splits) -> None:
        """Whole results to `out`, pieces to the workspace. Never waits for the device."""
        ...
