"""Log-probabilities of tokens under unmodified logits. Knows nothing of sampling or requests.

The device part (`sampled_logprobs`, `prompt_logprobs`) only queues work; its result holds small
device tensors, which `to_host` turns into messages when somebody wants them.

Shape legend: R rows of a step's logits, X their columns on this rank, T rows of a prompt, N rows
answered for, V vocabulary, K most alternatives of any row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.engine.sample.operations import row_chunks
from core.engine.sample.vocabulary import Vocabulary, WholeVocabulary
from core.engine.step.batch import to_device
from core.interfaces.messages import TokenLogprobs


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
    logits_RX: Tensor,
    chosen_R: Tensor,
    num_top: Sequence[int | None],
    over: Vocabulary | None = None,
) -> DeviceLogprobs:
    """Of the chosen tokens (int64), for the rows whose `num_top` is not None, in row order.

    `num_top[i]` is how many of the best tokens row i wants besides. `over` says which columns the
    logits have, None: all; every rank that shares them calls this.
    """
    over = over or WholeVocabulary(logits_RX.shape[1])
    wanted = [num for num in num_top if num is not None]
    if len(wanted) == len(num_top):
        return _logprobs(logits_RX, chosen_R, wanted, None, over)
    rows = [row for row, num in enumerate(num_top) if num is not None]
    rows_N = to_device(np.array(rows, dtype=np.int64), logits_RX.device)
    return _logprobs(logits_RX, chosen_R[rows_N], wanted, rows_N, over)


def prompt_logprobs(logits_TV: Tensor, next_ids_T: Tensor, num_top: int) -> DeviceLogprobs:
    """Of the tokens (int64) that follow each position of a prompt, with `num_top` alternatives.

    Scratch is bounded by row chunks, but `logits_TV` is the caller's: make no more of it at a
    time than memory allows, one call for each part.
    """
    over = WholeVocabulary(logits_TV.shape[1])
    return _logprobs(logits_TV, next_ids_T, [num_top] * logits_TV.shape[0], None, over)


def _logprobs(
    logits_RX: Tensor,
    ids_N: Tensor,
    num_top: Sequence[int],
    rows_N: Tensor | None,
    over: Vocabulary,
) -> DeviceLogprobs:
    """`ids_N` in the rows `rows_N` (None: all) of the logits."""
    most = min(max(num_top, default=0), over.vocab_size)
    parts = []
    for part in row_chunks(ids_N.shape[0], logits_RX) or [slice(0, 0)]:
        logits_NX = logits_RX[part] if rows_N is None else logits_RX[rows_N[part]]
        parts.append(over.log_probabilities(logits_NX.float(), ids_N[part], most))
    logprobs_N, ranks_N, top_ids_NK, top_logprobs_NK = (
        torch.cat(tensors) if len(parts) > 1 else tensors[0] for tensors in zip(*parts, strict=True)
    )
    return DeviceLogprobs(ids_N, logprobs_N, ranks_N, top_ids_NK, top_logprobs_NK, tuple(num_top))
