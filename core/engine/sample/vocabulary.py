"""What is done to rows of logits whose columns are the whole vocabulary, or a part of it.

`Vocabulary` is what choosing tokens and their log-probabilities need; `WholeVocabulary` is that of
one rank that has all columns, core.engine.sample.cut_vocabulary that of ranks that have some each.
Knows nothing of requests.

Shape legend: R rows, V vocabulary, X columns of the logits that this rank has, D rows that draw, F
of those with a filter, N rows whose log-probabilities are wanted, K alternatives.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.engine.sample import operations as sampling

Ints = npt.NDArray[np.int64]


class Vocabulary(Protocol):
    """The columns of a rank's logits. Ranks that share a vocabulary call the same methods, with
    rows and parameters of the same requests; all get the same tokens. Nothing waits for a GPU."""

    vocab_size: int  # V
    num_columns: int  # of `copy`
    first_id: int  # the token of column 0

    def columns(self, ids: Ints) -> Ints:
        """The column of `copy` that stands for each id (0..V-1), on the host."""
        ...

    def columns_of(self, ids: Tensor) -> Tensor:
        """The same on the device; int64."""
        ...

    def copy(self, logits_RX: Tensor) -> Tensor:
        """Logits to write into, contiguous (R, num_columns)."""
        ...

    def tokens_of(self, logits_RX: Tensor) -> Tensor:
        """Logits, or a `copy` of them, without the columns that stand for no token."""
        ...

    def own_columns(self, copy_RX: Tensor) -> Tensor:
        """A view of a `copy`: the columns of this rank's tokens, perhaps none."""
        ...

    def best(self, logits_RX: Tensor) -> tuple[Tensor, Tensor]:
        """Of `tokens_of`: each row's largest logit, and the first id that has it (int64)."""
        ...

    def filter_thresholds(self, ratio_DX: Tensor, filtered: sampling.Filter) -> Tensor:
        """core.engine.sample.operations.filter_thresholds over the whole vocabulary."""
        ...

    def draw_tokens(
        self, ratio_DX: Tensor, threshold_D: Tensor | None, uniform_D: Tensor, fallback_D: Tensor
    ) -> Tensor:
        """core.engine.sample.operations.draw_tokens over the whole vocabulary."""
        ...

    def log_probabilities(
        self, logits_NX: Tensor, ids_N: Tensor, num_top: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of `ids_N` (int64): float32 log-probabilities and ranks (int64, from 1); ids (N, K) and
        log-probabilities of the K = `num_top` best tokens, best first. `logits_NX` is float32, as
        the output head leaves it."""
        ...


class WholeVocabulary:
    """All columns: each operation is core.engine.sample.operations's."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.num_columns = vocab_size
        self.first_id = 0

    def columns(self, ids: Ints) -> Ints:
        """An id is its column."""
        return ids

    def columns_of(self, ids: Tensor) -> Tensor:
        """An id is its column."""
        return ids

    def copy(self, logits_RX: Tensor) -> Tensor:
        """(R, V)"""
        return logits_RX.clone(memory_format=torch.contiguous_format)

    def tokens_of(self, logits_RX: Tensor) -> Tensor:
        """All of them."""
        return logits_RX

    def own_columns(self, copy_RX: Tensor) -> Tensor:
        """All of them."""
        return copy_RX

    def best(self, logits_RX: Tensor) -> tuple[Tensor, Tensor]:
        """max is three times as fast as argmax on a CPU, and drawing needs both of its results."""
        top_R, best_R = logits_RX.max(dim=-1)
        return top_R, best_R

    def filter_thresholds(self, ratio_DX: Tensor, filtered: sampling.Filter) -> Tensor:
        """See core.engine.sample.operations."""
        return sampling.filter_thresholds(ratio_DX, filtered)

    def draw_tokens(
        self, ratio_DX: Tensor, threshold_D: Tensor | None, uniform_D: Tensor, fallback_D: Tensor
    ) -> Tensor:
        """See core.engine.sample.operations."""
        return sampling.draw_tokens(ratio_DX, threshold_D, uniform_D, fallback_D)

    def log_probabilities(
        self, logits_NX: Tensor, ids_N: Tensor, num_top: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See Vocabulary."""
        normaliser_N1 = logits_NX.logsumexp(dim=-1, keepdim=True)
        chosen_N1 = logits_NX.gather(1, ids_N[:, None])
        ranks_N = (logits_NX > chosen_N1).sum(dim=-1) + 1
        top_NK = logits_NX.topk(num_top, dim=-1)
        return (
            (chosen_N1 - normaliser_N1)[:, 0],
            ranks_N,
            top_NK.indices,
            top_NK.values - normaliser_N1,
        )
