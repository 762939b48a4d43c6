"""Log-probabilities of tokens under unmodified logits. Knows nothing of sampling or requests.

The device part (`sampled_logprobs`, `prompt_logprobs`) only queues work; its result holds small
device tensors, which `to_host` turns into messages when somebody wants them.

Shape legend: R rows of a step's logits, T rows of a prompt, N rows answered for, V vocabulary,
K most alternatives of any row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.engine.batch import to_device
from core.interfaces.messages import TokenLogprobs
from core.kernels.sampling import row_chunks


@dataclass(frozen=True, slots=True)
class DeviceLogprobs:
    """Log-probabilities of one token for each of N rows, and the best tokens of those rows."""

    token_ids_N: Tensor  # int64
    logprobs_N: Tensor  # float32
    ranks_N: Tensor  # int64, from 1
    top_ids_NK: Tensor  # int64
    top_logprobs_NK: Tensor  # float32
    num_top: tuple[int, ...]  # alternatives wanted by each row, at most K

    def copy_async(self) -> "DeviceLogprobs":
        """The same on the host, in pinned memory: valid once the stream got this far."""
        return DeviceLogprobs(
            self.token_ids_N.to("cpu", non_blocking=True),
            self.logprobs_N.to("cpu", non_blocking=True),
            self.ranks_N.to("cpu", non_blocking=True),
            self.top_ids_NK.to("cpu", non_blocking=True),
            self.top_logprobs_NK.to("cpu", non_blocking=True),
            self.num_top,
        )

    def to_host(self) -> list[TokenLogprobs]:
        """One entry for each row; waits for the device."""
        columns = zip(
            self.token_ids_N.tolist(),
            self.logprobs_N.tolist(),
            self.ranks_N.tolist(),
            self.top_ids_NK.tolist(),
            self.top_logprobs_NK.tolist(),
            self.num_top,
            strict=True,
        )
        return [
            TokenLogprobs(token_id, logprob, rank, top_ids[:num_top], top_logprobs[:num_top])
            for token_id, logprob, rank, top_ids, top_logprobs, num_top in columns
        ]


def sampled_logprobs(
    logits_RV: Tensor, chosen_R: Tensor, num_top: Sequence[int | None]
) -> DeviceLogprobs:
    """Of the chosen tokens (int64), for the rows whose `num_top` is not None, in row order.

    `num_top[i]` is how many of the best tokens row i wants besides.
    """
    wanted = [num for num in num_top if num is not None]
    if len(wanted) == len(num_top):
        return _logprobs(logits_RV, chosen_R, wanted, None)
    rows = [row for row, num in enumerate(num_top) if num is not None]
    rows_N = to_device(np.array(rows, dtype=np.int64), logits_RV.device)
    return _logprobs(logits_RV, chosen_R[rows_N], wanted, rows_N)


def prompt_logprobs(logits_TV: Tensor, next_ids_T: Tensor, num_top: int) -> DeviceLogprobs:
    """Of the tokens (int64) that follow each position of a prompt, with `num_top` alternatives.

    Scratch is bounded by row chunks, but `logits_TV` is the caller's: make no more of it at a
    time than memory allows, one call for each part.
    """
    return _logprobs(logits_TV, next_ids_T, [num_top] * logits_TV.shape[0], None)


def _logprobs(
    logits_RV: Tensor, ids_N: Tensor, num_top: Sequence[int], rows_N: Tensor | None
) -> DeviceLogprobs:
    """`ids_N` in the rows `rows_N` (None: all) of the logits."""
    num_rows, vocab_size = ids_N.shape[0], logits_RV.shape[1]
    most = min(max(num_top, default=0), vocab_size)
    parts = []
    for part in row_chunks(num_rows, logits_RV) or [slice(0, 0)]:
        logits_NV = logits_RV[part] if rows_N is None else logits_RV[rows_N[part]]
        parts.append(_chunk(logits_NV.float(), ids_N[part], most))
    logprobs_N, ranks_N, top_ids_NK, top_logprobs_NK = (
        torch.cat(tensors) if len(parts) > 1 else tensors[0] for tensors in zip(*parts, strict=True)
    )
    return DeviceLogprobs(ids_N, logprobs_N, ranks_N, top_ids_NK, top_logprobs_NK, tuple(num_top))


def _chunk(logits_NV: Tensor, ids_N: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logprobs and ranks of `ids_N`, ids and logprobs of the `most` best tokens."""
    normaliser_N1 = logits_NV.logsumexp(dim=-1, keepdim=True)
    chosen_N1 = logits_NV.gather(1, ids_N[:, None])
    ranks_N = (logits_NV > chosen_N1).sum(dim=-1) + 1
    top_NK = logits_NV.topk(most, dim=-1)
    return (
        (chosen_N1 - normaliser_N1)[:, 0],
        ranks_N,
        top_NK.indices,
        top_NK.values - normaliser_N1,
    )
