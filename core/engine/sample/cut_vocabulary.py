"""Choosing tokens from logits whose columns are cut over ranks, without gathering them.

Every rank does its part of each row and a few numbers travel: the best token of each part, sums of
weights, the largest ratios where a row has a small top_k. The tokens are exactly those that one
rank would choose from all columns (core.engine.sample.operations): weights are integers, so that
sums over ranks are those of one rank, ratios are computed from each logit alone, and a threshold is
one of the row's ratios however it is found. Log-probabilities differ in their last bits, as the
ranks' sums of float32 are added up.

What top_p leaves without a small top_k, and a large top_k itself, can't be told from a bounded
number of candidates. Such a threshold is searched for among all float32 from 0 to 1, which are
integers by their bits: each of ROUNDS exchanges of EDGES sums leaves one of EDGES parts of them,
and the last leaves one number.

Shape legend: as in core.engine.sample.vocabulary; N ranks, E edges.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from core.engine.sample import operations as sampling
from core.engine.sample.vocabulary import Ints
from core.interfaces.comm import Communicator

LARGEST = 0x3F800000  # the bits of 1.0, the largest ratio
ROUNDS, EDGES = 4, 182  # EDGES^ROUNDS numbers are more than there are from 0 to LARGEST


class CutVocabulary:
    """core.engine.sample.vocabulary.Vocabulary of a rank that has the tokens from `first_id` on.

    Every rank has equally many columns; those from `num_tokens` on are padding, and ids rise from
    rank to rank. Whatever depends on sizes does so on those that all ranks have, so that all call
    the same collectives.
    """

    def __init__(
        self, comm: Communicator, vocab_size: int, *, first_id: int, num_tokens: int
    ) -> None:
        self.vocab_size = vocab_size
        self.num_columns = num_tokens + 1  # what is done to tokens of other ranks goes to the last
        self._comm = comm
        self.first_id, self._num_tokens = first_id, num_tokens
        self._most_tokens = -(-vocab_size // comm.size)

    def columns(self, ids: Ints) -> Ints:
        """Those of other ranks' tokens are the last column."""
        column = ids - self.first_id
        return np.where((column >= 0) & (column < self._num_tokens), column, self._num_tokens)

    def columns_of(self, ids: Tensor) -> Tensor:
        """Those of other ranks' tokens are the last column."""
        column = ids - self.first_id
        elsewhere = (column < 0) | (column >= self._num_tokens)
        return column.masked_fill_(elsewhere, self._num_tokens)

    def copy(self, logits_RX: Tensor) -> Tensor:
        """This rank's tokens and one more column."""
        copy_RX = logits_RX.new_zeros((logits_RX.shape[0], self.num_columns))
        copy_RX[:, : self._num_tokens] = logits_RX[:, : self._num_tokens]
        return copy_RX

    def tokens_of(self, logits_RX: Tensor) -> Tensor:
        """One column that is never chosen where this rank has no token."""
        if self._num_tokens == 0:
            return logits_RX.new_full((logits_RX.shape[0], 1), -torch.inf)
        return logits_RX[:, : self._num_tokens]

    def own_columns(self, copy_RX: Tensor) -> Tensor:
        """All but the last."""
        return copy_RX[:, : self._num_tokens]

    def best(self, logits_RX: Tensor) -> tuple[Tensor, Tensor]:
        """Of the best of each rank; the first rank has tokens in any case."""
        top_R, best_R = logits_RX.max(dim=-1)
        bits_R = top_R.view(torch.int32)
        found_NR2 = self._of_ranks(torch.stack((bits_R, (best_R + self.first_id).int()), -1))
        top_NR = found_NR2[..., 0].contiguous().view(torch.float32)
        top_R, rank_R = top_NR.max(dim=0)
        return top_R, found_NR2[..., 1].gather(0, rank_R[None])[0].long()

    def filter_thresholds(self, ratio_DX: Tensor, filtered: sampling.Filter) -> Tensor:
        """From the largest ratios of all ranks where so many are enough, else by searching."""
        thresholds = []
        for part in self._chunks(filtered.num_rows, ratio_DX):
            some, ratio_FX = filtered.part(part, ratio_DX)
            if some.top_k_F is not None and some.num_sorted < self.vocab_size:
                thresholds.append(self._from_head(ratio_FX, some, some.top_k_F))
            else:
                least_F = self._searched(ratio_FX, some.top_k_F, some.top_p_F)
                thresholds.append(torch.maximum(least_F, some.min_p_F))
        return sampling.joined(thresholds)

    def _from_head(self, ratio_FX: Tensor, some: sampling.Filter, top_k_F: Tensor) -> Tensor:
        num_sorted, num_mine = some.num_sorted, min(some.num_sorted, ratio_FX.shape[1])
        mine_FK = ratio_FX.new_zeros((ratio_FX.shape[0], num_sorted))
        mine_FK[:, :num_mine] = ratio_FX.topk(num_mine, dim=-1).values
        all_FNK = self._of_ranks(mine_FK).transpose(0, 1).flatten(1, 2)
        head_FK = all_FNK.topk(num_sorted, dim=-1).values.flip(-1)
        kth_F = sampling.kth_of_head(head_FK, top_k_F)
        total_F = None
        if some.top_p_F is not None:
            total_F = self._of_ranks(sampling.fixed_point(ratio_FX, kth_F).sum(-1)).sum(0)
        return sampling.threshold_in_head(head_FK, kth_F, total_F, some.top_p_F, some.min_p_F)

    def _searched(self, ratio_FX: Tensor, top_k_F: Tensor | None, top_p_F: Tensor | None) -> Tensor:
        """The least ratio that top_k and top_p leave."""
        rising_FX = sampling.sorted_rows(ratio_FX)
        kth_F = None
        if top_k_F is not None:
            # The k-th largest is the least of which more than all but k are not larger.
            kth_F = self._least(rising_FX, lambda count_FE: count_FE, lambda all_F: all_F - top_k_F)
        if top_p_F is None:
            assert kth_F is not None, "a filter without top_k and top_p"
            return kth_F
        # Weights of the 0, 1, .. smallest, from the k-th on.
        up_to_FX = pad(sampling.fixed_point(rising_FX, kth_F).cumsum(-1), (1, 0))
        return self._least(
            rising_FX,
            lambda count_FE: up_to_FX.gather(1, count_FE),
            lambda total_F: total_F - sampling.wanted_weight(total_F, top_p_F),
        )

    def _least(
        self,
        rising_FX: Tensor,
        sum_of: Callable[[Tensor], Tensor],
        exceeded_by: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The least ratio up to which all ranks' sums exceed `exceeded_by(total)`; 1.0 where none
        does. `sum_of` says what this rank's 0, 1, .. smallest ratios sum up to, for counts (F, E)
        of them; int64."""
        first_F1 = torch.zeros((rising_FX.shape[0], 1), dtype=torch.int64, device=rising_FX.device)
        edges_E = torch.arange(1, EDGES + 1, device=rising_FX.device)
        exceeded_F1 = None
        for power in range(ROUNDS - 1, -1, -1):
            width = EDGES**power  # bits of the parts that are told apart, from `first_F1` on
            last_FE = (first_F1 + edges_E * width - 1).clamp_(max=LARGEST)
            count_FE = torch.searchsorted(rising_FX, last_FE.int().view(torch.float32), right=True)
            sum_FE = self._of_ranks(sum_of(count_FE)).sum(0)
            if exceeded_F1 is None:  # the last edge of all is LARGEST
                exceeded_F1 = exceeded_by(sum_FE[:, -1])[:, None]
            num_short_F1 = (sum_FE <= exceeded_F1).sum(-1, keepdim=True)
            first_F1 = first_F1 + num_short_F1.clamp_(max=EDGES - 1) * width
        return first_F1.clamp_(max=LARGEST).int().view(torch.float32)[:, 0]

    def draw_tokens(
        self, ratio_DX: Tensor, threshold_D: Tensor | None, uniform_D: Tensor, fallback_D: Tensor
    ) -> Tensor:
        """Every rank draws the same unit of all ranks' weight; one of them has it."""
        drawn = []
        for part in self._chunks(ratio_DX.shape[0], ratio_DX):
            threshold = None if threshold_D is None else threshold_D[part]
            sums = sampling.BlockSums.of(sampling.fixed_point(ratio_DX[part], threshold))
            total_ND1 = self._of_ranks(sums.total_R1)
            target_D1 = sampling.drawn_weight(uniform_D[part], total_ND1.sum(0))
            inside_D1 = target_D1 - total_ND1[: self._comm.rank].sum(0)
            mine_D1 = (inside_D1 >= 0) & (inside_D1 < sums.total_R1)
            id_D1 = sums.token_at(inside_D1) + self.first_id
            drawn.append(torch.where(mine_D1, id_D1, -1)[:, 0])
        found_D = self._of_ranks(sampling.joined(drawn)).amax(0)
        return torch.where(found_D >= 0, found_D, fallback_D)

    def log_probabilities(
        self, logits_NX: Tensor, ids_N: Tensor, num_top: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums, logits of the ids and the best of each rank in one exchange, ranks in another."""
        logits_NX = self.tokens_of(logits_NX)
        num_rows, num_mine = logits_NX.shape[0], min(num_top, logits_NX.shape[1])
        column_N = self.columns_of(ids_N)
        elsewhere_N = column_N == self._num_tokens
        mine_N1 = logits_NX.gather(1, column_N.masked_fill(elsewhere_N, 0)[:, None])
        mine_N1 = mine_N1.masked_fill(elsewhere_N[:, None], -torch.inf)
        top = logits_NX.topk(num_mine, dim=-1)
        values = logits_NX.new_full((num_rows, 2 + num_top), -torch.inf)
        values[:, 0] = logits_NX.logsumexp(dim=-1)
        values[:, 1:2] = mine_N1
        values[:, 2 : 2 + num_mine] = top.values
        ids_NK = torch.zeros((num_rows, num_top), dtype=torch.int32, device=logits_NX.device)
        ids_NK[:, :num_mine] = (top.indices + self.first_id).int()
        told = self._of_ranks(torch.cat((values.view(torch.int32), ids_NK), -1))
        all_values = told[..., : 2 + num_top].contiguous().view(torch.float32)
        normaliser_N1 = all_values[..., 0].logsumexp(dim=0)[:, None]
        chosen_N1 = all_values[..., 1].amax(dim=0)[:, None]
        num_better_N = self._of_ranks((logits_NX > chosen_N1).sum(dim=-1)).sum(0)
        # Of equal logits the lower rank's come first.
        top_values = all_values[..., 2:].transpose(0, 1).flatten(1, 2)
        best = top_values.sort(dim=-1, descending=True, stable=True)
        ids = told[..., 2 + num_top :].transpose(0, 1).flatten(1, 2)
        return (
            (chosen_N1 - normaliser_N1)[:, 0],
            num_better_N + 1,
            ids.gather(1, best.indices[:, :num_top]).long(),
            best.values[:, :num_top] - normaliser_N1,
        )

    def _of_ranks(self, x: Tensor) -> Tensor:
        """`x` of every rank, of the same shape, along a new first dimension."""
        return self._comm.all_gather(x.contiguous()[None], 0)

    def _chunks(self, num_rows: int, like_RX: Tensor) -> list[slice]:
        """The same on every rank."""
        return sampling.row_chunks(num_rows, like_RX, self._most_tokens)
