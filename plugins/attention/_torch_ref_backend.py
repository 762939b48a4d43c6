"""Paged attention one sequence at a time, in float32: the oracle of the other backends.

Knows nothing of speed. Shape legend: see core.interfaces.attention; Q rows of one sequence,
C its cached tokens, R query heads of one KV head.
"""

import torch
from torch import Tensor

from core.hookspecs import NoOptions
from core.interfaces.attention import AttentionSpec, LayerKV, SequenceBatch


def build(options: NoOptions, spec: AttentionSpec) -> "TorchRefBackend":
    """The factory named by the registration."""
    return TorchRefBackend(spec)


class TorchRefBackend:
    """Softmax(q k^T * scale) v with every score in memory."""

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec

    def plan(self, batch: SequenceBatch) -> SequenceBatch:
        """The batch itself is all that is needed."""
        return batch

    def forward(self, plan: object, kv: LayerKV, q_THD: Tensor, out_THD: Tensor) -> None:
        """Attend each sequence to the pages its row of the table names."""
        assert isinstance(plan, SequenceBatch)
        page_size = self._spec.page_size
        start = 0
        for index, (num_rows, num_cached) in enumerate(
            zip(plan.query_lens, plan.context_lens, strict=True)
        ):
            pages = plan.page_table_SM[index, : -(-num_cached // page_size)].long()
            k_CGD = kv.k_NPGD[pages].flatten(0, 1)[:num_cached]
            v_CGD = kv.v_NPGD[pages].flatten(0, 1)[:num_cached]
            rows = slice(start, start + num_rows)
            out_THD[rows] = self._attend(q_THD[rows], k_CGD, v_CGD).to(out_THD.dtype)
            start += num_rows

    def _attend(self, q_QHD: Tensor, k_CGD: Tensor, v_CGD: Tensor) -> Tensor:
        num_rows, num_cached = q_QHD.shape[0], k_CGD.shape[0]
        wide = torch.promote_types(q_QHD.dtype, torch.float32)
        num_groups, head_dim = self._spec.num_kv_heads, self._spec.head_dim
        q_QGRD = q_QHD.to(wide).reshape(num_rows, num_groups, -1, head_dim)
        scores_GRQC = torch.einsum("qgrd,cgd->grqc", q_QGRD, k_CGD.to(wide)) * self._spec.scale
        positions_Q = torch.arange(num_cached - num_rows, num_cached, device=q_QHD.device)
        unseen_QC = torch.arange(num_cached, device=q_QHD.device) > positions_Q[:, None]
        weights_GRQC = scores_GRQC.masked_fill(unseen_QC, -torch.inf).softmax(dim=-1)
        return torch.einsum("grqc,cgd->qgrd", weights_GRQC, v_CGD.to(wide)).flatten(1, 2)
