"""Multi-head latent attention (MLA) over a paged cache: what plugins fill and what models call.

The cache holds one vector for each token and layer: the compressed, normalised latent that keys and
values of all heads are made of, and one rotated key part that all heads share. Prompts are computed
un-absorbed (keys and values of every head are expanded from the latents); decode rows absorbed (the
expansion is folded into queries and outputs, so that attention runs over latents).
Source: DeepSeek-V2, arXiv 2405.04434.

Shape legend: T rows (new tokens) of a phase, X cached tokens taken together, H query heads of this
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
    """What a backend is built for; the same for every layer. Heads are this rank's."""

    num_heads: int  # H
    nope_dim: int  # N
    rope_dim: int  # R
    value_dim: int  # V
    latent_dim: int  # C
    scale: float  # applied to q.k before the softmax
    page_size: int
    dtype: torch.dtype
    device: torch.device
    max_context_tokens: int  # longest sequence


@dataclass(frozen=True, slots=True)
class LatentTransform:
    """What happens to a layer's projected latents and rotary parts before attention."""

    norm_C: Tensor  # weight of the latents' RMS norm
    eps: float
    cos_sin_CR: Tensor  # float32: cos in the first R/2 columns, sin in the rest
    interleaved: bool  # neighbouring pairs are rotated, not halves


class LatentAttentionBackend(Protocol):
    """Attention of one phase. `plan` runs once a step, the others once a layer.

    `capturable`: as of core.interfaces.attention.AttentionBackend.
    """

    capturable: bool

    def plan(self, batch: SequenceBatch) -> object:
        """Whatever the layers' calls need beside q and the cache; valid for this step only."""
        ...

    def absorbed(
        self, plan: object, cache_BPZ: Tensor, q_THC: Tensor, q_THR: Tensor, out_THC: Tensor
    ) -> None:
        """Causal attention of every row over cached vectors: scores over all Z dimensions, values
        are the first C. Queries come in their two parts: latents contiguous, as `out` is, and the
        rotary one where its projection left it (vectors contiguous). Rows of a sequence may be
        several (a backend serves either phase)."""
        ...

    def expanded(
        self, plan: object, cache_BPZ: Tensor, q_THD: Tensor, expand: Expand, out_THV: Tensor
    ) -> None:
        """Causal attention of every row over keys and values expanded from the cache, some
        tokens at a time: of a long context all of them at once need not fit in memory."""
        ...


class LatentProjections(Protocol):
    """The expansion of one layer, in the three forms attention needs."""

    def absorb(self, q_nope_THN: Tensor, out_THC: Tensor) -> None:
        """Queries against keys -> queries against latents, into `out` (vectors contiguous)."""
        ...

    def restore(self, out_THC: Tensor, out_THV: Tensor) -> None:
        """Weighted sums of latents -> weighted sums of values, into `out_THV`."""
        ...

    def expand(self, cached_XZ: Tensor) -> tuple[Tensor, Tensor]:
        """Non-rotary keys (X, H, N) and values (X, H, V)."""
        ...


class LatentAttentionStep(Protocol):
    """What a model sees of latent attention in one step (both phases, the cache, its pages)."""

    def attend_latent(
        self,
        layer: int,
        q_THD: Tensor,
        cached_TZ: Tensor,
        transform: LatentTransform,
        positions_T: Tensor,
        projections: LatentProjections,
    ) -> Tensor:
        """Transform queries and new rows' vectors by `positions_T`, write these into the cache,
        return the attention output (T, H, V).

        `q_THD`: non-rotary part first; may be overwritten."""
        ...
