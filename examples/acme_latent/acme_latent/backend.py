"""Latent attention in plain torch: one sequence after another, some of its tokens at a time.

Both forms are the same attention over other keys and values. That of a part of the tokens is merged
into that of the parts before by the largest score and the sum of exponentials (the running softmax
of Milakov and Gimelshein, arXiv 1805.02867).

Shape legend as in core.interfaces.latent_attention: H query heads, N non-rotary and R rotary
dimensions, V value dimensions, C latent dimensions, Z = C + R, B pages; Q new rows of one sequence,
X cached tokens of a part, W dimensions of a value in either form.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from acme_latent import AcmeOptions
from core.interfaces.attention import SequenceBatch
from core.interfaces.latent_attention import Expand, LatentAttentionSpec

# Cached vectors (X, Z) -> keys (X, heads, dimensions) and values (X, heads, W); one head stands for
# all where they share it.
KeysAndValues = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """Where one sequence's rows and tokens are."""

    rows: slice  # in queries and results
    num_new: int
    slots: Tensor  # of its cached tokens in the flattened pool, int64


class AcmeLatent:
    """Fills core.interfaces.latent_attention.LatentAttentionBackend."""

    capturable = False  # looks at lengths on the host

    def __init__(self, options: AcmeOptions, spec: LatentAttentionSpec) -> None:
        self.part_tokens = options.part_tokens
        self.spec = spec

    def plan(self, batch: SequenceBatch) -> list[SequencePlan]:
        """Cut the batch into sequences, once for all layers."""
        sequences, start, size = [], 0, self.spec.page_size
        for s, (num_new, num_context) in enumerate(
            zip(batch.query_lens, batch.context_lens, strict=True)
        ):
            tokens = torch.arange(num_context, device=self.spec.device)
            slots = batch.page_table_SM[s].long()[tokens // size] * size + tokens % size
            sequences.append(SequencePlan(slice(start, start + num_new), num_new, slots))
            start += num_new
        return sequences

    def absorbed(
        self, plan: object, cache_BPZ: Tensor, q_THC: Tensor, q_THR: Tensor, out_THC: Tensor
    ) -> None:
        """Keys are the cached vectors, values their first C dimensions, for all heads the same."""

        def shared(cached_XZ: Tensor) -> tuple[Tensor, Tensor]:
            return cached_XZ[:, None], cached_XZ[:, None, : self.spec.latent_dim]

        self._attend(plan, cache_BPZ, torch.cat((q_THC, q_THR), dim=2), shared, out_THC)

    def expanded(
        self, plan: object, cache_BPZ: Tensor, q_THD: Tensor, expand: Expand, out_THV: Tensor
    ) -> None:
        """Keys and values of each head, made of the cached vectors; the rotary part is shared."""

        def each_head(cached_XZ: Tensor) -> tuple[Tensor, Tensor]:
            k_XHN, v_XHV = expand(cached_XZ)
            k_XHR = cached_XZ[:, None, self.spec.latent_dim :].expand(-1, self.spec.num_heads, -1)
            return torch.cat((k_XHN, k_XHR), dim=2), v_XHV

        self._attend(plan, cache_BPZ, q_THD, each_head, out_THV)

    def _attend(
        self, plan: object, cache_BPZ: Tensor, q_TH: Tensor, of: KeysAndValues, out_THW: Tensor
    ) -> None:
        assert isinstance(plan, list)
        cache_XZ = cache_BPZ.flatten(0, 1)
        for sequence in plan:
            out_THW[sequence.rows] = self._attend_one(sequence, cache_XZ, q_TH[sequence.rows], of)

    def _attend_one(
        self, sequence: SequencePlan, cache_XZ: Tensor, q_QH: Tensor, of: KeysAndValues
    ) -> Tensor:
        num_context = len(sequence.slots)
        # Row i stands at this position, and sees everything up to it.
        positions_Q1 = torch.arange(num_context - sequence.num_new, num_context).unsqueeze(1)
        positions_Q1 = positions_Q1.to(q_QH.device)
        largest_HQ1 = q_QH.new_full((q_QH.shape[1], len(q_QH), 1), -torch.inf, dtype=torch.float32)
        total_HQ1, sum_HQW = torch.zeros_like(largest_HQ1), torch.zeros_like(largest_HQ1)
        for begin in range(0, num_context, self.part_tokens):
            slots = sequence.slots[begin : begin + self.part_tokens]
            keys, values = of(cache_XZ[slots])  # gathered: what else is in a page is never read
            scores_HQX = q_QH.float().transpose(0, 1) @ keys.float().permute(1, 2, 0)
            positions_X = begin + torch.arange(len(slots), device=q_QH.device)
            hidden_QX = positions_X > positions_Q1
            scores_HQX = (scores_HQX * self.spec.scale).masked_fill(hidden_QX, -torch.inf)
            # The first token is seen by every row, so that no largest score is -inf here.
            now_HQ1 = torch.maximum(largest_HQ1, scores_HQX.amax(2, keepdim=True))
            weights_HQX = torch.exp(scores_HQX - now_HQ1)
            kept_HQ1 = torch.exp(largest_HQ1 - now_HQ1)
            total_HQ1 = total_HQ1 * kept_HQ1 + weights_HQX.sum(2, keepdim=True)
            sum_HQW = sum_HQW * kept_HQ1 + weights_HQX @ values.float().transpose(0, 1)
            largest_HQ1 = now_HQ1
        return (sum_HQW / total_HQ1).transpose(0, 1).to(q_QH.dtype)
