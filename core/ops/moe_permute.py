"""Rows to the experts of one rank and back: grouping, padding, and the weighted sum of results.

Pure index arithmetic on the rows' device. On a GPU nothing here waits for the device; the host
then does not know how many pairs there are, and sizes are upper bounds. Knows nothing of ranks.
Shape legend: T rows, K experts of a row, L experts of this rank, E hidden size, M pairs of a row
and one of its experts here, C most pairs of one expert.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from core.interfaces.moe_a2a import Dispatched, Grouping, Routes

_COPY_BYTES = 64 * 2**20  # of results in float32 at a time: a long prefill has gigabytes of them


def group_rows(experts_TK: Tensor, num_experts: int, num_pairs: int | None = None) -> Grouping:
    """See core.interfaces.moe_a2a.RowOps."""
    num_keys = experts_TK.numel()
    keys = experts_TK.flatten()
    none = keys < 0
    keys = torch.where(none, num_experts, keys)
    counts_L = count_values(keys, num_experts + 1)[:num_experts]
    order = keys.argsort(stable=True)
    positions = torch.empty_like(order)
    positions[order] = torch.arange(len(order), device=order.device)
    if num_pairs is None:
        num_pairs = int(counts_L.sum()) if keys.device.type == "cpu" else num_keys
    return Grouping(
        source=order[:num_pairs].div(experts_TK.shape[1], rounding_mode="floor"),
        counts_L=counts_L,
        positions_TK=positions.masked_fill_(none, -1).view_as(experts_TK),
    )


def pad_groups(grouping: Grouping, experts_TK: Tensor, capacity: int) -> Grouping:
    """The same pairs with `capacity` places for each expert (BATCHED); no expert may have more."""
    source_M, counts_L, positions_TK = grouping.source, grouping.counts_L, grouping.positions_TK
    starts_L = counts_L.cumsum(0) - counts_L
    if source_M.shape[0] == 0:  # nothing to read
        capacity = 0
    places_C = torch.arange(capacity, device=source_M.device)
    index_LC = starts_L[:, None] + places_C
    owner_TK = experts_TK.clamp(min=0)
    padded_TK = owner_TK * capacity + positions_TK - starts_L[owner_TK]
    return Grouping(
        source=source_M[index_LC.clamp(max=max(source_M.shape[0] - 1, 0))],
        counts_L=counts_L,
        positions_TK=torch.where(positions_TK < 0, positions_TK, padded_TK),
    )


def sum_results(
    results_ME: Tensor,
    positions_TK: Tensor,
    weights_TK: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See core.interfaces.moe_a2a.RowOps."""
    shape = (positions_TK.shape[0], results_ME.shape[1])
    if results_ME.shape[0] == 0 or positions_TK.numel() == 0:
        return results_ME.new_zeros(shape, dtype=dtype)
    is_pair = positions_TK >= 0
    pairs_per_row = is_pair.sum(1)
    places, firsts = positions_TK[is_pair], pairs_per_row.cumsum(0) - pairs_per_row
    weights = None if weights_TK is None else weights_TK[is_pair]
    out_TE = results_ME.new_empty(shape, dtype=dtype)
    for columns in _column_blocks(results_ME):
        out_TE[:, columns] = F.embedding_bag(
            places,
            results_ME[:, columns].float().contiguous(),
            firsts,
            mode="sum",
            per_sample_weights=weights,
        )
    return out_TE


def sum_grouped(
    kernel: Callable[[Dispatched], Tensor],
    dispatched: Dispatched,
    routes: Routes,
    num_experts: int,
    dtype: torch.dtype,
) -> Tensor:
    """What rows with routes become, by a kernel of grouped ones: (T, E)."""
    grouping = group_rows(routes.experts_TK, num_experts)
    scales = None if dispatched.scales is None else dispatched.scales[grouping.source]
    rows = dispatched.hidden[grouping.source]
    results = kernel(Dispatched(rows, grouping.counts_L, None, scales))
    return sum_results(results, grouping.positions_TK, routes.weights_TK, dtype)


def _column_blocks(results_ME: Tensor) -> list[slice]:
    """All columns at once if they are float32 already; else as many as are cheap to copy."""
    num_rows, hidden_size = results_ME.shape
    if results_ME.dtype == torch.float32 and results_ME.is_contiguous():
        return [slice(None)]
    width = max(_COPY_BYTES // (4 * num_rows), 64)
    return [slice(first, first + width) for first in range(0, hidden_size, width)]


def count_values(values: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size-1 occurs in an int64 tensor; torch.bincount would wait for the
    device."""
    flat = values.flatten()
    return flat.new_zeros(size).scatter_add_(0, flat, torch.ones_like(flat))
