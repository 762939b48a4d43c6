"""Attention of one step: writes the cache, then lets each phase's backend attend its own rows.

What models see as AttentionStep. Knows nothing of how backends compute; latent attention is in
core.engine.step.latent_attention. Rows past those of the sequences are padding: their output is
zero and they are not cached. Shape legend: see core.interfaces.attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, UntypedStorage

from core.engine.step.batch import Batch
from core.engine.step.progress import Progress
from core.interfaces.attention import (
    AttentionBackend,
    HeadTransform,
    LayerKV,
    NewKV,
    SequenceBatch,
)
from core.interfaces.latent_attention import LatentProjections, LatentTransform
from core.interfaces.model import ModelStep
from core.interfaces.ops import Ops
from core.parallel.rows import StepRows


@dataclass(frozen=True, slots=True)
class PlannedRows:
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
        self.progress = Progress()

    @property
    def pool(self) -> UntypedStorage:
        """The memory of all layers' caches."""
        return self._caches[0].k_NPGD.untyped_storage()

    @property
    def capturable(self) -> bool:
        """Whether steps without prompts may be recorded in a CUDA graph."""
        return self._decode.capturable

    @property
    def prompts_capturable(self) -> bool:
        """Whether steps with prompts may be."""
        return self._prefill.capturable

    def step(self, batch: Batch, rows: StepRows, phase: str) -> ModelStep:
        """What the model gets for one step."""
        attend = _PagedStep(
            self._ops, self._caches, batch, self._prefill, self._decode, self.progress
        )
        return ModelStep(attend, _NoLatent(), rows, phase, batch.num_real)


class _PagedStep:
    def __init__(
        self,
        ops: Ops,
        caches: Sequence[LayerKV],
        batch: Batch,
        prefill: AttentionBackend,
        decode: AttentionBackend,
        progress: Progress,
    ) -> None:
        self._ops, self._caches, self._slots_T = ops, caches, batch.kv_slots_T
        self._progress = progress
        self._phases = [
            (backend, PlannedRows(rows, backend.plan(sequences)))
            for backend, sequences, rows in _phases(batch, prefill, decode)
        ]

    def attend(
        self, layer: int, qkv_TFD: Tensor, heads: HeadTransform, positions_T: Tensor
    ) -> Tensor:
        cache, slots_T = self._caches[layer], self._slots_T
        q_THD, k_TGD, v_TGD = self._ops.prepare_heads(qkv_TFD, heads, positions_T, cache, slots_T)
        out_THD = output_of(q_THD, slots_T.shape[0], q_THD.shape[-1])
        if self._is_whole(q_THD.shape[0]):  # no views: on a CPU they are a tenth of the layer
            backend, phase = self._phases[0]
            backend.forward(phase.plan, cache, q_THD, out_THD, NewKV(k_TGD, v_TGD))
            self._progress.pieces += 1
            return out_THD
        for backend, phase in self._phases:
            rows = phase.rows
            new = NewKV(k_TGD[rows], v_TGD[rows])
            backend.forward(phase.plan, cache, q_THD[rows], out_THD[rows], new)
        self._progress.pieces += 1
        return out_THD

    def _is_whole(self, num_rows: int) -> bool:
        """Whether one phase has all rows, none of which is padding."""
        return len(self._phases) == 1 and self._slots_T.shape[0] == num_rows


class _NoLatent:
    """Latent attention of a model that has none."""

    def attend_latent(
        self,
        layer: int,
        q_THD: Tensor,
        cached_TZ: Tensor,
        transform: LatentTransform,
        positions_T: Tensor,
        projections: LatentProjections,
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


def output_of(q_THD: Tensor, num_real: int, dim: int) -> Tensor:
    """Where the backends write: padding rows are zero, the others undefined."""
    out = q_THD.new_empty((*q_THD.shape[:2], dim))
    if num_real < q_THD.shape[0]:
        out[num_real:] = 0
    return out
