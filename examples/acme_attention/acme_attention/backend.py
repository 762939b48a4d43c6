"""Paged attention with torch's scaled_dot_product_attention, one sequence after another.

Shape legend as in core.interfaces.attention: H query heads, G KV heads, D head dimension, P tokens
in a page; C cached tokens of one sequence, Q its new rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from acme_attention import AcmeOptions
from core.interfaces.attention import AttentionSpec, LayerKV, NewKV, SequenceBatch


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """Where one sequence's rows and pages are."""

    rows: slice  # in q and out
    num_context: int
    pages: Tensor


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What `plan` hands to `forward`."""

    sequences: list[SequencePlan]


class AcmeAttention:
    """Fills core.interfaces.attention.AttentionBackend."""

    capturable = False  # looks at lengths on the host

    def __init__(self, options: AcmeOptions, spec: AttentionSpec) -> None:
        self.query_block = options.query_block
        self.spec = spec

    def plan(self, batch: SequenceBatch) -> BatchPlan:
        """Cut the batch into sequences, once for all layers."""
        plans, start = [], 0
        for s, (num_new, num_context) in enumerate(
            zip(batch.query_lens, batch.context_lens, strict=True)
        ):
            num_pages = -(-num_context // self.spec.page_size)
            pages = batch.page_table_SM[s, :num_pages].long()
            plans.append(SequencePlan(slice(start, start + num_new), num_context, pages))
            start += num_new
        return BatchPlan(plans)

    def forward(
        self,
        plan: object,
        kv: LayerKV,
        q_THD: Tensor,
        out_THD: Tensor,
        new: NewKV | None = None,
    ) -> None:
        """Causal attention of every row, written into `out_THD`. The new rows' k and v, `new`, are
        in the cache as well."""
        assert isinstance(plan, BatchPlan)
        for sequence in plan.sequences:
            k_GCD, v_GCD = (
                cache_NPGD[sequence.pages].flatten(0, 1)[: sequence.num_context].transpose(0, 1)
                for cache_NPGD in (kv.k_NPGD, kv.v_NPGD)
            )
            self._attend(sequence, q_THD[sequence.rows], k_GCD, v_GCD, out_THD[sequence.rows])

    def _attend(
        self, sequence: SequencePlan, q_QHD: Tensor, k_GCD: Tensor, v_GCD: Tensor, out_QHD: Tensor
    ) -> None:
        num_new = q_QHD.shape[0]
        for begin in range(0, num_new, self.query_block):
            rows = slice(begin, min(begin + self.query_block, num_new))
            # Row i of the sequence stands at this position and sees everything up to it.
            first = sequence.num_context - num_new + rows.start
            positions_Q = torch.arange(first, first + rows.stop - rows.start, device=q_QHD.device)
            columns_C = torch.arange(sequence.num_context, device=q_QHD.device)
            attended_HQD = scaled_dot_product_attention(
                q_QHD[rows].transpose(0, 1)[None],
                k_GCD[None],
                v_GCD[None],
                attn_mask=columns_C[None, :] <= positions_Q[:, None],
                scale=self.spec.scale,
                enable_gqa=True,
            )[0]
            out_QHD[rows] = attended_HQD.transpose(0, 1)
