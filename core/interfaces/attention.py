"""Attention over a paged KV cache: what plugins fill and what models call.

Shape legend: T rows (new tokens) of a step, S sequences, H query heads of this rank, G its KV
heads, D head dimension, C positions, R values of a head that turn, N KV pages, P tokens in a page,
M most pages of one sequence in a step.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What a backend is built for; the same for every layer. Sizes are this rank's."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # applied to q.k before the softmax
    page_size: int
    dtype: torch.dtype
    device: torch.device
    max_context_tokens: int  # longest sequence


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's share of the KV pool; the engine owns it. Page 0 is a scratch page."""

    k_NPGD: Tensor
    v_NPGD: Tensor


@dataclass(frozen=True, slots=True)
class HeadTransform:
    """What happens to a layer's projected query and key heads before they meet."""

    num_kv_heads: int  # G of the H + 2G heads of a row: queries, keys, values
    # float32: cos in the first R/2 columns, sin in the rest. The first R values of a head turn;
    # what it has beyond, where R < D, stays as it is.
    cos_sin_CR: Tensor
    # Weights of an RMS norm of each head before the rotation; both, or neither.
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    eps: float


@dataclass(frozen=True, slots=True)
class NewKV:
    """k and v of a phase's new rows as attention sees them, contiguous in their heads. They are in
    the cache too; a backend may read a sequence without a cached prefix from here."""

    k_TGD: Tensor
    v_TGD: Tensor


@dataclass(slots=True)
class SequenceBatch:
    """The sequences of one phase in one step; rows lie back to back in sequence order.

    Row i of sequence s stands at position `context_lens[s] - query_lens[s] + i` and sees every
    cached position up to its own (its k and v are in the cache before the backend is called).
    """

    query_lens: list[int]  # new rows, at least 1 each; all 1 in the decode phase
    context_lens: list[int]  # cached tokens including the new rows
    # In a step captured as a CUDA graph (only `capturable` backends see one) the two lists above
    # are upper bounds: what holds is on the device, where a sequence of padding has 0 tokens.
    query_starts_S1: Tensor  # int32 on the device: cumulative query_lens, S+1 values
    context_lens_S: Tensor  # int32 on the device
    page_table_SM: Tensor  # int32 on the device: page of each P tokens; 0 past the end


class AttentionBackend(Protocol):
    """Attention of one phase. `plan` runs once a step, `forward` once a layer.

    Where `capturable`, both may be recorded as part of a CUDA graph: they launch kernels whose
    grids follow from the bounds on the host alone, and read lengths and pages on the device.
    """

    capturable: bool

    def plan(self, batch: SequenceBatch) -> object:
        """Whatever `forward` needs beside q and the cache; valid for this step only."""
        ...

    def forward(
        self, plan: object, kv: LayerKV, q_THD: Tensor, out_THD: Tensor, new: NewKV | None = None
    ) -> None:
        """Causal attention of every row, written into `out_THD` (contiguous, same dtype as q).

        Rows that a captured step has beyond those of its sequences, and those of sequences of
        padding, become zero."""
        ...


class AttentionStep(Protocol):
    """What a model sees of attention in one step (both phases, the cache and its pages)."""

    def attend(
        self, layer: int, qkv_TFD: Tensor, heads: HeadTransform, positions_T: Tensor
    ) -> Tensor:
        """Attention output (T, H, D) of rows of H + 2G projected heads (contiguous, F of them).

        Transforms the heads, in place perhaps, and stores k and v of the rows in the cache. The
        output of rows of padding is zero."""
        ...
