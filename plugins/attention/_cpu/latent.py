"""Latent attention on a CPU, with torch's fused attention.

Absorbed, it is paged attention with one key head of Z dimensions whose values are the keys' first
C: the backend "cpu" computes that. Expanded, a group of cached tokens at a time becomes keys and
values; where rows see several parts, their results are weighed by the sums of the parts' scores.

Shape legend: see core.interfaces.latent_attention; Q rows of one sequence, W the larger of D and V.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from core.interfaces.attention import AttentionSpec, LayerKV, SequenceBatch
from core.interfaces.latent_attention import Expand, LatentAttentionSpec
from core.ops.torch_latent import whole_keys
from core.plugin.hookspecs import NoOptions
from plugins.attention._cpu.heads import CpuBackend
from plugins.attention._triton_latent.pieces import Piece, pieces_by_group, token_slots

# Keys and values of a group take at most this much, unless one token has more.
_EXPANDED_BYTES = 32 * 1024 * 1024


def build(options: NoOptions, spec: LatentAttentionSpec) -> "CpuLatentBackend":
    """The factory named by the registration."""
    return CpuLatentBackend(spec)


class CpuLatentBackend:
    """Both forms, both phases."""

    capturable = False

    def __init__(self, spec: LatentAttentionSpec) -> None:
        self._spec = spec
        self._cached_dim = spec.latent_dim + spec.rope_dim
        self._width = max(spec.nope_dim + spec.rope_dim, spec.value_dim)
        token_bytes = 2 * spec.num_heads * self._width * spec.dtype.itemsize
        self._group_tokens = max(1, _EXPANDED_BYTES // token_bytes)
        self._one_head = CpuBackend(
            AttentionSpec(
                num_heads=spec.num_heads,
                num_kv_heads=1,
                head_dim=self._cached_dim,
                scale=spec.scale,
                page_size=spec.page_size,
                dtype=spec.dtype,
                device=spec.device,
                max_context_tokens=spec.max_context_tokens,
            )
        )

    def plan(self, batch: SequenceBatch) -> "_Plan":
        """Nothing yet: a phase needs only one of the two forms."""
        return _Plan(batch, self._one_head, self._group_tokens, self._spec.page_size)

    def absorbed(
        self, plan: object, cache_BPZ: Tensor, q_THC: Tensor, q_THR: Tensor, out_THC: Tensor
    ) -> None:
        """Torch's fused attention takes values of the keys' width only; the rest is cut off."""
        assert isinstance(plan, _Plan)
        cache_BP1Z = cache_BPZ.unsqueeze(2)
        q_THZ = torch.cat((q_THC, q_THR), dim=2)
        out_THZ = torch.empty_like(q_THZ)
        self._one_head.forward(plan.one_head, LayerKV(cache_BP1Z, cache_BP1Z), q_THZ, out_THZ)
        out_THC.copy_(out_THZ[..., : self._spec.latent_dim])

    def expanded(
        self, plan: object, cache_BPZ: Tensor, q_THD: Tensor, expand: Expand, out_THV: Tensor
    ) -> None:
        """Expand each group once, and attend the rows that see it."""
        assert isinstance(plan, _Plan)
        slots_YZ = cache_BPZ.view(-1, self._cached_dim)
        q_HTW, out_HTV = self._heads_first(q_THD), out_THV.transpose(0, 1)
        merged: _Merged | None = None  # of the sequence that is under way
        for pieces, slots_X in plan.groups:
            cached_XZ = slots_YZ.index_select(0, slots_X)
            k_XHN, v_XHV = expand(cached_XZ)
            k_XHD = whole_keys(k_XHN, cached_XZ[:, self._spec.latent_dim :])
            k_HXW, v_HXW = self._heads_first(k_XHD), self._heads_first(v_XHV)
            for piece in pieces:
                parts = list(_parts(piece))
                if not piece.is_whole or len(parts) > 1:
                    merged = merged or _Merged(out_HTV, piece)
                for rows, tokens, causal in parts:
                    result_HQV, log_sums_HQ = self._attend(
                        q_HTW[:, rows], k_HXW[:, tokens], v_HXW[:, tokens], causal
                    )
                    if merged is None:
                        out_HTV[:, rows] = result_HQV
                    else:
                        merged.add(rows, result_HQV, log_sums_HQ)
                if merged is not None and piece.is_last:
                    merged.store(out_HTV)
                    merged = None

    def _heads_first(self, x_XHD: Tensor) -> Tensor:
        """(H, X, W): zeros past D add nothing to a score, and those past V are cut off again."""
        padding = self._width - x_XHD.shape[2]
        return (F.pad(x_XHD, (0, padding)) if padding else x_XHD).transpose(0, 1)

    def _attend(
        self, q_HQW: Tensor, k_HXW: Tensor, v_HXW: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Results (H, Q, V), and the logarithms of the sums of scores (H, Q), at least float32."""
        out_1HQW, log_sums_1HQ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_HQW.unsqueeze(0),
            k_HXW.unsqueeze(0),
            v_HXW.unsqueeze(0),
            is_causal=causal,
            scale=self._spec.scale,
        )
        return out_1HQW[0, ..., : self._spec.value_dim], log_sums_1HQ[0]


class _Plan:
    """Either form, made when the first layer asks for it."""

    def __init__(
        self, batch: SequenceBatch, one_head: CpuBackend, group_tokens: int, page_size: int
    ) -> None:
        self._batch, self._backend = batch, one_head
        self._group_tokens, self._page_size = group_tokens, page_size

    @cached_property
    def one_head(self) -> object:
        """The plan of absorbed attention."""
        return self._backend.plan(self._batch)

    @cached_property
    def groups(self) -> list[tuple[list[Piece], Tensor]]:
        """What is expanded together: pieces, and the slots of their tokens."""
        batch = self._batch
        groups = pieces_by_group(batch.query_lens, batch.context_lens, self._group_tokens)
        return [(pieces, token_slots(batch, pieces, self._page_size)) for pieces in groups]


class _Merged:
    """The rows of one sequence over several parts of its context."""

    def __init__(self, out_HTV: Tensor, piece: Piece) -> None:
        self._rows = slice(piece.first_row, piece.first_row + piece.num_rows)
        out_HQV = out_HTV[:, self._rows]
        wide = torch.promote_types(out_HQV.dtype, torch.float32)
        self._out_HQV = torch.zeros_like(out_HQV, dtype=wide)
        self._log_sums_HQ1 = out_HQV.new_full((*out_HQV.shape[:2], 1), -torch.inf, dtype=wide)

    def add(self, rows: slice, result_HQV: Tensor, log_sums_HQ: Tensor) -> None:
        """Weigh what there is of some rows (of the step), and another part of their context."""
        own = slice(rows.start - self._rows.start, rows.stop - self._rows.start)
        out_HQV, log_sums_HQ1 = self._out_HQV[:, own], self._log_sums_HQ1[:, own]
        part_HQ1 = log_sums_HQ.unsqueeze(2)
        total_HQ1 = torch.logaddexp(log_sums_HQ1, part_HQ1)
        out_HQV.mul_(log_sums_HQ1.sub_(total_HQ1).exp_())
        out_HQV.addcmul_(result_HQV, part_HQ1.sub(total_HQ1).exp_())
        log_sums_HQ1.copy_(total_HQ1)

    def store(self, out_HTV: Tensor) -> None:
        """Every part is in."""
        out_HTV[:, self._rows] = self._out_HQV


def _parts(piece: Piece) -> Iterator[tuple[slice, slice, bool]]:
    """Rows of the step, tokens of the group, and whether row i sees just the first i + 1 of them
    (else all). Every row sees all the tokens before the first row's own."""
    first, last = piece.first_row, piece.first_row + piece.num_rows
    begin, end = piece.offset, piece.offset + piece.num_tokens
    inside = min(max(piece.end - piece.first_position, 0), piece.num_rows)  # own token is here
    if inside == 1 == piece.num_rows or not inside:
        yield slice(first, last), slice(begin, end), False
        return
    own = end - inside
    if own > begin:
        yield slice(first, last), slice(begin, own), False
    yield slice(first, first + inside), slice(own, end), True
    if inside < piece.num_rows:
        yield slice(first + inside, last), slice(own, end), False
