"""Multi-head latent attention (MLA) over a paged cache: the interface of plugins and models.

The cache has one vector for each token and layer. It consists of the compressed, normalised latent,
from which the keys and values of all heads are computed, and of one rotated key part that all heads
share. Prompts are computed un-absorbed: the keys and values of every head are expanded from the
latents. Decodes are computed absorbed: the expansion is moved into queries and outputs, so
attention runs over latents. Source: DeepSeek-V2, arXiv 2405.04434.

Shape legend: T new tokens of a phase, X cached tokens taken together, H query heads of this
rank, N non-rotary and R rotary dimensions of a head, D = N + R, V value dimensions of a head, C
latent dimensions, Z = C + R, P tokens in a page, B pages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from core.interfaces.attention import SequenceBatch

# (X, Z) cached vectors -> non-rotary keys (X, H, N) and values (X, H, V) of this rank's heads. The
# rotary part of a key is that of the cached vector, for every head.
Expand = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttentionSpec:
    """The sizes that a backend is built for, on this rank. They are the same for every layer."""

    num_heads: int  # H
    nope_dim: int  # N
    rope_dim: int  # R
    value_dim: int  # V
    latent_dim: int  # C
    scale: float  # applied to q.k before the softmax
    page_size: int
    dtype: torch.dtype
    device: torch.device
    max_context_tokens: int  # of the longest sequence


@dataclass(frozen=True, slots=True)
class LatentTransform:
    """What is done to a layer's projected latents and rotary parts before attention."""

    norm_C: Tensor  # weight of the latents' RMS norm
    eps: float
    cos_sin_CR: Tensor  # float32: cos in the first R/2 columns, sin in the rest
    interleaved: bool  # True: neighbouring pairs are rotated; False: halves


class LatentAttentionBackend(Protocol):
    """Attention of one phase. `plan` runs once per step, the other methods once per layer.

    `capturable` means the same as in core.interfaces.attention.AttentionBackend.
    """

    capturable: bool

    def plan(self, batch: SequenceBatch) -> object:
        """Return what the layers' calls need besides q and the cache; valid for this step only."""
        ...

    def absorbed(
        self, plan: object, cache_BPZ: Tensor, q_THC: Tensor, q_THR: Tensor, out_THC: Tensor
    ) -> None:
        """Write causal attention of every token over cached vectors into `out_THC`.

        Scores use all Z dimensions of a cached vector, values are its first C. A query has two
        parts: the latent part is contiguous, like `out_THC`. The rotary part can be a view whose
        vectors are contiguous. A sequence can have several tokens, because a backend may serve
        either phase."""
        ...

    def expanded(
        self, plan: object, cache_BPZ: Tensor, q_THD: Tensor, expand: Expand, out_THV: Tensor
    ) -> None:
        """Write causal attention of every token over expanded keys and values into `out_THV`.

        Expand some cached tokens at a time: all of a long context may not fit in memory."""
        ...


class LatentProjections(Protocol):
    """The expansion of one layer, in the three forms that attention needs."""

    def absorb(self, q_nope_THN: Tensor, out_THC: Tensor) -> None:
        """Turn queries for keys into queries for latents. Writes `out_THC` (contiguous vectors)."""
        ...

    def restore(self, out_THC: Tensor, out_THV: Tensor) -> None:
        """Turn weighted sums of latents into weighted sums of values. Writes `out_THV`."""
        ...

    def expand(self, cached_XZ: Tensor) -> tuple[Tensor, Tensor]:
        """Return the non-rotary keys (X, H, N) and the values (X, H, V)."""
        ...


class LatentAttentionStep(Protocol):
    """The latent attention of one step, as a model uses it: both phases, the cache, its pages."""

    def attend_latent(
        self,
        layer: int,
        q_THD: Tensor,
        cached_TZ: Tensor,
        transform: LatentTransform,
        positions_T: Tensor,
        projections: LatentProjections,
    ) -> Tensor:
        """Return the attention output (T, H, V).

        Transforms the queries and the vectors of new tokens by `positions_T` (int64), and writes
        these vectors into the cache. `q_THD` has the non-rotary part first; it may be overwritten.
        """
        ...
