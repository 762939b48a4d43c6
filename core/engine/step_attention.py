"""Attention of one step: writes the cache, then lets each phase's backend attend its own rows.

What models see as AttentionStep and LatentAttentionStep. Knows nothing of how backends compute.
Rows past those of the sequences are padding: their output is zero and they are not cached.
Shape legend: see core.interfaces.attention and core.interfaces.latent_attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.engine.batch import Batch
from core.interfaces.attention import AttentionBackend, LayerKV, SequenceBatch
from core.interfaces.latent_attention import LatentAttentionBackend, LatentProjections
from core.interfaces.model import ModelStep
from core.interfaces.ops import Ops
from core.parallel.rows import StepRows


@dataclass(frozen=True, slots=True)
class _Phase:
    """The rows of one phase and what its backend planned for them."""

    rows: slice
    plan: object


class PagedAttention:
    """Caches and backends of a rank whose model has keys and values for each head."""

    def __init__(
        self,
        ops: Ops,
        caches: Sequence[LayerKV],
        prefill: AttentionBackend,
        decode: AttentionBackend,
    ) -> None:
        self._ops, self._caches = ops, caches
        self._prefill, self._decode = prefill, decode

    def step(self, batch: Batch, rows: StepRows, phase: str) -> ModelStep:
        """What the model gets for one step."""
        attend = _PagedStep(self._ops, self._caches, batch, self._prefill, self._decode)
        return ModelStep(attend, _Missing(), rows, phase)


class LatentPagedAttention:
    """Caches and backends of a rank whose model keeps one latent for each token."""

    def __init__(
        self,
        ops: Ops,
        caches: Sequence[Tensor],
        value_dim: int,
        latent_dim: int,
        prefill: LatentAttentionBackend,
        decode: LatentAttentionBackend,
    ) -> None:
        self._ops, self._caches = ops, caches
        self._dims = value_dim, latent_dim
        self._prefill, self._decode = prefill, decode

    def step(self, batch: Batch, rows: StepRows, phase: str) -> ModelStep:
        """What the model gets for one step."""
        attend = _LatentStep(
            self._ops, self._caches, self._dims, batch, self._prefill, self._decode
        )
        return ModelStep(_Missing(), attend, rows, phase)


class _PagedStep:
    def __init__(
        self,
        ops: Ops,
        caches: Sequence[LayerKV],
        batch: Batch,
        prefill: AttentionBackend,
        decode: AttentionBackend,
    ) -> None:
        self._ops, self._caches, self._slots_T = ops, caches, batch.kv_slots_T
        self._phases = [
            (backend, _Phase(rows, backend.plan(sequences)))
            for backend, sequences, rows in _phases(batch, prefill, decode)
        ]

    def attend(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        cache, slots_T = self._caches[layer], self._slots_T
        num_real = slots_T.shape[0]
        self._ops.write_kv(k_TGD[:num_real], v_TGD[:num_real], cache.k_NPGD, cache.v_NPGD, slots_T)
        out_THD = _output(q_THD, num_real, q_THD.shape[-1])
        for backend, phase in self._phases:
            backend.forward(phase.plan, cache, q_THD[phase.rows], out_THD[phase.rows])
        return out_THD


class _LatentStep:
    def __init__(
        self,
        ops: Ops,
        caches: Sequence[Tensor],
        dims: tuple[int, int],
        batch: Batch,
        prefill: LatentAttentionBackend,
        decode: LatentAttentionBackend,
    ) -> None:
        self._ops, self._caches, self._slots_T = ops, caches, batch.kv_slots_T
        self._value_dim, self._latent_dim = dims
        self._decode_phase: tuple[LatentAttentionBackend, _Phase] | None = None
        self._prefill_phase: tuple[LatentAttentionBackend, _Phase] | None = None
        if batch.decode is not None:
            rows = slice(0, batch.num_decodes)
            self._decode_phase = decode, _Phase(rows, decode.plan(batch.decode))
        if batch.prefill is not None:
            rows = slice(batch.num_decodes, batch.kv_slots_T.shape[0])
            self._prefill_phase = prefill, _Phase(rows, prefill.plan(batch.prefill))

    def attend_latent(
        self, layer: int, q_THD: Tensor, cached_TZ: Tensor, projections: LatentProjections
    ) -> Tensor:
        cache_BPZ, slots_T = self._caches[layer], self._slots_T
        num_real = slots_T.shape[0]
        self._ops.write_latent(cached_TZ[:num_real], cache_BPZ, slots_T)
        out_THV = _output(q_THD, num_real, self._value_dim)
        if self._decode_phase is not None:
            backend, phase = self._decode_phase
            q = q_THD[phase.rows]
            nope_dim = q.shape[-1] - (cached_TZ.shape[-1] - self._latent_dim)
            q_THZ = torch.cat((projections.absorb(q[..., :nope_dim]), q[..., nope_dim:]), -1)
            out_THC = q.new_empty((*q.shape[:2], self._latent_dim))
            backend.absorbed(phase.plan, cache_BPZ, q_THZ, out_THC)
            out_THV[phase.rows] = projections.restore(out_THC)
        if self._prefill_phase is not None:
            backend, phase = self._prefill_phase
            backend.expanded(
                phase.plan, cache_BPZ, q_THD[phase.rows], projections.expand, out_THV[phase.rows]
            )
        return out_THV


class _Missing:
    """In place of the kind of attention that the model does not have."""

    def attend(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        raise AssertionError("the engine was built for latent attention")

    def attend_latent(
        self, layer: int, q_THD: Tensor, cached_TZ: Tensor, projections: LatentProjections
    ) -> Tensor:
        raise AssertionError("the engine was not built for latent attention")


def _phases(
    batch: Batch, prefill: AttentionBackend, decode: AttentionBackend
) -> list[tuple[AttentionBackend, SequenceBatch, slice]]:
    phases: list[tuple[AttentionBackend, SequenceBatch, slice]] = []
    if batch.decode is not None:
        phases.append((decode, batch.decode, slice(0, batch.num_decodes)))
    if batch.prefill is not None:
        phases.append((prefill, batch.prefill, slice(batch.num_decodes, len(batch.kv_slots_T))))
    return phases


def _output(q_THD: Tensor, num_real: int, dim: int) -> Tensor:
    """Where the backends write: padding rows are zero, the others undefined."""
    out = q_THD.new_empty((*q_THD.shape[:2], dim))
    if num_real < q_THD.shape[0]:
        out[num_real:] = 0
    return out
