"""Gathering and scattering of rows that ranks hold unequal numbers of. Knows no backend.

Where the numbers are alike, rows are padded to the most of any rank and travel by all-gather and
reduce-scatter; where one rank has most of them, padding would multiply the traffic, and a sum over
a buffer of all rows is taken instead. The rule is SGLang's (MAX_LEN against SUM_LEN).
Shape legend: T own rows, A rows of all ranks, in axis order and without padding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.interfaces.comm import Communicator


def gather_rows(comm: Communicator, x_T: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows of every rank of the axis (A, ...); `counts` are their numbers, the same everywhere."""
    total, most = sum(counts), max(counts)
    assert x_T.shape[0] == counts[comm.rank], f"{x_T.shape[0]} rows, {counts} agreed"
    if comm.size == 1 or total == 0:
        return x_T
    if min(counts) == most:
        return comm.all_gather(x_T, 0)
    if padding_pays(counts):
        padded = x_T.new_zeros(most, *x_T.shape[1:])
        padded[: x_T.shape[0]] = x_T
        parts = comm.all_gather(padded, 0).view(comm.size, most, *x_T.shape[1:])
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    whole_A = x_T.new_zeros(total, *x_T.shape[1:])
    first = sum(counts[: comm.rank])
    whole_A[first : first + x_T.shape[0]] = x_T
    return comm.all_reduce(whole_A)


def scatter_rows(comm: Communicator, partial_A: Tensor, counts: Sequence[int]) -> Tensor:
    """This rank's rows (T, ...) of the sum over ranks; `counts` as for `gather_rows`."""
    total, most = sum(counts), max(counts)
    assert partial_A.shape[0] == total, f"{partial_A.shape[0]} rows, {counts} agreed"
    if comm.size == 1 or total == 0:
        return partial_A
    if min(counts) == most:
        return comm.reduce_scatter(partial_A)
    mine = counts[comm.rank]
    if padding_pays(counts):
        padded = partial_A.new_zeros(comm.size, most, *partial_A.shape[1:])
        for place, part in zip(padded, partial_A.split_with_sizes(list(counts)), strict=True):
            place[: part.shape[0]] = part
        return comm.reduce_scatter(padded.flatten(0, 1))[:mine]
    first = sum(counts[: comm.rank])
    return comm.all_reduce(partial_A)[first : first + mine]


def padding_pays(counts: Sequence[int]) -> bool:
    """Whether equal, padded parts move fewer bytes than a sum over all rows (twice their size)."""
    return 2 * sum(counts) >= max(counts) * len(counts)
