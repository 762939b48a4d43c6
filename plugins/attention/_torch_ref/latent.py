"""Latent attention one sequence at a time, in float32 or wider: the oracle of the other backends.

Absorbed attention is that of one key head whose values are the first dimensions of its keys.
Knows nothing of speed. Shape legend: see core.interfaces.latent_attention.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from core.interfaces.attention import SequenceBatch
from core.interfaces.latent_attention import Expand, LatentAttentionSpec
from core.ops.torch_latent import whole_keys
from core.plugin.hookspecs import NoOptions
from plugins.attention._torch_ref.heads import attend, each_sequence


def build(options: NoOptions, spec: LatentAttentionSpec) -> "TorchRefLatentBackend":
    """The factory named by the registration."""
    return TorchRefLatentBackend(spec)


class TorchRefLatentBackend:
    """Softmax(q k^T * scale) v with every key, value and score in memory."""

    capturable = False

    def __init__(self, spec: LatentAttentionSpec) -> None:
        self._spec = spec

    def plan(self, batch: SequenceBatch) -> SequenceBatch:
        """The batch itself is all that is needed."""
        return batch

    def absorbed(
        self, plan: object, cache_BPZ: Tensor, q_THC: Tensor, q_THR: Tensor, out_THC: Tensor
    ) -> None:
        """Attend each sequence to its cached vectors."""

        def one_head(cached_XZ: Tensor) -> tuple[Tensor, Tensor]:
            return cached_XZ.unsqueeze(1), cached_XZ[:, None, : self._spec.latent_dim]

        self._forward(plan, cache_BPZ, torch.cat((q_THC, q_THR), dim=2), one_head, out_THC)

    def expanded(
        self, plan: object, cache_BPZ: Tensor, q_THD: Tensor, expand: Expand, out_THV: Tensor
    ) -> None:
        """Attend each sequence to the keys and values of all its tokens."""

        def every_head(cached_XZ: Tensor) -> tuple[Tensor, Tensor]:
            k_XHN, v_XHV = expand(cached_XZ)
            return whole_keys(k_XHN, cached_XZ[:, self._spec.latent_dim :]), v_XHV

        self._forward(plan, cache_BPZ, q_THD, every_head, out_THV)

    def _forward(
        self,
        plan: object,
        cache_BPZ: Tensor,
        q_TH: Tensor,
        keys_and_values: Callable[[Tensor], tuple[Tensor, Tensor]],
        out_TH: Tensor,
    ) -> None:
        assert isinstance(plan, SequenceBatch)
        for rows, pages, num_cached in each_sequence(plan, self._spec.page_size):
            keys, values = keys_and_values(cache_BPZ[pages].flatten(0, 1)[:num_cached])
            out_TH[rows] = attend(q_TH[rows], keys, values, self._spec.scale).to(out_TH.dtype)
