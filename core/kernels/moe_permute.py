"""Rows to the experts of one rank and back: grouping, padding, and the weighted sum of results.

Pure index arithmetic on the rows' device. On a GPU nothing here waits for the device; the host
then does not know how many pairs there are, and sizes are upper bounds. Knows nothing of ranks.
Shape legend: T rows, K experts of a row, L experts of this rank, E hidden size, M pairs of a row
and one of its experts here, C most pairs of one expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_SUM_BYTES = 64 * 2**20  # of float32 copies at a time, in `sum_results`


@dataclass(frozen=True, slots=True)
class Grouping:
    """Where each pair of a row and an expert stands among the rows that the experts read."""

    source: Tensor  # int64 (M,) or (L, C): the row to read; any row past the counted ones
    counts_L: Tensor  # int64: pairs of each expert
    positions_TK: Tensor  # int64: place of each pair in `source`, flattened; -1: no pair


def group_rows(experts_TK: Tensor, num_experts: int, num_pairs: int | None = None) -> Grouping:
    """Pairs one behind another, grouped by expert and in the order of rows (CONTIGUOUS).

    `experts_TK` int64: 0 .. L-1, or negative for no expert here. `num_pairs`: how many pairs there
    are, where the host knows. Otherwise the CPU counts, and on a GPU M is T * K: the rows past the
    counted ones must not be used.
    """
    num_columns = experts_TK.shape[1]
    keys = experts_TK.flatten()
    none = keys < 0
    keys = torch.where(none, num_experts, keys)
    counts_L = count_values(keys, num_experts + 1)[:num_experts]
    order = keys.argsort(stable=True)
    positions = torch.empty_like(order)
    positions[order] = torch.arange(len(order), device=order.device)
    if num_pairs is None:
        num_pairs = int(counts_L.sum()) if keys.device.type == "cpu" else len(keys)
    return Grouping(
        source=order[:num_pairs].div(max(num_columns, 1), rounding_mode="floor"),
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


def sum_results(results_ME: Tensor, positions_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """For each row the sum of its results, times their weights if given: (T, E) in float32.

    `positions_TK`: places in `results_ME`, or -1 for none. Rows of `results_ME` that no position
    names may hold anything, NaN too.
    """
    num_rows, num_columns = positions_TK.shape
    hidden_size = results_ME.shape[1]
    if results_ME.shape[0] == 0 or num_columns == 0:
        return results_ME.new_zeros(num_rows, hidden_size, dtype=torch.float32)
    out_TE = results_ME.new_empty(num_rows, hidden_size, dtype=torch.float32)
    # A copy of all results in float32 would be gigabytes in a long prefill.
    chunk = max(_SUM_BYTES // (4 * num_columns * max(hidden_size, 1)), 1)
    for first in range(0, num_rows, chunk):
        positions = positions_TK[first : first + chunk]
        none = positions < 0
        picked = results_ME.index_select(0, positions.clamp(min=0).flatten()).float()
        picked = picked.view(*positions.shape, hidden_size).masked_fill_(none[..., None], 0.0)
        if weights_TK is not None:
            picked.mul_(weights_TK[first : first + chunk, :, None])
        torch.sum(picked, 1, out=out_TE[first : first + chunk])
    return out_TE


def count_values(values: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size-1 occurs in an int64 tensor; torch.bincount would wait for the
    device."""
    flat = values.flatten()
    return flat.new_zeros(size).scatter_add_(0, flat, torch.ones_like(flat))
