"""Attention over a paged KV cache: the interface that plugins implement and that models call.

Shape legend: T new tokens of a step, S sequences, H query heads of this rank, G KV heads of this
rank, D head dimension, C positions, R rotated values of a head, F = H + 2G projected heads, N KV
pages, P tokens in a page, M most pages of one sequence in a step.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The sizes that a backend is built for, on this rank. They are the same for every layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # applied to q.k before the softmax
    page_size: int
    dtype: torch.dtype
    device: torch.device
    max_context_tokens: int  # of the longest sequence


@dataclass(frozen=True, slots=True)
class LayerKV:
    """The KV cache of one layer, in the model's dtype. The engine owns it. Page 0 is scratch."""

    k_NPGD: Tensor
    v_NPGD: Tensor


@dataclass(frozen=True, slots=True)
class HeadTransform:
    """What is done to a layer's projected query and key heads before attention."""

    num_kv_heads: int  # G: a token has H query heads, G key heads, G value heads, in this order
    # float32: cos in the first R/2 columns, sin in the rest. The first R values of a head are
    # rotated. If R < D, the other values do not change.
    cos_sin_CR: Tensor
    # Weights of an RMS norm of each head, before the rotation. Both are set, or neither.
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    eps: float


@dataclass(frozen=True, slots=True)
class NewKV:
    """k and v of the new tokens of a phase, after `HeadTransform`, contiguous in their heads.

    They are in the cache too. A backend may read sequences without a cached prefix from here."""

    k_TGD: Tensor
    v_TGD: Tensor


@dataclass(slots=True)
class SequenceBatch:
    """The sequences of one phase in one step. Their tokens follow each other in sequence order.

    Token i of sequence s has position `context_lens[s] - query_lens[s] + i`. It attends to every
    cached position up to its own. Its k and v are in the cache before the backend is called.
    """

    query_lens: list[int]  # new tokens of each, at least 1; all 1 in the decode phase
    context_lens: list[int]  # cached tokens of each, the new ones included
    # In a step captured as a CUDA graph the two lists above are upper bounds. The real values are
    # on the device, and a padding sequence has 0 tokens there. Only `capturable` backends get such
    # a step.
    query_starts_S1: Tensor  # int32 on the device: cumulative query_lens, S+1 values
    context_lens_S: Tensor  # int32 on the device
    page_table_SM: Tensor  # int32 on the device: the page of each P tokens; 0 past the end


class AttentionBackend(Protocol):
    """Attention of one phase. `plan` runs once per step, `forward` once per layer.

    If `capturable`, both can be captured in a CUDA graph: the grids of their kernels depend only on
    the bounds on the host, and the kernels read lengths and pages on the device.
    """

    capturable: bool

    def plan(self, batch: SequenceBatch) -> object:
        """Return what `forward` needs besides q and the cache. It is valid for this step only."""
        ...

    def forward(
        self, plan: object, kv: LayerKV, q_THD: Tensor, out_THD: Tensor, new: NewKV | None = None
    ) -> None:
        """Write causal attention of every token into `out_THD` (contiguous, same dtype as q).

        In a captured step, write zero for padding: tokens after those of all sequences, and tokens
        of padding sequences."""
        ...


class AttentionStep(Protocol):
    """The attention of one step, as a model uses it: both phases, the cache and its pages."""

    def attend(
        self, layer: int, qkv_TFD: Tensor, heads: HeadTransform, positions_T: Tensor
    ) -> Tensor:
        """Return the attention output (T, H, D) of tokens with F = H + 2G projected heads each.

        `qkv_TFD` is contiguous and may be overwritten; `positions_T` is int64. The call transforms
        the heads and stores k and v of the tokens in the cache. The output of padding is zero."""
        ...
