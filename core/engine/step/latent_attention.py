"""Latent attention of one step: writes the cache, then lets each phase's backend attend its rows.

What models see as LatentAttentionStep. Knows nothing of how backends compute. Rows past those of
the sequences are padding: their output is zero and they are not cached.
Shape legend: see core.interfaces.latent_attention.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, UntypedStorage

from core.engine.step.attention import PlannedRows, output_of
from core.engine.step.batch import Batch
from core.engine.step.progress import Progress
from core.interfaces.attention import HeadTransform
from core.interfaces.latent_attention import (
    LatentAttentionBackend,
    LatentProjections,
    LatentTransform,
)
from core.interfaces.model import ModelStep
from core.interfaces.ops import Ops
from core.parallel.rows import StepRows


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
        self.progress = Progress()

    @property
    def pool(self) -> UntypedStorage:
        """The memory of all layers' caches."""
        return self._caches[0].untyped_storage()

    @property
    def capturable(self) -> bool:
        """Whether steps without prompts may be recorded in a CUDA graph."""
        return self._decode.capturable

    @property
    def prompts_capturable(self) -> bool:
        """Expanding keys and values takes contexts that the host knows."""
        return False

    def step(self, batch: Batch, rows: StepRows, phase: str) -> ModelStep:
        """What the model gets for one step."""
        attend = _LatentStep(
            self._ops,
            self._caches,
            self._dims,
            batch,
            self._prefill,
            self._decode,
            self.progress,
        )
        return ModelStep(_NoHeads(), attend, rows, phase, batch.num_real)


class _LatentStep:
    def __init__(
        self,
        ops: Ops,
        caches: Sequence[Tensor],
        dims: tuple[int, int],
        batch: Batch,
        prefill: LatentAttentionBackend,
        decode: LatentAttentionBackend,
        progress: Progress,
    ) -> None:
        self._ops, self._caches, self._slots_T = ops, caches, batch.kv_slots_T
        self._progress = progress
        self._value_dim, self._latent_dim = dims
        self._decode_phase: tuple[LatentAttentionBackend, PlannedRows] | None = None
        self._prefill_phase: tuple[LatentAttentionBackend, PlannedRows] | None = None
        if batch.decode is not None:
            rows = slice(0, batch.num_decodes)
            self._decode_phase = decode, PlannedRows(rows, decode.plan(batch.decode))
        if batch.prefill is not None:
            rows = slice(batch.num_decodes, batch.kv_slots_T.shape[0])
            self._prefill_phase = prefill, PlannedRows(rows, prefill.plan(batch.prefill))

    def attend_latent(
        self,
        layer: int,
        q_THD: Tensor,
        cached_TZ: Tensor,
        transform: LatentTransform,
        positions_T: Tensor,
        projections: LatentProjections,
    ) -> Tensor:
        cache_BPZ, slots_T = self._caches[layer], self._slots_T
        num_real = slots_T.shape[0]
        nope_dim = q_THD.shape[-1] - (cached_TZ.shape[-1] - self._latent_dim)
        turning_THR = q_THD[..., nope_dim:]
        turned_THR = self._ops.prepare_latent(
            turning_THR, cached_TZ, transform, positions_T, cache_BPZ, slots_T
        )
        if not turned_THR.is_set_to(turning_THR):  # some operations work in place
            turning_THR.copy_(turned_THR)
        out_THV = output_of(q_THD, num_real, self._value_dim)
        if self._decode_phase is not None:
            backend, phase = self._decode_phase
            q = q_THD[phase.rows]
            q_THC = q.new_empty((*q.shape[:2], self._latent_dim))
            projections.absorb(q[..., :nope_dim], q_THC)
            out_THC = torch.empty_like(q_THC)
            backend.absorbed(phase.plan, cache_BPZ, q_THC, q[..., nope_dim:], out_THC)
            projections.restore(out_THC, out_THV[phase.rows])
        if self._prefill_phase is not None:
            backend, phase = self._prefill_phase
            backend.expanded(
                phase.plan, cache_BPZ, q_THD[phase.rows], projections.expand, out_THV[phase.rows]
            )
        self._progress.pieces += 1
        return out_THV


class _NoHeads:
    """Attention over cached heads, of a model that has none."""

    def attend(
        self, layer: int, qkv_TFD: Tensor, heads: HeadTransform, positions_T: Tensor
    ) -> Tensor:
        raise AssertionError("the engine was built for latent attention")
