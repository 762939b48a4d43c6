"""Paged attention one sequence at a time, in float32: the oracle of the other backends.

Knows nothing of speed. Shape legend: see core.interfaces.attention; Q rows of one sequence,
C its cached tokens, R query heads of one KV head, V dimensions of a value.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from core.interfaces.attention import AttentionSpec, LayerKV, NewKV, SequenceBatch
from core.plugin.hookspecs import NoOptions


def build(options: NoOptions, spec: AttentionSpec) -> "TorchRefBackend":
    """The factory named by the registration."""
    return TorchRefBackend(spec)


class TorchRefBackend:
    """Softmax(q k^T * scale) v with every score in memory."""

    capturable = False

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec

    def plan(self, batch: SequenceBatch) -> SequenceBatch:
        """The batch itself is all that is needed."""
        return batch

    def forward(
        self, plan: object, kv: LayerKV, q_THD: Tensor, out_THD: Tensor, new: NewKV | None = None
    ) -> None:
        """Attend each sequence to the pages its row of the table names."""
        assert isinstance(plan, SequenceBatch)
        for rows, pages, num_cached in each_sequence(plan, self._spec.page_size):
            k_CGD = kv.k_NPGD[pages].flatten(0, 1)[:num_cached]
            v_CGD = kv.v_NPGD[pages].flatten(0, 1)[:num_cached]
            out_QHD = attend(q_THD[rows], k_CGD, v_CGD, self._spec.scale)
            out_THD[rows] = out_QHD.to(out_THD.dtype)


def each_sequence(batch: SequenceBatch, page_size: int) -> Iterator[tuple[slice, Tensor, int]]:
    """Rows, pages (int64) and number of cached tokens of each sequence of a step."""
    start = 0
    for index, (num_rows, num_cached) in enumerate(
        zip(batch.query_lens, batch.context_lens, strict=True)
    ):
        pages = batch.page_table_SM[index, : -(-num_cached // page_size)].long()
        yield slice(start, start + num_rows), pages, num_cached
        start += num_rows


def attend(q_QHD: Tensor, k_CGD: Tensor, v_CGV: Tensor, scale: float) -> Tensor:
    """Attention (Q, H, V) of the last Q of C tokens, in float32 or wider."""
    num_rows, num_cached, num_groups = q_QHD.shape[0], *k_CGD.shape[:2]
    wide = torch.promote_types(q_QHD.dtype, torch.float32)
    q_QGRD = q_QHD.to(wide).reshape(num_rows, num_groups, -1, q_QHD.shape[2])
    scores_GRQC = torch.einsum("qgrd,cgd->grqc", q_QGRD, k_CGD.to(wide)) * scale
    positions_Q = torch.arange(num_cached - num_rows, num_cached, device=q_QHD.device)
    unseen_QC = torch.arange(num_cached, device=q_QHD.device) > positions_Q[:, None]
    weights_GRQC = scores_GRQC.masked_fill(unseen_QC, -torch.inf).softmax(dim=-1)
    return torch.einsum("grqc,cgv->qgrv", weights_GRQC, v_CGV.to(wide)).flatten(1, 2)
